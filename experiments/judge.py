"""Which toys a picture shows, as the classifier sees them: right in their boxes, or there at all.

A toy is the right one if its kind is right, and covers at least FILLED of its box, and its hue is
nearest to its own among the hues of the photo, and at most CLOSE degrees from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagelab.boxes import Box
from toybox.classifier.network import (
    CROP,
    SCENE,
    Classifier,
    hue_distance,
    to_input,
    to_tensor,
)
from toybox.scenes.toys import KINDS, Look

CLOSE = 25.0  # degrees
FILLED = 0.1  # share of a box; thin toys that fill theirs cover 0.13 or more
WINDOW = 1.25  # side of what is seen of a box, over the box's longer side
PRESENT = 0.015  # share of a picture that an instance covers at least to be there


@dataclass(frozen=True)
class Judged:
    """What is in a box.

    Attributes:
        cover: the share of the box that the kind covers.
        error: degrees from the hue it should have.
    """

    kind: str
    cover: float
    hue: float
    error: float
    is_right: bool


@torch.inference_mode()
def judge_boxes(
    classifier: Classifier,
    picture: Image.Image,
    boxes: Sequence[Box],
    own: Sequence[int],
    looks: Sequence[Look],
) -> list[Judged]:
    """What is in each box of a picture.

    Args:
        own: for each box, the index of its instance in ``looks``, all those of the photo.
    """
    judged = []
    for box, index in zip(boxes, own, strict=True):
        kind, cover, hue = read_box(classifier, picture, box)
        errors = hue_distance(torch.tensor(hue), torch.tensor([look.hue for look in looks]))
        error = errors[index].item()
        is_own = kind == looks[index].kind and cover >= FILLED
        is_right = is_own and error <= min(errors.min().item(), CLOSE)
        judged.append(Judged(kind, cover, hue, error, is_right))
    return judged


def read_box(classifier: Classifier, picture: Image.Image, box: Box) -> tuple[str, float, float]:
    """The kind that covers most of a box, the share that it covers, and the hue in it, in degrees.

    The classifier reads a square window that is a little larger than the box, as it was trained to
    see toys; then the cells of the window count as far as they are inside the box.
    """
    width, height = picture.size
    x0, x1, y0, y1 = box.x0 * width, box.x1 * width, box.y0 * height, box.y1 * height
    side = min(WINDOW * max(x1 - x0, y1 - y0), width, height)
    left = min(max((x0 + x1 - side) / 2, 0), width - side)
    top = min(max((y0 + y1 - side) / 2, 0), height - side)
    window = (left, top, left + side, top + side)
    seen = picture.convert("RGB").resize((CROP, CROP), Image.Resampling.BILINEAR, window)
    logits, vectors = classifier(to_tensor([seen]))  # 1 1+k r c, 1 2 r c
    shares = logits[0].softmax(0)[1:]  # k r c, without the background
    across = _covered((x0 - left) / side, (x1 - left) / side, shares.shape[2])
    down = _covered((y0 - top) / side, (y1 - top) / side, shares.shape[1])
    inside = down[:, None] * across  # r c
    shares = shares * inside
    cosine, sine = (vectors[0] * shares.sum(0)).sum((1, 2))
    covers = shares.sum((1, 2)) / inside.sum()
    kind = covers.argmax()
    hue = torch.atan2(sine, cosine).rad2deg().item() % 360
    return KINDS[kind], covers[kind].item(), hue


def _covered(low: float, high: float, cells: int) -> Tensor:
    """How much of each of so many cells, which share 0 to 1, lies between two numbers."""
    edges = torch.arange(cells + 1) / cells
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * cells


@torch.inference_mode()
def find_instances(
    classifier: Classifier, pictures: Sequence[Image.Image], looks: Sequence[Look]
) -> np.ndarray:
    """Bool [pictures, instances]: which instances of a photo are anywhere in each picture.

    A cell of the classifier shows an instance as far as it sees its kind, if its hue is nearest to
    the instance's own among those of the instances of this kind, and at most CLOSE degrees from it.
    """
    logits, vectors = classifier(to_input(list(pictures), SCENE))  # b 1+k r c, b 2 r c
    kinds = logits.softmax(1)[:, 1:]  # b k r c, without the background
    hues = torch.atan2(vectors[:, 1], vectors[:, 0]).rad2deg() % 360  # b r c
    shares = [
        (kinds[:, KINDS.index(look.kind)] * _is_hue_of(look, hues, looks)).mean((1, 2))
        for look in looks
    ]
    return (torch.stack(shares, 1) >= PRESENT).numpy()


def _is_hue_of(own: Look, hues: Tensor, looks: Sequence[Look]) -> Tensor:
    """Bool [b, r, c], the cells whose hue is an instance's."""
    error = hue_distance(hues, torch.tensor(float(own.hue)))
    is_own = error <= CLOSE
    for look in looks:
        if look.kind == own.kind and look != own:
            is_own &= error < hue_distance(hues, torch.tensor(float(look.hue)))
    return is_own
