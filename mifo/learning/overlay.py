"""The masks on the photo, as they were read, to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imagelab.boxes import Box, color_of, draw_boxes
from imagelab.io.atomic import written_aside
from imagelab.io.images import mask_window
from mifo.learning.config import LearningConfig
from mifo.learning.instance import Instance
from mifo.tokens import asset_token

MASKS = "masks.png"  # the picture in a learned folder


def draw_masks(photo: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """The photo with each mask in its colour, framed and with the name of its asset.

    masks: bool [H, W] of the photo's size, each with a pixel inside.
    """
    pixels = np.array(photo.convert("RGB"), dtype=np.float32)
    width, height = photo.size
    frames = []
    for index, mask in enumerate(masks):
        pixels[mask] = 0.45 * pixels[mask] + 0.55 * np.array(color_of(index), np.float32)
        down, across = mask_window(mask)
        frames.append(
            Box(across.start / width, down.start / height, across.stop / width, down.stop / height)
        )
    names = [asset_token(index) for index in range(len(frames))]
    return draw_boxes(Image.fromarray(pixels.astype(np.uint8)), frames, names)


def draw_instance(instance: Instance) -> Image.Image:
    """The photo of an instance folder, at the size that is worked on, with its masks."""
    return draw_masks(Image.fromarray(instance.image), instance.masks)


def write_preview(config: LearningConfig, instance: Instance) -> Path:
    """Write the picture that a dry run leaves, beside where the learned folder goes."""
    path = Path(config.output_dir) / f"{config.instance}.{MASKS}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        draw_instance(instance).save(aside, "PNG")
    return path
