"""Heads that are thrown away: they ask the parts that read what they have seen and understood.

Axes: b batch, r pictures of a batch, q queries, d width, m toys of a view, k kinds, v cosine and
sine, h and w rows and columns of patches.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mige.training.model import TrainedModel
from toybox.mige.reading import (
    ASKED,
    ENCODED,
    HUE_WORDS,
    KIND_WORDS,
    Readings,
    Remembered,
    States,
    Truth,
    read_states,
)
from toybox.mige.views import Views, batch_of
from toybox.scenes.toys import KINDS
from toybox.scenes.triplets import WORDS

NEAR = 25.0  # degrees within which a hue is right
Tensors = dict[str, Tensor]


class ViewHeads(nn.Module):
    """Asks each patch of the vision encoder, after its norm, what it shows.

    The first of the kinds is the ground.
    """

    def __init__(self, width: int):
        super().__init__()
        self.kinds, self.hue = nn.Linear(width, 1 + len(KINDS)), nn.Linear(width, 2)

    def forward(self, vision_encoder, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, k, h, w] and hue vectors [b, v, h, w]."""
        patches = vision_encoder(pictures).last_hidden_state[:, 1:]  # the first is of no patch
        side = vision_encoder.config.image_size // vision_encoder.config.patch_size
        answers = (head(patches).transpose(1, 2) for head in (self.kinds, self.hue))
        return tuple(answer.unflatten(2, (side, side)) for answer in answers)


def view_losses(logits: Tensor, hues: Tensor, views: Views) -> Tensors:
    """Cross-entropy with the shares of the patches, and the hues' squared error where toys are."""
    kinds = -(views.of_kinds() * logits.log_softmax(1)).sum(1).mean()
    covered = views.shares.sum(1)  # b h w
    errors = (covered[:, None] * hues - views.of_hues()).square().sum(1)
    hue = (errors.flatten(1).sum(1) / covered.flatten(1).sum(1).clamp_min(1)).mean()
    return {"loss": kinds + hue, "view_kinds": kinds, "view_hue": hue}


@torch.no_grad()
def cells_of(encoder, heads: ViewHeads, seen: Tensor, queries: int) -> Tensor:
    """What a vision encoder and its heads say of the cells of pictures, [p, q, 3].

    Cells are as many as queries, in rows of equal length. See :class:`~toybox.mige.reading.Truth`.

    Args:
        seen: [p, patches, width], what `toybox.mige.reading.look` gives.
    """
    remembered, cells = Remembered(encoder), []
    for part in seen.split(ENCODED):
        logits, hues = heads(remembered, part.float().to(encoder.device))
        toys = 1 - logits.softmax(1)[:, :1]
        maps = F.adaptive_avg_pool2d(torch.cat([toys, toys * hues], 1), grid_of(queries))
        cells.append(maps.flatten(2).transpose(1, 2).cpu())
    return torch.cat(cells)


def grid_of(queries: int) -> tuple[int, int]:
    """Rows and columns of as many cells, as near a square as can be."""
    rows = next(rows for rows in range(math.isqrt(queries), 0, -1) if queries % rows == 0)
    return rows, queries // rows


class ReadingHeads(nn.Module):
    """Asks T5's states what an instruction and its pictures mean.

    A picture is asked at its own positions. Each of these is also asked for a cell of the picture
    of its own, by the same weights: without that, all queries come to say the same. The words are
    asked at the end token, so that they have to be brought there.
    """

    def __init__(self, width: int, queries: int):
        super().__init__()
        seen = queries * width
        self.kind, self.hue = nn.Linear(seen, len(KINDS)), nn.Linear(seen, 2)
        self.kinds, self.cells = nn.Linear(seen, len(KINDS)), nn.Linear(width, 3)
        self.asked, self.words = nn.Linear(width, len(ASKED)), nn.Linear(width, len(WORDS))

    def forward(self, states: States) -> Tensors:
        """Logits and hue vectors, by name."""
        pictures = states.pictures.flatten(1)  # r (q d)
        asked = {name: getattr(self, name)(states.end) for name in ("asked", "words")}
        seen = {name: getattr(self, name)(pictures) for name in ("kind", "hue", "kinds")}
        return asked | seen | {"cells": self.cells(states.pictures)}


def reading_losses(answers: Tensors, truth: Truth) -> Tensors:
    """A loss of each answer: sums over pictures and instructions, by the number of instructions."""
    count, shown = len(truth.asked), truth.is_reference
    kind = F.cross_entropy(answers["kind"][shown], truth.kind[shown], reduction="sum")
    hue = (answers["hue"] - truth.hue)[shown].square().sum()
    kinds = F.binary_cross_entropy_with_logits(
        answers["kinds"][~shown], truth.kinds[~shown].float(), reduction="sum"
    )
    words = F.binary_cross_entropy_with_logits(
        answers["words"], truth.words.float(), reduction="sum"
    )
    asked = F.cross_entropy(answers["asked"], truth.asked, reduction="sum")
    cells = (answers["cells"] - truth.cells).square().sum()
    found = {
        "kind": kind, "hue": hue, "kinds": kinds, "cells": cells, "words": words, "asked": asked,
    }  # fmt: skip
    losses = {name: value / count for name, value in found.items()}
    return {"loss": sum(losses.values()), **losses}


# ----------------------------------------------------------------------------------------------
# what was learned


@torch.inference_mode()
def measure_views(
    vision_encoder, heads: ViewHeads, data: dict[str, Tensor], batch: int
) -> dict[str, float]:
    """Shares of toys whose kind, and whose hue within NEAR degrees, their patches tell."""
    patch, kinds, hues = vision_encoder.config.patch_size, [], []
    for rows in torch.arange(len(data["pixels"])).split(batch):
        views = batch_of(data, rows, patch)
        logits, vectors = heads(vision_encoder, views.pictures.to(vision_encoder.device))
        there = views.kinds > 0
        votes = torch.einsum("bmhw,bkhw->bmk", views.shares, logits.softmax(1)[:, 1:].cpu())
        kinds.append(votes.argmax(-1)[there] == views.kinds[there] - 1)
        turned = torch.einsum("bmhw,bvhw->bmv", views.shares, vectors.cpu())
        hues.append(is_near(turned, views.hues)[there])
    return {"view_kind": share(kinds), "view_hue": share(hues)}


@torch.inference_mode()
def measure_readings(
    model: TrainedModel, heads: ReadingHeads, readings: Readings, batch: int
) -> dict[str, float]:
    """Shares of right answers.

    ``kind``, ``hue``: of references, the hue within NEAR degrees; ``source_kinds``: of sources, all
    kinds right; ``asked``: what is asked for; ``named_kinds``, ``named_hues``: all such words of an
    instruction, and no others. ``cells``: the share of the cells' variance between pictures that
    the answers explain.
    """
    errors, cells = [], []
    right: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(readings)).split(batch):
        read, truth = readings.read(rows.tolist())
        answers, shown = heads(read_states(model, read)), truth.is_reference
        are_words = (answers["words"] > 0) == truth.words
        are_kinds = (answers["kinds"] > 0) == truth.kinds
        for name, each in {
            "kind": (answers["kind"].argmax(-1) == truth.kind)[shown],
            "hue": is_near(answers["hue"], truth.hue)[shown],
            "source_kinds": are_kinds.all(-1)[~shown],
            "asked": answers["asked"].argmax(-1) == truth.asked,
            "named_kinds": are_words[:, KIND_WORDS].all(-1),
            "named_hues": are_words[:, HUE_WORDS].all(-1),
        }.items():
            right.setdefault(name, []).append(each)
        errors.append(answers["cells"] - truth.cells)
        cells.append(truth.cells)
    unexplained = torch.cat(errors).square().mean() / torch.cat(cells).var(0, correction=0).mean()
    shares = {name: share(several) for name, several in right.items()}
    return shares | {"cells": 1 - unexplained.item()}


def is_near(found: Tensor, truth: Tensor) -> Tensor:
    """Whether vectors [..., v] point within NEAR degrees of unit vectors."""
    cosine = (F.normalize(found, dim=-1) * truth).sum(-1)
    return cosine > torch.tensor(NEAR).deg2rad().cos()


def share(several: list[Tensor]) -> float:
    """Of what is true."""
    return torch.cat(several).float().mean().item()


@torch.inference_mode()
def collapse(model: TrainedModel, vision: Tensor, latents: Tensor) -> dict[str, float]:
    """What tells of a conditioning that has died in silence; see :func:`deviations`.

    Args:
        vision: [r, 3, h, w], what the vision encoder reads of several pictures.
        latents: unscaled, [r, c, h, w].
    """
    return deviations(model.fuse(vision, latents))


def deviations(vectors: Tensor) -> dict[str, float]:
    """How much of what the fusion says, [r, q, d], differs from picture to picture, and within one.

    Both are deviations over that of all vectors, from 0 to 1. Near 0, all pictures mean the same
    ("between_pictures"), or all queries say the same of a picture ("between_queries").
    """
    total = vectors.flatten(0, 1).var(0, correction=0).mean().clamp_min(1e-12)
    each = {"between_pictures": 0, "between_queries": 1}
    return {
        name: (vectors.var(axis, correction=0).mean() / total).sqrt().item()
        for name, axis in each.items()
    }
