"""Files that are given as lists: what is in one that is no JSON array, and what to do about it."""

import codecs
import json
from pathlib import Path

from imagelab.errors import UserError, shorten

BOM = codecs.BOM_UTF8  # which some editors write before a text
HEAD = 1 << 16  # bytes that tell what is in a file


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
