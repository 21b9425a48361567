"""A small classifier of toys: which kinds are in a picture, how much of it, and of what hue.

It answers for every cell of 8×8 pixels, so that one network judges crops of 64 pixels and whole
scenes of 96, finds the toys in them, and compares them. ``toybox.classifier.train`` trains it.

Axes: b batch, k kinds, r rows and c columns of cells.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from imagelab.errors import UserError
from toybox.scenes.toys import HUES, KINDS

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
CROP, SCENE, CELL = 64, 96, 8  # sides in pixels: a crop, a whole scene, a cell
GROUPS = 8  # of channels, which are normed together
_PRESENT = 0.01  # share of a picture that a toy covers at least


class Reading(NamedTuple):
    """What the classifier sees.

    Attributes:
        areas: [b, k] share of the picture that each kind covers, in the order of ``KINDS``.
        hues: [b, k] hue of that kind's toys, in degrees.
        hue: [b] hue of all toys together, in degrees.
    """

    areas: Tensor
    hues: Tensor
    hue: Tensor

    def among(self, kinds: Sequence[str]) -> "Reading":
        """The same with no area for any kind but these: what it sees if there can be no other."""
        possible = torch.tensor([kind in kinds for kind in KINDS], device=self.areas.device)
        return self._replace(areas=self.areas * possible)

    def kind(self) -> Tensor:
        """[b] index of the kind that covers most."""
        return self.areas.argmax(dim=1)

    def present(self, count: int) -> list[set[str]]:
        """Names of the up to ``count`` kinds that cover most, and enough to be seen."""
        top = self.areas.topk(count, dim=1)
        return [
            {KINDS[index] for area, index in zip(*row, strict=True) if area > _PRESENT}
            for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def hue_distance(first: Tensor, second: Tensor) -> Tensor:
    """Angle between hues, in degrees from 0 to 180."""
    return ((first - second + 180) % 360 - 180).abs()


def hue_names(hues: Tensor) -> list[str]:
    """The nearest named hue of each, [b] in degrees."""
    named = torch.tensor(list(HUES.values()), dtype=hues.dtype, device=hues.device)
    nearest = hue_distance(hues[:, None], named).argmin(dim=1)
    return [list(HUES)[index] for index in nearest.tolist()]


def to_input(pictures: list[Image.Image], side: int) -> Tensor:
    """RGB pictures of any size as [b, 3, side, side] in [-1, 1].

    ``side`` is :data:`CROP` for crops around one toy, :data:`SCENE` for whole scenes.
    """
    resized = [np.asarray(p.convert("RGB").resize((side, side), Image.BILINEAR)) for p in pictures]
    return to_tensor(resized)


def to_tensor(pictures: Sequence) -> Tensor:
    """RGB pictures of one size as float [b, 3, h, w] in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Classifier(nn.Module):
    """Convolutions from pictures [b, 3, 8·r, 8·c] to cells."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 4, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            *(_Residual(width) for _ in range(3)),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
        )
        self.kinds = nn.Conv2d(width, 1 + len(KINDS), 1)  # the first is the background
        self.hue = nn.Conv2d(width, 2, 1)  # cosine and sine

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, 1 + k, r, c] and hue vectors [b, 2, r, c]."""
        hidden = self.body(pictures)
        return self.kinds(hidden), self.hue(hidden)

    @torch.inference_mode()
    def read(self, pictures: Tensor) -> Reading:
        """Kinds and hues in pictures, [b, 3, h, w] in [-1, 1] (see :func:`to_input`)."""
        answers = zip(*(self(part) for part in pictures.split(64)), strict=True)
        logits, vectors = (torch.cat(parts) for parts in answers)
        shares = logits.softmax(dim=1)[:, 1:].flatten(2)  # [b, k, n], n = r·c
        cosine, sine = torch.einsum("bkn,bvn->vbk", shares, vectors.flatten(2))
        hues = torch.atan2(sine, cosine).rad2deg() % 360
        hue = torch.atan2(sine.sum(1), cosine.sum(1)).rad2deg() % 360
        return Reading(shares.mean(dim=2), hues, hue)


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier, float32, on the CPU."""
    if not path.is_file():
        raise UserError(
            f"there are no weights at {path}; train them: "
            f"python -m toybox.classifier.train --output {path}"
        )
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    classifier = Classifier(weights["kinds.weight"].shape[1])
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False)


@cache
def classifier_digest() -> str:
    """SHA-256 of the trained classifier, for keys of what depends on its judgement."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
