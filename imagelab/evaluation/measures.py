"""Measures of a picture with boxes: pure functions on arrays, whose numbers a person can check."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagelab.boxes import Box, box_mask, raster
from imagelab.errors import UserError
from imagelab.io.images import mask_window

LEAST_CONTRAST = 0.1  # of an object to the background, as a distance of RGB colours in [0, 1]
CLEAR = 6.0  # how many times the usual spread of the background an object differs from it


def mask_crops(picture: Image.Image, masks: Sequence[np.ndarray]) -> list[Image.Image]:
    """The bounding box of each mask, bool [H, W] of the picture's size."""
    windows = map(mask_window, masks)
    return [picture.crop((x.start, y.start, x.stop, y.stop)) for y, x in windows]


def crop(picture: Image.Image, box: Box) -> Image.Image:
    """The part of a picture that is inside a box."""
    down, across = raster(box, picture.height, picture.width)
    return picture.crop((across.start, down.start, across.stop, down.stop))


def confusion(own: Sequence[int], similarities: Sequence[Sequence[float]]) -> np.ndarray:
    """Counts [n, n]: crops of instance i (``own``) that are nearest to instance j.

    similarities: of each crop with all n instances.
    """
    counts = np.zeros((len(similarities[0]),) * 2, dtype=int)
    np.add.at(counts, (list(own), np.argmax(similarities, axis=1)), 1)
    return counts


def margins(own: Sequence[int], similarities: Sequence[Sequence[float]]) -> list[float]:
    """Each crop's similarity with its own instance, less that with the nearest other one."""
    rows = np.array(similarities, dtype=float)
    each = np.arange(len(own))
    mine = rows[each, list(own)]
    rows[each, list(own)] = -np.inf
    return (mine - rows.max(axis=1)).tolist()


def objects_by_colour(picture: Image.Image, boxes: Sequence[Box]) -> np.ndarray:
    """Bool [H, W], True where a colour is far from the background's.

    The background's colour is the median outside the boxes. Far is more than :data:`CLEAR` times
    the median distance from it out there, and more than :data:`LEAST_CONTRAST`.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=float) / 255
    outside = outside_of(boxes, pixels.shape[:2])
    distance = np.linalg.norm(pixels - np.median(pixels[outside], axis=0), axis=-1)
    return distance > max(LEAST_CONTRAST, CLEAR * np.median(distance[outside]))


def layout(objects: np.ndarray, boxes: Sequence[Box]) -> tuple[list[float], float | None]:
    """The IoU for each box, and the leakage (None without any object).

    objects: bool [H, W]. The object of a box is the connected component with most pixels in it.
    """
    from scipy import ndimage

    parts, _ = ndimage.label(objects)  # [H, W], 0 for the background
    windows = ndimage.find_objects(parts)  # of part 1, 2, …
    ious = []
    for box in boxes:
        window = raster(box, *objects.shape)
        counts = np.bincount(parts[window].ravel())
        counts[0] = 0
        if not counts.any():
            ious.append(0.0)
            continue
        ious.append(_iou(windows[counts.argmax() - 1], window))
    outside = objects & ~_union(boxes, objects.shape)
    return ious, float(outside.sum() / objects.sum()) if objects.any() else None


def outside_of(boxes: Sequence[Box], shape: tuple[int, int]) -> np.ndarray:
    """Bool of this shape [H, W], True outside all boxes; a UserError where nothing is."""
    outside = ~_union(boxes, shape)
    if not outside.any():
        raise UserError("the boxes cover the whole picture; leave some background to compare with")
    return outside


def _union(boxes: Sequence[Box], shape: tuple[int, int]) -> np.ndarray:
    inside = np.zeros(shape, dtype=bool)
    for box in boxes:
        inside |= box_mask(box, *shape)
    return inside


def _iou(first: Sequence[slice], second: Sequence[slice]) -> float:
    """Intersection over union of two windows (rows, columns)."""
    pairs = zip(first, second, strict=True)
    shared = _area([slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs])
    return shared / (_area(first) + _area(second) - shared)


def _area(window: Sequence[slice]) -> int:
    return math.prod(max(0, side.stop - side.start) for side in window)


def diversity(features: Sequence[Sequence[float]]) -> float | None:
    """Mean 1 − cosine of all pairs of unit vectors [b, d]; None for fewer than two."""
    count = len(features)
    if count < 2:
        return None
    similarities = np.asarray(features) @ np.asarray(features).T
    off_diagonal = similarities.sum() - np.trace(similarities)
    return float(1 - off_diagonal / (count * (count - 1)))
