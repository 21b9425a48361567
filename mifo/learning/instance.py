"""An instance folder: one picture, and one mask for each thing in it that is to be learned.

A folder holds `img.jpg` (or `img.jpeg`, `img.png`, `img.webp`) and `mask0.png … maskN-1.png`, in
capitals or not; `mask{i}` defines the token `<asset{i}>`. Everything is read and checked here,
without torch and before any model is loaded. Sizes are (width, height), arrays are [height, width].
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
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
MASK_NAME = re.compile(r"mask([0-9]+)\.png", re.IGNORECASE)
LIKE_A_MASK = re.compile(r"mask(.*)\.(png|jpe?g|webp|bmp|gif|tiff?)", re.IGNORECASE)

MIN_SIDE = 64  # pixels
VISIBLE_DISTORTION = 0.1  # a change of width over height by more than this is worth a note
SMALL_MASK = 0.005  # a mask below this fraction of the picture is worth a note
LARGE_MASK = 0.5  # one above it that touches all edges of the picture may be inverted


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


@dataclass(frozen=True, eq=False)
class InstanceFiles:
    """An instance folder as it is, before anything is resized.

    masks: bool [H, W], of the picture's size as viewers show it; mask_paths, mask_hashes: theirs.
    """

    folder: Path
    picture: Picture
    masks: tuple[np.ndarray, ...]
    mask_paths: tuple[Path, ...]
    mask_hashes: tuple[str, ...]


def read_instance(
    folder: Path,
    resolution: int,
    multiple: int,
    resize: Literal["aspect", "squash"] = "aspect",
    labels: Sequence[str] = (),
) -> Instance:
    """Read and check `folder`, resized as `working_size` says; nothing is ever cropped.

    Args:
        labels: what is inside of masks with several labels, one for all or one for each.

    Raises UserError for anything that cannot be learned from, with the file and what to do.
    """
    return fit_instance(open_instance(folder, labels), resolution, multiple, resize)


def open_instance(folder: Path, labels: Sequence[str] = ()) -> InstanceFiles:
    """Read and check what `folder` holds; arguments and errors are those of `read_instance`."""
    folder = Path(folder)
    image_path, mask_paths = find_files(folder)
    if len(labels) not in (0, 1, len(mask_paths)):
        raise UserError(
            f"--mask_label has {len(labels)} entries for {len(mask_paths)} masks; give one for all "
            "or one for each"
        )
    picture = open_picture(image_path)
    if min(picture.size) < MIN_SIDE:
        raise UserError(
            f"{image_path} is {in_pixels(picture.size)}, which is too small; "
            f"use a picture of at least {MIN_SIDE} pixels a side"
        )
    masks, mask_hashes = [], []
    for path, label in zip(mask_paths, _for_each(labels, len(mask_paths)), strict=True):
        mask = open_picture(path)
        _check_mask_size(mask, picture)
        masks.append(mask.as_mask(label))
        mask_hashes.append(mask.sha256)
    return InstanceFiles(folder, picture, tuple(masks), tuple(mask_paths), tuple(mask_hashes))


def _for_each(labels: Sequence[str], count: int) -> Sequence[str | None]:
    return labels if len(labels) == count else [labels[0] if labels else None] * count


def fit_instance(
    files: InstanceFiles,
    resolution: int,
    multiple: int,
    resize: Literal["aspect", "squash"] = "aspect",
) -> Instance:
    """What an opened folder holds at the size that `working_size` says, with notes on it."""
    picture, folder = files.picture, files.folder
    size = working_size(picture.size, resolution, multiple, resize)
    masks = [resize_mask(mask, size) for mask in files.masks]
    _check_distinct(masks, files.mask_paths)
    notes = _notes(picture, size, masks, files.mask_paths)
    for note in notes:
        log.warning("%s", note)
    return Instance(
        name=folder.absolute().name,
        folder=folder,
        image=np.array(picture.as_rgb().resize(size, Image.Resampling.LANCZOS)),
        masks=np.stack(masks),
        source_size=picture.size,
        mask_hashes=files.mask_hashes,
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
        if path.is_dir() and not path.name.startswith(".") and _is_instance(path)
    )


def _is_instance(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    numbers = [int(match[1]) for name in names if (match := MASK_NAME.fullmatch(name))]
    return 0 in numbers and any(name.lower() in IMAGE_NAMES for name in names)


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
    there = [path for path in _entries(folder) if path.name.lower() in IMAGE_NAMES]
    found = sorted(
        (path for path in there if path.is_file()), key=lambda p: IMAGE_NAMES.index(p.name.lower())
    )
    if not found:
        raise UserError(f"{folder} holds no img.jpg; save the picture under that name")
    first, *others = (path.name.lower() for path in found)
    if others and (first != IMAGE_NAMES[0] or first in others):
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} holds several pictures ({names}); keep one of them")
    return found[0]


def find_masks(folder: Path) -> list[Path]:
    """The mask files in numeric order, checked to be mask0.png, mask1.png, … without a gap.

    No file that may be meant as a mask is passed over without a word.
    """
    masks: dict[int, Path] = {}
    folders: dict[int, Path] = {}
    for path in _entries(folder):
        match = MASK_NAME.fullmatch(path.name)
        if match is None:
            _check_no_mask(path)
            continue
        number = int(match[1])
        if path.is_dir():
            folders[number] = path
            continue
        if number in masks:
            names = f"{masks[number].name} and {path.name}"
            raise UserError(f"{folder} holds two masks of number {number} ({names}); keep one")
        masks[number] = path
    if not masks:
        raise UserError(f"{folder} holds no mask; save one per instance as mask0.png, mask1.png …")
    last = masks[max(masks)].name
    for i in range(len(masks)):
        if i not in masks:
            raise UserError(
                f"{folder / f'mask{i}.png'} is missing although there is a {last}; "
                f"number the masks from 0 without a gap"
            )
    if others := sorted(folders.keys() - masks.keys()):
        raise UserError(f"{folders[others[0]]} is a folder and no mask; give it another name")
    return [masks[i] for i in range(len(masks))]


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted. Raises UserError for a picture that is a link to nowhere."""
    entries = sorted(folder.iterdir())
    for path in entries:
        is_picture = path.name.lower() in IMAGE_NAMES or LIKE_A_MASK.fullmatch(path.name)
        if is_picture and path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {path.readlink()}, which is not there; put the file there"
            )
    return entries


def _check_no_mask(path: Path) -> None:
    """Raises UserError for a file that is called nearly as masks are."""
    match = LIKE_A_MASK.fullmatch(path.name)
    if match is None or not (number := re.search("[0-9]+", match[1])):
        return
    if match[1] == number[0]:
        raise UserError(f"{path} is not a .png; save it as {path.stem.lower()}.png")
    raise UserError(
        f"{path} is not called as masks are; if it is one, call it mask{int(number[0])}.png, or "
        "move it out of the folder"
    )


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


def _check_distinct(masks: Sequence[np.ndarray], paths: Sequence[Path]) -> None:
    for (i, a), (j, b) in itertools.combinations(enumerate(masks), 2):
        if np.array_equal(a, b):
            raise UserError(
                f"{paths[i]} and {paths[j].name} mark the same pixels; "
                f"give each instance its own mask or remove one"
            )


def _notes(
    picture: Picture, size: tuple[int, int], masks: Sequence[np.ndarray], paths: Sequence[Path]
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
        elif mask.mean() > LARGE_MASK and _touches_all_edges(mask):
            notes.append(
                f"{path.name} covers {100 * mask.mean():.3g}% of the picture and touches all its "
                "edges: if the thing is what is left out, invert the mask"
            )
        elif mask.mean() < SMALL_MASK:
            notes.append(
                f"{path.name} covers only {100 * mask.mean():.3g}% of the picture: "
                f"an instance that small can hardly be learned"
            )
    notes += [
        f"{path.name} is no mask by its name, and is passed over"
        for path in _entries(picture.path.parent)
        if path.is_file()
        and LIKE_A_MASK.fullmatch(path.name)
        and not MASK_NAME.fullmatch(path.name)
    ]
    return tuple(notes)


def _touches_all_edges(mask: np.ndarray) -> bool:
    return all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
