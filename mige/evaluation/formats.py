"""The objects of benches' lists, read by format.

migebench    {"image", "source_path", "entity_path", "mask_path", "multi_prompt", "caption",
             "target_caption", "object", "idx"} in add_bench.json and replace_bench.json
dreambench   {"entity_path", "multi_prompt", "prompt", "references"}
magicbrush   {"source", "target", "mask", "instruction", "source_caption", "target_caption"}
emu          {"instruction", "image", "task", "split", "idx", "input_caption", "output_caption"}
items        what mige.generate and mige.edit paint, with the keys above where they are known

Paths start at the list's folder, or at a root, and may not leave it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import misfit
from mige.evaluation.item import BenchItem
from mige.items import Item
from mige.request import LONGEST

ADVICE = "docs/mige_measuring.md says what a bench is"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LONGEST_TASK = 40


@dataclass(frozen=True)
class Reader:
    """One object of a list; its readers raise UserError with the item.

    Attributes:
        where: what a message calls it.
        root: the folder that its paths may not leave.
        place: among all items; ``index``: in its list; ``name``: of that list.
    """

    record: Mapping
    where: str
    root: Path
    place: int
    index: int
    name: str

    def check(self, form: Mapping) -> None:
        """Raises UserError unless the object has these keys."""
        if wrong := misfit(self.record, dict(form)):
            raise UserError(f"{self.where}: {wrong}; {ADVICE}")

    def text(self, *keys: str) -> str | None:
        """The text under the first of these keys that is there."""
        for key in keys:
            if self.record.get(key) is not None:
                self.check({key: str})
                return self._checked(self.record[key])
        return None

    def path(self, *keys: str) -> Path | None:
        """The path under the first of these keys that is there; a list of one is as good."""
        for key in keys:
            if self.record.get(key) not in (None, []):
                self.check({key: (str, [str])})
                value = self.record[key]
                if type(value) is list and len(value) != 1:
                    raise UserError(f"{self.where}: {key} is no list of one path; {ADVICE}")
                return self.join(value if type(value) is str else value[0])
        return None

    def paths(self, key: str) -> tuple[Path, ...]:
        """The paths under a key."""
        self.check({key: [str]})
        return tuple(map(self.join, self.record[key]))

    def join(self, text: str) -> Path:
        """A path that is written in the list; a UserError for one that leaves the root."""
        self._checked(text)
        root = Path(os.path.abspath(self.root))
        if not text or not Path(os.path.abspath(root / text)).is_relative_to(root):
            raise UserError(
                f"{self.where}: the path {shorten(text)!r} leaves the folder {self.root}; give "
                "--root, the folder that holds all pictures of the list"
            )
        return self.root / text

    def number(self) -> int:
        """Its number in the release's file names: the key "idx", or else its position."""
        if self.record.get("idx") is None:
            return self.index
        self.check({"idx": int})
        return self.record["idx"]

    def _checked(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{self.where}: {shorten(text)!r} is not UTF-8 text") from None
        if len(text) > LONGEST:
            raise UserError(
                f"{self.where}: {shorten(text)!r} has {len(text)} letters; give at most {LONGEST}"
            )
        return text


def _mige_bench(reader: Reader) -> BenchItem:
    reader.check(
        {"image": str, "entity_path": [str], "source_path": [str], "multi_prompt": str, "idx": int}
    )
    item = _marked(reader)
    if item.source is None or len(item.paths) < 2:
        raise UserError(f"{reader.where}: it has no source, or no entity beside it; {ADVICE}")
    return BenchItem(
        item, reader.name, reader.number(), reader.path("image"), (), reader.path("mask_path"),
        reader.text("caption"), reader.text("target_caption"), _others(item),
        reader.text("object"),
    )  # fmt: skip


def _dream_bench(reader: Reader) -> BenchItem:
    item = _marked(reader)
    if item.source is not None:
        raise UserError(f"{reader.where}: it edits a picture, and subjects do not; {ADVICE}")
    return BenchItem(
        item, "subject", reader.number(), references=_references(reader, item),
        target_caption=reader.text("prompt", "target_caption"),
    )  # fmt: skip


def _magic_brush(reader: Reader) -> BenchItem:
    reader.check({"source": str, "target": str, "instruction": str})
    item = Item(reader.place, reader.text("instruction"), (reader.path("source"),), 0)
    return BenchItem(
        item, "edit", reader.number(), reader.path("target"), (), reader.path("mask"),
        reader.text("source_caption"), reader.text("target_caption"),
    )  # fmt: skip


def _emu(reader: Reader) -> BenchItem:
    reader.check({"instruction": str, "image": str})
    task = reader.text("task") or "edit"
    item = Item(
        reader.place, reader.text("instruction"), (reader.path("image"),), 0, task == "global"
    )
    return BenchItem(
        item, task[:LONGEST_TASK], reader.number(), caption=reader.text("input_caption"),
        target_caption=reader.text("output_caption"),
    )  # fmt: skip


def _plain(reader: Reader) -> BenchItem:
    """An item that mige.generate or mige.edit paints, and whatever else is known of it."""
    known = {
        "target": reader.path("target"),
        "mask": reader.path("mask", "mask_path"),
        "caption": reader.text("caption", "input_caption", "source_caption"),
        "target_caption": reader.text("target_caption", "output_caption", "prompt"),
        "noun": reader.text("object"),
    }
    if "instruction" in reader.record:
        return BenchItem(_emu(reader).item, "edit", reader.number(), **known)
    item = _marked(reader)
    references = _references(reader, item) if item.source is None else ()
    entities = _others(item) if known["noun"] else ()
    return BenchItem(
        item, item.task, reader.number(), references=references, entities=entities, **known
    )


FORMATS = {
    "migebench": _mige_bench, "dreambench": _dream_bench, "magicbrush": _magic_brush, "emu": _emu,
    "items": _plain,
}  # fmt: skip


def _marked(reader: Reader) -> Item:
    """An item with marks for its pictures."""
    reader.check({"entity_path": [str], "multi_prompt": str})
    paths, source = reader.paths("entity_path"), reader.path("source_path")
    if source is not None and source not in paths:
        raise UserError(
            f"{reader.where}: entity_path lacks the source {shorten(source.name)}; it names all "
            "pictures in the order of their marks"
        )
    place = None if source is None else paths.index(source)
    return Item(reader.place, reader.text("multi_prompt"), paths, place)


def _others(item: Item) -> tuple[Path, ...]:
    """The pictures that are put into the source."""
    return tuple(path for at, path in enumerate(item.paths) if at != item.source)


def _references(reader: Reader, item: Item) -> tuple[Path, ...]:
    """The pictures of the subjects: those given, all in a folder, or what the model gets."""
    if reader.record.get("references") is None:
        return item.paths
    if type(reader.record["references"]) is not str:
        return reader.paths("references")
    folder = reader.path("references")
    if not folder.is_dir():
        raise UserError(f"{reader.where}: there is no folder {folder}; {ADVICE}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{reader.where}: the folder {folder} has no pictures; {ADVICE}")
    return tuple(found)
