"""Files that are given as lists: what is in one that is no JSON array, and what to do about it."""

import codecs
import json
import mmap
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import misfit

BOM = codecs.BOM_UTF8  # which some editors write before a text
HEAD = 1 << 16  # bytes that tell what is in a file
BLOCK = 1 << 24  # bytes that are looked through at a time
LONGEST = 1 << 22  # bytes of an object


def read_text(path: Path, advice: str) -> str:
    """The text of a list that is there; a UserError, ending with ``advice``, where it is none."""
    data = path.read_bytes()
    if told := unlike_array(data[:HEAD]):
        raise UserError(f"{path} {told}; {advice}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as that") from error


def unlike_array(start: bytes) -> str | None:
    """What a file is in place of a JSON array, and what to do; None: it begins as one, or is empty.

    Args:
        start: its first bytes, HEAD of them if there are so many.
    """
    if b"\0" in start[:2] or start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "is UTF-16 text; save it as UTF-8"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start.removeprefix(BOM)).lstrip()
    except UnicodeDecodeError:
        return "is not UTF-8 text; save it as that"
    if not text or text[0] == "[":
        return None
    if text[0] == "{":
        if _is_of_lines(text):
            return "has a JSON object a line (JSONL); put the lines into an array, [{…}, {…}]"
        return "is a JSON object and not an array; put the objects into an array, [{…}, {…}]"
    line = text.splitlines()[0]
    if any(sign in line for sign in ",;\t"):
        return "looks like a table (CSV); write each row as an object of a JSON array, [{…}, {…}]"
    return f"begins with {shorten(line, 20)!r} and is no JSON; write a JSON array, [{{…}}, {{…}}]"


def _is_of_lines(text: str) -> bool:
    """Whether another object comes behind the first."""
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip().startswith("{")


# ----------------------------------------------------------------------------------------------
# lists of millions


def find_objects(path: Path, advice: str) -> np.ndarray:
    """Where the objects of a JSON array begin and end in a file, in bytes, int64 [n, 2].

    Bytes are taken for characters: all that JSON is built of is ASCII, and within texts nothing is
    read yet. A UserError, ending with ``advice``, for a file that is no such array.
    """
    decoder, places = json.JSONDecoder(strict=False), []
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        tqdm(total=len(data), desc="reading", unit="B", unit_scale=True, disable=len(data) < BLOCK)
        as bar,
    ):  # fmt: skip
        if told := unlike_array(data[:HEAD]):
            raise UserError(f"{path} {told}; {advice}")
        at = _expect(data, len(BOM) if data[: len(BOM)] == BOM else 0, b"[", path, advice)
        while data[at : at + 1] != b"]":
            if places:
                at = _expect(data, at, b",", path, advice)
            text = data[at : at + BLOCK].decode("latin-1")
            shift, found = at, 0
            while True:
                try:
                    value, end = decoder.raw_decode(text, found)
                except (ValueError, RecursionError) as error:
                    if found and len(text) == BLOCK:
                        break  # cut in the middle: the next block begins here
                    raise _broken(data, shift + found, path, advice) from error
                if wrong := misfit(value, {}, f"record {len(places)}"):
                    raise UserError(f"{path}: {wrong}; {advice}")
                if end - found > LONGEST:
                    raise _broken(data, shift + found, path, advice)
                places.append((shift + found, shift + end))
                at = _skip(data, shift + end)
                if data[at : at + 1] != b"," or at - shift > BLOCK - LONGEST:
                    break
                found = _skip(data, at + 1) - shift
            bar.update(at - bar.n)
        if data[_skip(data, at + 1) :]:
            raise _broken(data, at + 1, path, advice)
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def _skip(data: mmap.mmap, at: int) -> int:
    """The next place that is no blank."""
    while data[at : at + 1] in (b" ", b"\n", b"\r", b"\t"):
        at += 1
    return at


def _expect(data: mmap.mmap, at: int, sign: bytes, path: Path, advice: str) -> int:
    """The next place behind a sign, which has to stand here."""
    at = _skip(data, at)
    if data[at : at + 1] != sign:
        raise _broken(data, at, path, advice)
    return _skip(data, at + 1)


def _broken(data: mmap.mmap, at: int, path: Path, advice: str) -> UserError:
    line = data[:at].count(b"\n") + 1
    return UserError(f"{path} is no JSON array of objects: see line {line}; {advice}")
