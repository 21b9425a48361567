"""Measures of an output: pure functions on pictures and unit vectors, for hands to check.

Pictures are RGB; masks are bool [h, w] of a picture's size, True inside.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagelab.io.images import mask_window

LEAST_LENGTH = 1e-6  # of a difference of features, below which it has no direction


# ----------------------------------------------------------------------------------------------
# pixels


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture at this size (width, height), bicubic where it has another."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def distances(
    first: Image.Image, second: Image.Image, inside: np.ndarray | None = None
) -> tuple[float, float] | None:
    """L1 and L2 of two pictures of one size: means of |a − b| and of (a − b)², values in [0, 1].

    Over all pixels and channels, or over the pixels inside alone; None where there are none.
    """
    one, two = (np.asarray(picture, np.float64) / 255 for picture in (first, second))
    apart = (one - two) if inside is None else (one - two)[inside]
    if not apart.size:
        return None
    return float(np.abs(apart).mean()), float((apart**2).mean())


def cut_out(
    picture: Image.Image, inside: np.ndarray, box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """Black outside, cropped to a box (left, top, right, bottom); None: of the mask."""
    if box is None:
        down, across = mask_window(inside)
        box = across.start, down.start, across.stop, down.stop
    return _black(picture, ~inside).crop(box)


def fill(picture: Image.Image, inside: np.ndarray) -> Image.Image:
    """Black inside, uncropped."""
    return _black(picture, inside)


def _black(picture: Image.Image, where: np.ndarray) -> Image.Image:
    pixels = np.array(picture)
    pixels[where] = 0
    return Image.fromarray(pixels)


# ----------------------------------------------------------------------------------------------
# what encoders read


def middle(picture: Image.Image, resize: int, side: int) -> Image.Image:
    """The shorter side becomes ``resize``, bicubic; then the middle square of ``side``."""
    width, height = picture.size
    short = min(width, height)
    size = (
        resize if width == short else int(resize * width / short),
        resize if height == short else int(resize * height / short),
    )
    picture = fit(picture, size)
    left, top = (round((edge - side) / 2) for edge in size)
    return picture.crop((left, top, left + side, top + side))


def normalised(picture: Image.Image, mean: tuple, deviation: tuple) -> Tensor:
    """float32 [3, h, w]."""
    pixels = torch.from_numpy(np.array(picture, np.float32) / 255)
    return ((pixels - torch.tensor(mean)) / torch.tensor(deviation)).permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------
# features


def mean_cosine(one: Tensor, several: Tensor) -> float:
    """The mean cosine of a unit vector [d] with others [n, d]."""
    return (several @ one).mean().item()


def direction(output: Tensor, source: Tensor, wanted: Tensor, caption: Tensor) -> float | None:
    """CLIP's direction: the cosine of output − source (pictures) and wanted − caption (texts).

    All are unit vectors [d]. 0 where the output is the source; None where the texts are equal.
    """
    change, asked = output - source, wanted - caption
    if asked.norm() < LEAST_LENGTH:
        return None
    if change.norm() < LEAST_LENGTH:
        return 0.0
    return F.cosine_similarity(change, asked, dim=0).item()
