"""An instance folder: one picture, and one mask for each thing in it that is to be learned.

A folder holds `img.jpg` (or `img.jpeg`, `img.png`, `img.webp`) and `mask0.png … maskN-1.png`;
`mask{i}` defines the token `<asset{i}>`. Everything is read and checked here, without
torch and before any model is loaded. Sizes are (width, height), arrays are [height, width].
"""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from imagelab.errors import UserError
from imagelab.io.images import (
    MAX_ASPECT,
    Picture,
    in_pixels,
    open_picture,
    resize_mask,
    working_size,
)

log = logging.getLogger(__name__)

IMAGE_NAMES = ("img.jpg", "img.jpeg", "img.png", "img.webp")
MASK_NAME = re.compile(r"mask([0-9]+)\.png")
STRAY_MASK_NAME = re.compile(r"mask[0-9]+\.(png|jpe?g|webp|bmp|gif|tiff?)", re.IGNORECASE)

MIN_SIDE = 64  # pixels
VISIBLE_DISTORTION = 0.1  # a change of width over height by more than this is worth a note
SMALL_MASK = 0.005  # a mask below this fraction of the picture is worth a note


@dataclass(frozen=True, eq=False)
class Instance:
    """What an instance folder holds, at the size the model works at.

    image: uint8 [H, W, 3], sRGB, EXIF orientation applied; masks: bool [N, H, W], True inside.
    source_size: (width, height) of the picture as viewers show it, before resizing.
    mask_hashes, image_hash: sha256 of the files' bytes, hexadecimal.
    notes: sentences on what is allowed but worth knowing; they were logged as warnings.
    """

    name: str
    folder: Path
    image: np.ndarray
    masks: np.ndarray
    source_size: tuple[int, int]
    mask_hashes: tuple[str, ...]
    image_hash: str
    notes: tuple[str, ...]


def read_instance(
    folder: Path, resolution: int, multiple: int, resize: Literal["aspect", "squash"] = "aspect"
) -> Instance:
    """Read and check `folder`, resized as `working_size` says; nothing is ever cropped.

    Raises UserError for anything that cannot be learned from, with the file and what to do.
    """
    folder = Path(folder)
    image_path, mask_paths = find_files(folder)
    picture = open_picture(image_path)
    source_size = picture.size
    if min(source_size) < MIN_SIDE:
        raise UserError(
            f"{image_path} is {in_pixels(source_size)}, which is too small; "
            f"use a picture of at least {MIN_SIDE} pixels a side"
        )
    size = working_size(source_size, resolution, multiple, resize)
    masks, mask_hashes = [], []
    for path in mask_paths:
        mask = open_picture(path)
        _check_mask_size(mask, picture)
        masks.append(resize_mask(mask.as_mask(), size))
        mask_hashes.append(mask.sha256)
    _check_distinct(masks, mask_paths)

    notes = _notes(picture, size, masks, mask_paths)
    for note in notes:
        log.warning("%s", note)
    return Instance(
        name=folder.absolute().name,
        folder=folder,
        image=np.array(picture.as_rgb().resize(size, Image.Resampling.LANCZOS)),
        masks=np.stack(masks),
        source_size=source_size,
        mask_hashes=tuple(mask_hashes),
        image_hash=picture.sha256,
        notes=notes,
    )


def list_instances(folder: Path) -> list[str]:
    """The names of the sub-folders of `folder` that hold an image and a mask0.png, sorted.

    Hidden folders are left out: an instance that is being saved lies in one for a while.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; give the folder that holds the instance folders"
        )
    return sorted(
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and (path / "mask0.png").is_file()
        and any((path / name).is_file() for name in IMAGE_NAMES)
    )


def coverage_report(instance: Instance) -> str:
    """Sizes, each mask's share of the picture, and overlaps between masks; one line each."""
    height, width = instance.image.shape[:2]
    sizes = in_pixels(instance.source_size), in_pixels((width, height))
    lines = [f"{instance.name}: {sizes[0]}, worked on at {sizes[1]}"]
    for i, mask in enumerate(instance.masks):
        lines.append(f"mask{i} covers {100 * mask.mean():.3g}% of the picture")
    for (i, a), (j, b) in itertools.combinations(enumerate(instance.masks), 2):
        shared = (a & b).sum()
        if shared:
            share = shared / min(a.sum(), b.sum())
            lines.append(f"mask{i} and mask{j} share {100 * share:.3g}% of the smaller")
    return "\n".join(lines)


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The picture and the masks of an instance folder; a UserError says what is missing."""
    if not folder.is_dir():
        found = ", ".join(list_instances(folder.parent)) or "none"
        raise UserError(
            f"there is no instance folder {folder}; the instances in {folder.parent} are: {found}"
        )
    return find_image(folder), find_masks(folder)


def find_image(folder: Path) -> Path:
    """The one picture of an instance folder; img.jpg goes before its other spellings."""
    found = [folder / name for name in IMAGE_NAMES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} holds no img.jpg; save the picture under that name")
    if len(found) > 1 and found[0].name != IMAGE_NAMES[0]:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} holds several pictures ({names}); keep one of them")
    return found[0]


def find_masks(folder: Path) -> list[Path]:
    """The mask files in numeric order, checked to be mask0.png, mask1.png, … without a gap."""
    masks: dict[int, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        match = MASK_NAME.fullmatch(path.name)
        if match is None:
            if STRAY_MASK_NAME.fullmatch(path.name):
                raise UserError(f"{path} is not a .png; save it as {path.stem.lower()}.png")
            continue
        number = int(match[1])
        if number in masks:
            names = f"{masks[number].name} and {path.name}"
            raise UserError(f"{folder} holds two masks of number {number} ({names}); keep one")
        masks[number] = path
    if not masks:
        raise UserError(f"{folder} holds no mask; save one per instance as mask0.png, mask1.png …")
    for i in range(len(masks)):
        if i not in masks:
            raise UserError(
                f"{folder / f'mask{i}.png'} is missing although there is a mask{max(masks)}.png; "
                f"number the masks from 0 without a gap"
            )
    return [masks[i] for i in range(len(masks))]


def _check_mask_size(mask: Picture, picture: Picture) -> None:
    if mask.size == picture.size:
        return
    shown = f"{mask.path} is {in_pixels(mask.size)}, {picture.path.name}"
    if mask.size == picture.stored_size:
        raise UserError(
            f"{shown} has an EXIF rotation and is {in_pixels(picture.size)} as viewers show it; "
            f"save the mask in that orientation"
        )
    raise UserError(f"{shown} is {in_pixels(picture.size)}; make the mask the size of the picture")


def _check_distinct(masks: list[np.ndarray], paths: list[Path]) -> None:
    for (i, a), (j, b) in itertools.combinations(enumerate(masks), 2):
        if np.array_equal(a, b):
            raise UserError(
                f"{paths[i]} and {paths[j].name} mark the same pixels; "
                f"give each instance its own mask or remove one"
            )


def _notes(
    picture: Picture, size: tuple[int, int], masks: list[np.ndarray], paths: list[Path]
) -> tuple[str, ...]:
    """What is allowed but worth knowing, one sentence each."""
    notes = []
    name, (width, height) = picture.path.name, picture.size
    if picture.was_turned:
        notes.append(
            f"{name} has an EXIF rotation, which was applied: its masks must match the picture "
            f"as viewers show it"
        )
    change = (size[0] / size[1]) / (width / height)
    long_over_short = max(width, height) / min(width, height)  # 1280 x 853 is a hair over 3 : 2
    if long_over_short > 1.01 * MAX_ASPECT or abs(change - 1) > VISIBLE_DISTORTION:
        notes.append(
            f"{name} is {in_pixels((width, height))} and is squeezed to {in_pixels(size)}; nothing "
            "is cropped: crop it and its masks together if that distorts too much"
        )
    if picture.has_alpha:
        notes.append(f"{name} has an alpha channel: white was put behind its transparent places")
    for path, mask in zip(paths, masks, strict=True):
        if mask.all():
            notes.append(f"{path.name} covers the whole picture: nothing is left as background")
        elif mask.mean() < SMALL_MASK:
            notes.append(
                f"{path.name} covers only {100 * mask.mean():.3g}% of the picture: "
                f"an instance that small can hardly be learned"
            )
    return tuple(notes)
