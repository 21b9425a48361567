"""Lists of what is to be painted, in the release's formats.

A list is a JSON file with an array of objects:

subject          {"entity_path": ["dog.jpg", …], "multi_prompt": "a<imagehere>on the beach"}
subject edit     {"source_path": ["in.jpg"], "entity_path": ["in.jpg", "cat.jpg"], …}
edit             the same with the source as the only entity
edit (Emu Edit)  {"instruction": "make it snow", "image": "in.jpg", "task": "global"}

In ``entity_path`` the pictures stand in the order of their marks; the one that is in
``source_path`` as well is edited. Other keys are passed over.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from imagelab.errors import UserError, shorten
from imagelab.io.images import MissingPicture, Picture, open_picture, open_unchanged
from imagelab.io.tensors import misfit
from mige.lists import read_text
from mige.method.wording import TASKS
from mige.request import Request, make_request

MOST_ITEMS = 10_000_000
ROOT_ADVICE = "is --root right?"
RECORD = {"entity_path": [str], "multi_prompt": str}
EMU = {"instruction": str, "image": str}


@dataclass(frozen=True)
class Item:
    """One item of a list, before its pictures are read.

    Attributes:
        name: what its random draws are called by.
        paths: of its pictures, in the order of their marks.
        source: which of them is to be edited; None: nothing is.
        is_listed: whether it is of a list, whose paths start from a root.
    """

    name: str | int
    text: str
    paths: tuple[Path, ...]
    source: int | None = None
    is_global: bool = False
    is_listed: bool = False

    @property
    def task(self) -> str:
        """One of :data:`~mige.method.wording.TASKS`."""
        if self.source is None:
            return "subject"
        return "edit" if len(self.paths) == 1 else "subject_edit"

    def request(self, pictures: Sequence[Image.Image]) -> Request:
        """What the model is asked for, once the pictures are read."""
        if self.source is None:
            return make_request(self.text, tuple(pictures), name=self.name)
        others = tuple(p for at, p in enumerate(pictures) if at != self.source)
        return make_request(
            self.text, others, pictures[self.source], self.source, self.name, self.is_global
        )

    def read(self, digests: Mapping[Path, str]) -> Request:
        """What the model is asked for, with its pictures.

        Raises UserError where one is not any more what it was.

        Args:
            digests: sha256 of the files, as :func:`read_pictures` found them.
        """
        return self.request([open_unchanged(path, digests[path]).as_rgb() for path in self.paths])


def read_items(path: Path, root: Path | None, edits: bool) -> list[Item]:
    """The items of a list, in its order, each called by its position.

    Args:
        root: what the paths in the list start from; None: the folder of the list.
        edits: whether the list has to hold edits, or subjects.

    Raises:
        UserError: the file is damaged, or an item is not as it should be; with the item.
    """
    root = path.parent if root is None else root
    records = _read_list(path)
    items = [_item(record, index, path, root) for index, record in enumerate(records)]
    for index, item in enumerate(items):
        if (item.source is not None) != edits:
            what = (
                "edits a picture: use mige.edit" if not edits else "edits none: use mige.generate"
            )
            raise UserError(f"{path}: item {index} {what}")
    return items


def _read_list(path: Path) -> list[dict]:
    """The objects of a JSON array; a UserError says the line where the file is broken."""
    if not path.is_file():
        raise UserError(f"there is no list {path}; give a JSON file with --items")
    text = read_text(path, "see docs/mige.md for the formats of lists")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({shorten(str(error))})") from error
    if wrong := misfit(found, [{}], "the list"):
        raise UserError(f"{path}: {wrong}; write an array of objects, see docs/mige.md")
    if not 0 < len(found) <= MOST_ITEMS:
        raise UserError(f"{path} has {len(found)} items; give some")
    return found


def _item(record: dict, index: int, path: Path, root: Path) -> Item:
    """One item of a list; a UserError names the list and the item."""
    is_emu = "instruction" in record
    if wrong := misfit(record, EMU if is_emu else RECORD):
        raise UserError(f"{path}: item {index}: {wrong}; see docs/mige.md for the formats of lists")
    if is_emu:
        task = record.get("task", "")
        source = root / record["image"]
        return Item(index, record["instruction"], (source,), 0, task == "global", True)
    entities = record["entity_path"]
    sources = record.get("source_path", [])
    if misfit(sources, [str]) or len(sources) > 1:
        raise UserError(f"{path}: item {index}: source_path is no list of one path")
    if sources and sources[0] not in entities:
        raise UserError(
            f"{path}: item {index}: entity_path lacks the source {shorten(sources[0])}; it names "
            "all pictures in the order of their marks"
        )
    place = entities.index(sources[0]) if sources else None
    paths = tuple(root / each for each in entities)
    item = Item(index, record["multi_prompt"], paths, place, is_listed=True)
    if (task := record.get("task", item.task)) != item.task:
        known = f"its pictures make it one of {item.task}" if task in TASKS else "there is no such"
        raise UserError(
            f"{path}: item {index} says the task {shorten(str(task))!r}, and {known}; the tasks "
            f"are {', '.join(TASKS)}"
        )
    return item


def read_pictures(items: Sequence[Item]) -> dict[Path, str]:
    """Read every picture once, before any work; the sha256 of each file.

    Raises UserError with the item's position for the first that cannot be read.
    """
    digests: dict[Path, str] = {}
    for item in tqdm(items, "reading", unit=" items", disable=len(items) < 100):
        with naming_item(item, len(items)):
            for path in item.paths:
                if path not in digests:
                    picture = open_listed(path) if item.is_listed else open_picture(path)
                    picture.as_rgb()
                    digests[path] = picture.sha256
    return digests


def open_listed(path: Path) -> Picture:
    """A picture that a list names; where it is missing, the list's root may be wrong."""
    try:
        return open_picture(path)
    except MissingPicture as error:
        raise MissingPicture(path, ROOT_ADVICE) from error


def check_items(items: Sequence[Item], pipeline) -> None:
    """Read every instruction as a model will.

    Raises UserError with the item's position for the first that cannot be carried out.
    """
    blank = Image.new("RGB", (1, 1))
    for item in tqdm(items, "checking", unit=" items", disable=len(items) < 100):
        with naming_item(item, len(items)):
            pipeline.segments(item.request([blank] * len(item.paths)))


@contextmanager
def naming_item(item: Item, count: int) -> Iterator[None]:
    """Within, a UserError tells of which of several items it is."""
    try:
        yield
    except UserError as error:
        if count == 1:
            raise
        raise UserError(f"item {item.name}: {error}") from error
