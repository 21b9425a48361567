"""What the classifier sees in a picture: in boxes, one by one, and in the scene as a whole.

Axes: b boxes, k kinds, r rows and c columns of the classifier's cells.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from toybox.classifier.network import CROP, SCENE, Classifier, to_input, to_tensor
from toybox.scenes.layouts import hue_distance
from toybox.scenes.toys import KINDS, Look

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


class Found(NamedTuple):
    """Where a toy of some look is in a scene.

    Attributes:
        area: the share of the picture that it covers.
        spread: the mean square of the distance from its middle, over its area: it is the same at
            all sizes, and grows where a toy is there twice.
        hue: in degrees.
    """

    area: float
    spread: float
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
        inside = _covered(edges[[1, 3]] / side, share.shape[1])[:, None] * _covered(
            edges[[0, 2]] / side, share.shape[2]
        )  # r c
        covers = (share * inside).sum((1, 2)) / inside.sum()
        kind = int(covers.argmax())
        found.append(Seen(KINDS[kind], float(covers[kind]), _hue(share.sum(0) * inside, vector)))
    return found


def _window(box: Edges, size: tuple[int, int]) -> Edges:
    """The square around a box, in pixels."""
    width, height = size
    left, top, right, bottom = np.multiply(box, (width, height, width, height))
    side = min(WINDOW * max(right - left, bottom - top), width, height)
    x = float(np.clip((left + right - side) / 2, 0, width - side))
    y = float(np.clip((top + bottom - side) / 2, 0, height - side))
    return x, y, x + side, y + side


def _covered(edges: Sequence[float], cells: int) -> np.ndarray:
    """How much of each of so many cells, which share 0 to 1, lies between two numbers."""
    low, high = edges
    bounds = np.arange(cells + 1) / cells
    return (np.minimum(bounds[1:], high) - np.maximum(bounds[:-1], low)).clip(0) * cells


def _hue(weights: np.ndarray, vectors: np.ndarray) -> float:
    """Degrees of the mean of vectors [2, r, c] with weights [r, c]."""
    cosine, sine = (vectors * weights).sum((1, 2))
    return float(np.rad2deg(np.arctan2(sine, cosine)) % 360)


class Sight(NamedTuple):
    """A scene as the classifier sees it: the kinds' shares [k, r, c], and hue vectors [2, r, c]."""

    kinds: np.ndarray
    vectors: np.ndarray

    def find(self, look: Look, others: Sequence[Look] = ()) -> Found:
        """A toy: of cells of its kind those whose hue is nearer to its own than to others'.

        Args:
            others: looks of the other toys in the scene.
        """
        share = self.kinds[KINDS.index(look.kind)]
        hues = np.rad2deg(np.arctan2(self.vectors[1], self.vectors[0]))
        for other in others:
            if other.kind == look.kind:
                share = share * (hue_distance(hues, look.hue) < hue_distance(hues, other.hue))
        rows, columns = share.shape
        weights = share / max(float(share.sum()), 1e-9)
        down, across = np.meshgrid(
            (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij"
        )
        middle = (weights * down).sum(), (weights * across).sum()
        squares = (down - middle[0]) ** 2 + (across - middle[1]) ** 2
        area = float(share.mean())
        return Found(
            area, float((weights * squares).sum()) / max(area, 1e-9), _hue(share, self.vectors)
        )

    def toys(self, size: tuple[int, int]) -> np.ndarray:
        """How much of each pixel is of a toy, [height, width], 0 to 1."""
        share = Image.fromarray(self.kinds.sum(0))
        return np.asarray(share.resize(size, Image.Resampling.BILINEAR)).clip(0, 1)

    def area_besides(self, kinds: Sequence[str] = (), boxes: Sequence[Edges] = ()) -> float:
        """The share of the picture that toys cover, without some kinds and what is in boxes.

        Boxes count with the cells that they touch.
        """
        share = self.kinds[[kind not in kinds for kind in KINDS]].sum(0)
        rows, columns = share.shape
        outside = np.ones_like(share)
        for left, top, right, bottom in boxes:
            across = _covered((left, right), columns) > 0
            down = _covered((top, bottom), rows) > 0
            outside[np.ix_(down, across)] = 0
        return float((share * outside).mean())


class View:
    """A picture, of which the classifier sees the scene once."""

    def __init__(self, classifier: Classifier, picture: Image.Image):
        self.classifier, self.picture = classifier, picture.convert("RGB")

    @cached_property
    def scene(self) -> Sight:
        """The whole picture."""
        with torch.inference_mode():
            # 1 1+k r c, 1 2 r c
            logits, vectors = self.classifier(to_input([self.picture], SCENE))
        return Sight(logits[0].softmax(0)[1:].numpy(), vectors[0].numpy())

    def read(self, boxes: Sequence[Edges]) -> list[Seen]:
        """What is in each box."""
        return read_boxes(self.classifier, self.picture, boxes)
