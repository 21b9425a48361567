"""An instance folder: one picture, one mask per instance, and the views that learning draws.

A folder holds `img.jpg` (or `img.jpeg`, `img.png`, `img.webp`) and `mask0.png … maskN-1.png`;
`mask{i}` defines the token `<asset{i}>`. Everything is read and checked here, with numpy and
Pillow alone, before any model is loaded. Sizes are (width, height), arrays are [height, width].
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from imagelab.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_NAMES = ("img.jpg", "img.jpeg", "img.png", "img.webp")
MASK_NAME = re.compile(r"mask([0-9]+)\.png")
STRAY_MASK_NAME = re.compile(r"mask[0-9]+\.(png|jpe?g|webp|bmp|gif|tiff?)", re.IGNORECASE)
FORMATS = ("JPEG", "PNG", "WEBP")  # read whatever the file is called

MIN_SIDE = 64  # pixels
MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 100_000_000
MAX_ASPECT = 1.5  # long side over short side
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


@dataclass(frozen=True)
class _Picture:
    """A decoded file: the image as viewers show it, its size as stored, the hash of its bytes."""

    path: Path
    image: Image.Image
    stored_size: tuple[int, int]
    turned: bool  # its EXIF orientation asked for a rotation or a mirror image
    sha256: str


def read_instance(
    folder: Path, resolution: int, multiple: int, resize: Literal["aspect", "squash"] = "aspect"
) -> Instance:
    """Read and check `folder`, resized as `working_size` says; nothing is ever cropped.

    Raises UserError, naming the file and what to do, for whatever cannot be learned from.
    """
    folder = Path(folder)
    image_path, mask_paths = find_files(folder)
    picture = _load(image_path)
    source_size = picture.image.size
    if min(source_size) < MIN_SIDE:
        raise UserError(
            f"{image_path} is {_size(source_size)}, which is too small; "
            f"use a picture of at least {MIN_SIDE} pixels a side"
        )
    size = working_size(source_size, resolution, multiple, resize)
    masks, mask_hashes = [], []
    for path in mask_paths:
        mask = _load(path)
        _check_mask_size(mask, picture)
        masks.append(resize_mask(_inside(mask), size))
        mask_hashes.append(mask.sha256)
    _check_distinct(masks, mask_paths)

    notes = _notes(picture, size, masks, mask_paths)
    for note in notes:
        logger.warning("%s", note)
    return Instance(
        name=folder.absolute().name,
        folder=folder,
        image=np.array(_to_rgb(picture).resize(size, Image.Resampling.LANCZOS)),
        masks=np.stack(masks),
        source_size=source_size,
        mask_hashes=tuple(mask_hashes),
        image_hash=picture.sha256,
        notes=notes,
    )


def working_size(
    source: tuple[int, int], resolution: int, multiple: int, resize: str = "aspect"
) -> tuple[int, int]:
    """The (width, height) a picture of size `source` is worked on at.

    "aspect": the short side becomes `resolution`, the long side keeps its proportion up to
    MAX_ASPECT times that; a longer picture is squeezed. "squash": both become `resolution`.
    All sides are rounded to `multiple`, what the VAE and the UNet together halve evenly.
    """
    if resize not in ("aspect", "squash"):
        raise UserError(f"resize is {resize!r}; choose 'aspect' or 'squash'")
    if resolution < multiple:
        raise UserError(
            f"a resolution of {resolution} pixels is too small for the model; "
            f"use at least {multiple}"
        )
    short = round(resolution / multiple) * multiple
    if resize == "squash":
        return short, short
    width, height = source
    proportional = round(short * max(source) / min(source) / multiple) * multiple
    longest = int(MAX_ASPECT * short / multiple) * multiple
    long = min(proportional, longest)
    return (long, short) if width >= height else (short, long)


def list_instances(folder: Path) -> list[str]:
    """The names of the sub-folders of `folder` that hold an image and a mask0.png, sorted.

    Hidden ones are none of them: an instance that is being saved lies in one for a while.
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
    """Sizes, each mask's share of the picture, and the overlaps there are; one line each."""
    height, width = instance.image.shape[:2]
    lines = [
        f"{instance.name}: {_size(instance.source_size)}, worked on at {_size((width, height))}"
    ]
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


def mask_window(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the bounding box of a mask, bool [h, w] with a pixel inside."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def read_picture(path: Path) -> Image.Image:
    """A picture file as viewers show it, in 8-bit sRGB: upright, its pixels and no metadata."""
    return Image.fromarray(np.array(_to_rgb(_load(path))))


def read_mask(path: Path) -> np.ndarray:
    """True [h, w] inside, at the size of the file."""
    return _inside(_load(path))


def _load(path: Path) -> _Picture:
    """Decode a file, once its header says that it is not too large, and turn it upright."""
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path, f"over {MAX_PIXELS // 1_000_000} megapixels") from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise _unreadable(path, error) from error
    width, height = stored_size = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise _too_large(path, _size(stored_size))
    try:
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise _unreadable(path, error) from error
    return _Picture(path, image, stored_size, turned, hashlib.sha256(data).hexdigest())


def _too_large(path: Path, size: str) -> UserError:
    return UserError(
        f"{path} is {size}, which is too large; shrink picture and masks together "
        f"to at most {MAX_SIDE} pixels a side and {MAX_PIXELS // 1_000_000} megapixels"
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
    return UserError(f"{path} cannot be read as a picture ({reason}); save it again as PNG or JPEG")


def _check_mask_size(mask: _Picture, picture: _Picture) -> None:
    if mask.image.size == picture.image.size:
        return
    shown = f"{mask.path} is {_size(mask.image.size)}, {picture.path.name}"
    if mask.image.size == picture.stored_size:
        raise UserError(
            f"{shown} has an EXIF rotation and is {_size(picture.image.size)} as viewers show it; "
            f"save the mask in that orientation"
        )
    raise UserError(
        f"{shown} is {_size(picture.image.size)}; make the mask the size of the picture"
    )


def _inside(mask: _Picture) -> np.ndarray:
    """True [H, W] where alpha, or luminance if alpha is the same everywhere, is above ½."""
    levels, highest, what = _levels(mask.image)
    inside = levels > highest / 2
    if not inside.any():
        raise UserError(
            f"{mask.path} is empty (its highest {what} is {levels.max()} of {highest}); "
            f"paint the instance white on black"
        )
    return inside


def _levels(image: Image.Image) -> tuple[np.ndarray, int, str]:
    """The [H, W] levels that decide on a mask, the highest possible one, and what they are."""
    if image.mode.startswith("I"):  # 16-bit greys
        return np.asarray(image), 65_535, "luminance"
    if _has_alpha(image):
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() != alpha.max():
            return alpha, 255, "alpha"
    return np.asarray(image.convert("L")), 255, "luminance"


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _to_rgb(picture: _Picture) -> Image.Image:
    """Any picture as 8-bit sRGB, with white behind transparent places."""
    image = _in_srgb(picture)
    if image.mode.startswith("I"):  # 16-bit greys
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _in_srgb(picture: _Picture) -> Image.Image:
    """A picture with an embedded colour profile, as of phones and cameras, in sRGB's colours."""
    image, profile = picture.image, picture.image.info.get("icc_profile")
    if not profile:
        return image
    mode = "RGBA" if _has_alpha(image) else "RGB"
    if image.mode == "P":
        image = image.convert(mode)
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(
            image, given, ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (OSError, ImageCms.PyCMSError) as error:
        logger.warning("%s: its colour profile cannot be used (%s)", picture.path.name, error)
        return image


def resize_mask(inside: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a bool mask [h, w] to [H, W].

    A pixel is inside when the mask covers it at least half as much as it covers the pixel it
    covers most: the usual threshold of ½ for a solid mask, and a thin one does not vanish.
    """
    source = Image.fromarray(inside.astype(np.float32))
    covered = np.asarray(source.resize(size, Image.Resampling.BOX))
    return covered >= covered.max() / 2


def _check_distinct(masks: list[np.ndarray], paths: list[Path]) -> None:
    for (i, a), (j, b) in itertools.combinations(enumerate(masks), 2):
        if np.array_equal(a, b):
            raise UserError(
                f"{paths[i]} and {paths[j].name} mark the same pixels; "
                f"give each instance its own mask or remove one"
            )


def _notes(
    picture: _Picture, size: tuple[int, int], masks: list[np.ndarray], paths: list[Path]
) -> tuple[str, ...]:
    """What is allowed but worth knowing, one sentence each."""
    notes = []
    name, (width, height) = picture.path.name, picture.image.size
    if picture.turned:
        notes.append(
            f"{name} has an EXIF rotation, which was applied: its masks must match the picture "
            f"as viewers show it"
        )
    change = (size[0] / size[1]) / (width / height)
    long_over_short = max(width, height) / min(width, height)  # 1280 x 853 is a hair over 3 : 2
    if long_over_short > 1.01 * MAX_ASPECT or abs(change - 1) > VISIBLE_DISTORTION:
        notes.append(
            f"{name} is {_size((width, height))} and is squeezed to {_size(size)}, nothing is "
            f"cropped: crop it and its masks together if that distorts too much"
        )
    if _has_alpha(picture.image):
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


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
