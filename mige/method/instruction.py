"""Instructions in which pictures stand among the words (MIGE, section 3.1).

Axes: b instructions, k tokens, d their width, q vectors a picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mige.method.wording import split

VECTOR = -1  # stands among the ids of tokens for a vector of a picture


class Embedded(NamedTuple):
    """Text and pictures as the text encoder reads them: [b, k, d], and 1 for what counts, [b, k].

    Of a single instruction: [k, d] and [k].
    """

    embeddings: Tensor
    mask: Tensor


def segment_ids(tokenizer, prompt: str) -> list[list[int]]:
    """Token ids of each of a prompt's segments, without special tokens."""
    return [
        tokenizer(text, add_special_tokens=False).input_ids if text else []
        for text in split(prompt)
    ]


def interleave(
    segments: Sequence[Sequence[Sequence[int]]],
    pictures: Sequence[Tensor],
    table: Tensor,
    length: int,
    end: int,
    pad: int,
) -> Embedded:
    """Put the vectors of pictures between the embeddings of words, for several instructions.

    A sequence is segment 0, picture 0, segment 1, … and the end token. It is cut to ``length``,
    or filled up with the padding's embedding. Where there are more marks than slots for pictures,
    the segments between the surplus marks are left out but for the last, as in the release.

    All words are looked up together, and all vectors put in together: on a GPU, a few operations in
    place of a few for each segment.

    Args:
        segments: of each instruction, token ids, one list more than there are marks.
        pictures: of each instruction, [slots, q, d], vectors of as many pictures as there may be;
            slots may differ, and be 0.
        table: [vocabulary, d], the text encoder's embeddings.
        length: k.
        end, pad: ids of the end token and of the padding.
    """
    ids, mask, places, first = [], [], [], 0
    for row, (mine, given) in enumerate(zip(segments, pictures, strict=True)):
        slots, queries = given.shape[:2]
        tokens = _layout(mine, slots, queries, end)[:length]
        columns = [column for column, each in enumerate(tokens) if each == VECTOR]
        places += [(row, column, first + n) for n, column in enumerate(columns)]
        first += slots * queries
        rest = length - len(tokens)
        ids.append([pad if each == VECTOR else each for each in tokens] + [pad] * rest)
        mask.append([1] * len(tokens) + [0] * rest)
    device = table.device
    embeddings = F.embedding(torch.tensor(ids, device=device), table)
    if first:  # also where all of them are cut off: they get gradients of zero
        rows, columns, taken = torch.tensor(places, device=device).reshape(-1, 3).long().unbind(1)
        vectors = torch.cat([each.flatten(0, 1).to(table) for each in pictures])
        embeddings = embeddings.index_put((rows, columns), vectors.index_select(0, taken))
    return Embedded(embeddings, torch.tensor(mask, device=device))


def _layout(segments: Sequence[Sequence[int]], slots: int, queries: int, end: int) -> list[int]:
    """Ids of an instruction's tokens, and VECTOR for each vector of a picture."""
    count = min(len(segments) - 1, slots)
    found = []
    for ids in segments[:count]:
        found += [*ids, *[VECTOR] * queries]
    return [*found, *segments[-1], end]


def length_of(segments: Sequence[Sequence[int]], queries: int) -> int:
    """How many positions an instruction takes, its end token included."""
    return sum(map(len, segments)) + queries * (len(segments) - 1) + 1
