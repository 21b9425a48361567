"""Pictures as MIGE's encoders read them.

Sizes of PIL pictures are (width, height); tensors are float32 [3, height, width].
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagelab.errors import UserError
from imagelab.io.images import MAX_PIXELS, in_pixels

#: CLIP's (Radford et al., arXiv 2103.00020), of the vision encoder.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture, scaled by the least factor that covers a size.

    The side that covers exactly gets its size, the other is rounded down, as in training.

    Raises UserError for a picture so long and narrow that it could not be scaled.
    """
    own_width, own_height = picture.size
    if own_width * height <= own_height * width:
        size = width, max(height, int(own_height * width / own_width))
    else:
        size = max(width, int(own_width * height / own_height)), height
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"a picture of {in_pixels(picture.size)} is too long and narrow to be scaled to "
            f"{width} x {height}; crop it first"
        )
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def letterbox(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture, as large as it fits, in the middle of a black one."""
    across, down = width / picture.width, height / picture.height
    if across <= down:
        size = width, max(1, math.floor(picture.height * across))
    else:
        size = max(1, math.floor(picture.width * down)), height
    canvas = Image.new("RGB", (width, height))
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, h, w] from -1 to 1, as the autoencoder reads it."""
    return _to_unit(picture) / 0.5 - 1


def to_vision(picture: Image.Image, side: int) -> Tensor:
    """An RGB picture squeezed into a square, float32 [3, side, side], as the ViT reads it."""
    pixels = _to_unit(picture.resize((side, side), Image.Resampling.BICUBIC))
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def _to_unit(picture: Image.Image) -> Tensor:
    """float32 [3, h, w] from 0 to 1."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)
