"""An instance folder in the making: a photo and its masks, a report on them, saving.

Sizes are (width, height) in pixels, masks bool [height, width].
"""

import os
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, replacing, write_json
from imagelab.io.folders import foreign
from imagelab.io.images import read_image, read_mask, resize_mask
from imagelab.io.tensors import read_json
from mifo.learning.classes import ADVICE, DESCRIPTION, check_classes, read_classes
from mifo.learning.instance import (
    IMAGE_NAMES,
    MASK_NAME,
    Instance,
    coverage_report,
    find_image,
    find_masks,
    read_instance,
)
from mifo.learning.overlay import draw_masks
from mifo_page import MAX_FILE, MAX_SENT
from mifo_page.places import Places, folder_in

MAX_SIDE = 2048  # pixels: larger photos are shrunk, with their masks


@dataclass(frozen=True, eq=False)
class Draft:
    """An instance folder in the making.

    opened_size: the photo's size before shrinking; folder: the instance folder it was opened from.
    """

    photo: Image.Image
    opened_size: tuple[int, int]
    masks: tuple[np.ndarray, ...] = ()
    folder: Path | None = None


def open_photo(path: str | Path) -> Draft:
    """A photo as viewers show it, at most MAX_SIDE a side: its pixels and nothing else."""
    path = Path(path)
    with _files_named_alone(path.parent):
        photo = read_image(path)
    size = photo.size
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    return Draft(photo, size)


def add_mask_file(draft: Draft, path: str | Path) -> Draft:
    """The draft with a mask from a file of the size of the photo."""
    path = Path(path)
    with _files_named_alone(path.parent):
        mask = read_mask(path)
    size = mask.shape[1], mask.shape[0]
    if size not in (draft.opened_size, draft.photo.size):
        raise UserError(
            f"{path.name} is {size[0]} x {size[1]} pixels, the photo "
            f"{draft.opened_size[0]} x {draft.opened_size[1]}; make the mask the size of the photo"
        )
    return _with_mask(draft, mask)


def add_painted_mask(draft: Draft, sent: dict) -> Draft:
    """The draft with a mask from the brush, which sends it as "mask".

    That is a PNG as a data URL, opaque where it is painted; empty if nothing is. It is read as an
    uploaded mask is, with the same limits.
    """
    strokes = sent.get("mask") if isinstance(sent, dict) else None
    if not isinstance(strokes, str):
        raise UserError("the page sent no mask; load it again and paint the mask anew")
    if not strokes:
        raise UserError("nothing is painted; brush over one thing in the photo first")
    if len(strokes) > MAX_SENT:
        raise UserError(
            f"the painted mask is larger than {MAX_FILE // 2**20} MiB; upload a smaller file"
        )
    try:
        data = b64decode(strokes.removeprefix("data:image/png;base64,"), validate=True)
    except ValueError as error:
        raise UserError("the page sent no mask; load it again and paint the mask anew") from error
    with TemporaryDirectory() as folder:
        path = Path(folder, "the painted mask")
        path.write_bytes(data)
        return add_mask_file(draft, path)


def _with_mask(draft: Draft, mask: np.ndarray) -> Draft:
    return replace(draft, masks=(*draft.masks, resize_mask(mask, draft.photo.size)))


def open_instance(places: Places, name: str) -> Draft:
    """The photo and the masks of an instance folder."""
    folder = folder_in(places.folder_path, name, "instance")
    if not folder.is_dir():
        raise UserError(f"there is no instance folder {folder}; choose another or open a photo")
    draft = replace(open_photo(find_image(folder)), folder=folder)
    for path in find_masks(folder):
        draft = add_mask_file(draft, path)
    return draft


def classes_of(draft: Draft) -> str:
    """What the things of an opened instance are, separated by commas; empty if it does not say."""
    classes = read_classes(draft.folder, len(draft.masks))
    if any("," in each for each in classes):
        raise UserError(
            f"{draft.folder / DESCRIPTION} has a class with a comma, which is several here; say "
            "what the things are without it"
        )
    return ", ".join(classes)


def report(draft: Draft) -> str:
    """Coverage and overlaps of the masks, and the notes that learning would make on them."""
    if not draft.masks:
        return "no mask yet"
    with TemporaryDirectory() as folder:
        _write(draft, Path(folder))
        instance = _read(draft, Path(folder))
    return "\n".join([*coverage_report(instance).splitlines()[1:], *instance.notes])


def overlay(draft: Draft) -> Image.Image:
    """The photo with each mask in its colour, framed and named."""
    return draw_masks(draft.photo, draft.masks)


def as_data(picture: Image.Image) -> str:
    """A picture as a data URL, to look at."""
    data = BytesIO()
    picture.save(data, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{b64encode(data.getvalue()).decode()}"


def save_instance(
    places: Places, name: str, draft: Draft, may_replace: bool, classes: Sequence[str] = ()
) -> Path:
    """Write an instance folder, which appears only when it can be read as learning reads it.

    A folder of that name is replaced only if it ``may_replace`` and holds an instance alone.
    ``classes``: what the things are, one for all or one for each mask; empty: that is not said.
    """
    target = folder_in(places.folder_path, name, "instance")
    if not draft.masks:
        raise UserError("there is no mask yet; paint or upload one for each thing in the photo")
    classes = _check_classes(classes, len(draft.masks))
    with folder_lock(target):
        if target.exists():
            _check_replaceable(target, draft, may_replace)
        with replacing(target) as folder:
            _write(draft, folder)
            if classes:
                found = classes[0] if len(classes) == 1 else list(classes)
                write_json(folder / DESCRIPTION, {"class": found})
            _read(draft, folder)
    return target


def _check_classes(classes: Sequence[str], masks: int) -> tuple[str, ...]:
    if not classes:
        return ()
    advice = "write one for all, such as car, or one for each mask, such as cat, fox"
    try:
        classes = check_classes(classes, "what they are")
    except UserError as error:  # which says how to write a file
        raise UserError(str(error).replace(ADVICE, advice)) from error
    if len(classes) not in (1, masks):
        raise UserError(f"there are {len(classes)} classes for {masks} masks; {advice}")
    return classes


def _check_replaceable(target: Path, draft: Draft, may_replace: bool) -> None:
    """Raises UserError where something would be lost that the user has not given up."""
    if not may_replace:
        raise UserError(f"{target} is there already; give another name, or say to replace it")
    if not target.is_dir():
        raise UserError(f"{target} is no folder; give another name")
    if others := [path.name for path in foreign(target) if not _is_replaceable(path)]:
        raise UserError(
            f"{target} holds {others[0]}, which would be lost; give another name, or move that away"
        )
    if draft.folder == target and draft.photo.size != draft.opened_size:
        raise UserError(
            f"{target} holds the photo in its full size, {draft.opened_size[0]} x "
            f"{draft.opened_size[1]} pixels, and this one is smaller; give another name"
        )


def _is_replaceable(path: Path) -> bool:
    """Whether what lies in a folder is part of an instance, and says no more than the page does."""
    if not path.is_file():
        return False
    if path.name != DESCRIPTION:
        return path.name.lower() in IMAGE_NAMES or MASK_NAME.fullmatch(path.name) is not None
    try:
        return read_json(path, {}, ADVICE).keys() <= {"class"}
    except UserError:
        return False


def _write(draft: Draft, folder: Path) -> None:
    """Write pixels alone: no EXIF, no place, no name of a camera."""
    draft.photo.save(folder / "img.png", compress_level=1)
    for index, mask in enumerate(draft.masks):
        Image.fromarray(mask).save(folder / f"mask{index}.png")


def _read(draft: Draft, folder: Path) -> Instance:
    with _files_named_alone(folder):
        return read_instance(folder, resolution=min(draft.photo.size), multiple=1)


@contextmanager
def _files_named_alone(folder: Path) -> Iterator[None]:
    """Within, messages name a file of ``folder`` alone, without the folder, which is temporary."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from error
