"""What the classifier sees in a picture: in boxes, one by one, and in the scene as a whole.

Axes: b boxes, k kinds, r rows and c columns of the classifier's cells.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from toybox.classifier.boxes import Edges, Seen, covered, mean_hue, read_boxes
from toybox.classifier.network import SCENE, Classifier, to_input
from toybox.scenes.layouts import hue_distance
from toybox.scenes.toys import KINDS, Look


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
            area, float((weights * squares).sum()) / max(area, 1e-9), mean_hue(share, self.vectors)
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
            across = covered((left, right), columns) > 0
            down = covered((top, bottom), rows) > 0
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
