"""T5's vocabulary out of SentencePiece's file, which is read here: no further package is needed.

The file is a message of protocol buffers: fields, each with a number, a kind and a value. Of a
ModelProto, field 1 is a piece (its text 1, score 2, type 3), 2 the trainer's settings (3 is the
kind of model), 3 the normalizer's (2 is its table of characters).
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from imagelab.errors import UserError

Value = int | bytes
Pieces = list[tuple[str, float]]

ADVICE = "it should be the spiece.model of google/t5-v1_1-xxl; fetch it again"
MOST_BYTES = 64 * 2**20
#: Kinds of fields: a number of 7 bits a byte, 8 bytes, bytes behind their length, 4 bytes.
VARINT, EIGHT, SIZED, FOUR = 0, 1, 2, 5
UNIGRAM = 1
#: Types of pieces that T5 has: plain ones, the unknown, and those that no text gives.
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
#: T5's first pieces, by their ids.
FIRST = ("<pad>", "</s>", "<unk>")


def read_spiece(path: Path) -> tuple[Pieces, bytes | None]:
    """The pieces with their scores, in the order of their ids, and the table of characters.

    Raises:
        UserError: the file is damaged, or of another model than T5.
    """
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is too large for a vocabulary; {ADVICE}")
    try:
        pieces, kind, charsmap = _read_model(path.read_bytes())
    except (IndexError, UnicodeDecodeError, TypeError, KeyError, struct.error) as error:
        raise UserError(f"{path} is no SentencePiece model; {ADVICE}") from error
    if kind != UNIGRAM or any(type_ > CONTROL for _, _, type_ in pieces):
        raise UserError(f"{path} is a SentencePiece model of another kind than T5's; {ADVICE}")
    vocabulary = [(text, score) for text, score, _ in pieces]
    texts = [text for text, _ in vocabulary]
    if tuple(texts[: len(FIRST)]) != FIRST or len(set(texts)) < len(texts):
        raise UserError(
            f"{path} is not T5's: its first pieces should be {' '.join(FIRST)}, and no piece be "
            f"there twice; {ADVICE}"
        )
    if not all(math.isfinite(score) for _, score in vocabulary):
        raise UserError(f"{path} has scores that are no numbers; {ADVICE}")
    if charsmap is not None and not is_charsmap(charsmap):
        raise UserError(f"{path} has a table of characters that leads nowhere; {ADVICE}")
    return vocabulary, charsmap


def is_charsmap(data: bytes) -> bool:
    """Whether a table of characters leads nowhere beyond itself: the library would abort there.

    The table is the length of a trie, in bytes; the trie, a double array of 32-bit units; and
    texts, each with a zero behind it. A unit holds where its children are, in blocks of 256, and
    whether the first of them holds a text's place, which has the highest bit set.
    """
    size = int.from_bytes(data[:4], "little")
    texts = np.frombuffer(data[4 + size :], np.uint8)
    if len(data) < 4 + size or not size or size % 1024 or not _is_utf8(data[4 + size :]):
        return False
    units = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    is_text = units >> 31 == 1
    children = (units >> 10) << ((units & 512) >> 6) ^ np.arange(len(units))
    places = units[is_text] & 0x7FFFFFFF
    if (children[~is_text] >= len(units)).any() or (places >= len(texts)).any():
        return False
    ends = ~is_text & (units >> 8 & 1 == 1)
    within = texts[places] >> 6 == 2  # in the middle of a character
    return bool(is_text[children[ends]].all() and not within.any())


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], int, bytes | None]:
    """Pieces as (text, score, type), the kind of model, the table of characters."""
    pieces, kind, charsmap = [], UNIGRAM, None
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode("utf-8"), score, int(piece.get(3, NORMAL))))
        elif number == 2:
            kind = dict(_fields(value)).get(3, UNIGRAM)
        elif number == 3:
            charsmap = dict(_fields(value)).get(2) or None
    return pieces, kind, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message; IndexError where it ends too early or is none."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(data, place)
        else:
            if kind == SIZED:
                size, place = _varint(data, place)
            else:
                size = {EIGHT: 8, FOUR: 4}[kind]
            value, place = data[place : place + size], place + size
            if place > len(data):
                raise IndexError("a field goes beyond the end")
        yield number, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for count in range(10):
        byte = data[place + count]
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, place + count + 1
    raise IndexError("a number goes on for too long")
