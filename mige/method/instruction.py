"""Instructions in which pictures stand among the words (MIGE, section 3.1).

Axes: k tokens, d their width, q vectors a picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mige.method.wording import split


class Embedded(NamedTuple):
    """Text and pictures as the text encoder reads them: [k, d], and 1 for each that counts, [k]."""

    embeddings: Tensor
    mask: Tensor


def segment_ids(tokenizer, prompt: str) -> list[list[int]]:
    """Token ids of each of a prompt's segments, without special tokens."""
    return [
        tokenizer(text, add_special_tokens=False).input_ids if text else []
        for text in split(prompt)
    ]


def interleave(
    segments: Sequence[Sequence[int]],
    pictures: Tensor,
    table: Tensor,
    length: int,
    end: int,
    pad: int,
) -> Embedded:
    """Put the vectors of pictures between the embeddings of words.

    The sequence is segment 0, picture 0, segment 1, … and the end token. It is cut to ``length``,
    or filled up with the padding's embedding. Where there are more marks than slots for pictures,
    the segments between the surplus marks are left out but for the last, as in the release.

    Args:
        segments: token ids, one list more than there are marks.
        pictures: [slots, q, d], vectors of as many pictures as there may be.
        table: [vocabulary, d], the text encoder's embeddings.
        length: k.
        end, pad: ids of the end token and of the padding.
    """

    def embed(ids: Sequence[int]) -> Tensor:
        return F.embedding(torch.tensor(ids, dtype=torch.long, device=table.device), table)

    count = min(len(segments) - 1, len(pictures))
    parts = []
    for ids, picture in zip(segments[:count], pictures, strict=False):
        parts += [embed(ids), picture.to(table)]
    parts.append(embed([*segments[-1], end]))
    whole = torch.cat(parts)[:length]
    filler = embed([pad]).expand(length - len(whole), -1)
    mask = torch.zeros(length, dtype=torch.long, device=table.device)
    mask[: len(whole)] = 1
    return Embedded(torch.cat([whole, filler]), mask)


def length_of(segments: Sequence[Sequence[int]], queries: int) -> int:
    """How many positions an instruction takes, its end token included."""
    return sum(map(len, segments)) + queries * (len(segments) - 1) + 1
