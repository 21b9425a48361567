"""What the classifier sees in boxes of a picture.

Axes: b boxes, k kinds, r rows and c columns of the classifier's cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from toybox.classifier.network import CROP, Classifier, to_tensor
from toybox.scenes.toys import KINDS

Edges = tuple[float, float, float, float]  # left, top, right, bottom, in fractions of the picture
WINDOW = 1.25  # side of what is seen of a box, over the box's longer side


class Seen(NamedTuple):
    """What is in a box.

    Attributes:
        cover: the share of the box that the kind covers.
        hue: of the toys in it, in degrees.
    """

    kind: str
    cover: float
    hue: float


@torch.inference_mode()
def read_boxes(classifier: Classifier, picture: Image.Image, boxes: Sequence[Edges]) -> list[Seen]:
    """The kind that covers most of each box, how much of it, and the hue in it.

    The classifier reads a square window that is a little larger than the box, as it was trained to
    see toys; then the cells of the window count as far as they are inside the box.
    """
    if not boxes:
        return []
    windows = [_window(box, picture.size) for box in boxes]
    crops = [
        picture.convert("RGB").resize((CROP, CROP), Image.Resampling.BILINEAR, window)
        for window in windows
    ]
    logits, vectors = classifier(to_tensor(crops))  # b 1+k r c, b 2 r c
    shares = logits.softmax(1)[:, 1:].numpy()  # b k r c, without the background
    found = []
    for box, window, share, vector in zip(boxes, windows, shares, vectors.numpy(), strict=True):
        side = window[2] - window[0]
        edges = np.multiply(box, (*picture.size, *picture.size)) - np.tile(window[:2], 2)
        inside = covered(edges[[1, 3]] / side, share.shape[1])[:, None] * covered(
            edges[[0, 2]] / side, share.shape[2]
        )  # r c
        covers = (share * inside).sum((1, 2)) / inside.sum()
        kind = int(covers.argmax())
        hue = mean_hue(share.sum(0) * inside, vector)
        found.append(Seen(KINDS[kind], float(covers[kind]), hue))
    return found


def _window(box: Edges, size: tuple[int, int]) -> Edges:
    """The square around a box, in pixels."""
    width, height = size
    left, top, right, bottom = np.multiply(box, (width, height, width, height))
    side = min(WINDOW * max(right - left, bottom - top), width, height)
    x = float(np.clip((left + right - side) / 2, 0, width - side))
    y = float(np.clip((top + bottom - side) / 2, 0, height - side))
    return x, y, x + side, y + side


def covered(edges: Sequence[float], cells: int) -> np.ndarray:
    """How much of each of so many cells, which share 0 to 1, lies between two numbers."""
    low, high = edges
    bounds = np.arange(cells + 1) / cells
    return (np.minimum(bounds[1:], high) - np.maximum(bounds[:-1], low)).clip(0) * cells


def mean_hue(weights: np.ndarray, vectors: np.ndarray) -> float:
    """Degrees of the mean of vectors [2, r, c] with weights [r, c]."""
    cosine, sine = (vectors * weights).sum((1, 2))
    return float(np.rad2deg(np.arctan2(sine, cosine)) % 360)
