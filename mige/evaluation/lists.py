"""Benches: lists of what was to be painted, and of what the outputs are compared with."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import MOST_JSON, parse_json
from mige.evaluation.formats import ADVICE, FORMATS, Reader
from mige.evaluation.item import BenchItem
from mige.items import MOST_ITEMS, Item
from mige.lists import read_text

#: MIGEBench's lists; numbers of their items collide.
MIGE_BENCH = {"add": "add_bench.json", "replace": "replace_bench.json"}
SPLITS = ("test", "validation")
#: Keys of Emu Edit's items: those that tell it from other lists, and all.
EMU_NEEDS = {"instruction", "image", "split"}
EMU_HAS = EMU_NEEDS | {"task", "idx", "hash", "input_caption", "output_caption"}
TEST_ITEMS = 3589  # of Emu Edit's test split, by the authors of MIGE


def read_bench(
    path: Path, form: str | None, root: Path | None, tasks: Sequence[str], split: str | None
) -> tuple[list[BenchItem], list[str]]:
    """The items of a bench in their order, and what the report is to say of them.

    Args:
        form: one of :data:`FORMATS`; None: MIGEBench and Emu Edit by their names, else items.
        tasks: of a folder of MIGEBench, the lists that are read; none: all that are there.
        split: of Emu Edit, that its items are to be of; "any"; None: the test split.

    Raises:
        UserError: something is missing, or not as it should be; with the item.
    """
    if not path.exists():
        raise UserError(f"there is no bench {path}; {ADVICE}")
    lists = {path.stem.removesuffix("_bench"): path}
    if path.is_dir():
        if form not in (None, "migebench"):
            raise UserError(f"{path} is a folder; give the JSON list that is meant")
        lists = _lists_of(path, tasks)
    items, notes = [], []
    for name, file in lists.items():
        records = _read(file)
        if not 0 < len(records) <= MOST_ITEMS:
            raise UserError(f"{file} has {len(records)} items; give some")
        form = form or _form_of(file, records)
        if form == "emu":
            notes += check_split(records, split or SPLITS[0], file)
        elif split:
            raise UserError(f"--split is of Emu Edit, and {file} is read as {form}; leave it out")
        for index, record in enumerate(records):
            where = f"{file}: item {index}"
            reader = Reader(record, where, root or file.parent, len(items), index, name)
            items.append(FORMATS[form](reader))
    return items, notes


def _form_of(path: Path, records: Sequence[Mapping]) -> str:
    """The format of a list that nobody named."""
    if path.name in MIGE_BENCH.values():
        return "migebench"
    is_emu = all(EMU_NEEDS <= record.keys() <= EMU_HAS for record in records)
    return "emu" if is_emu else "items"


def _read(path: Path) -> list[dict]:
    """The objects of a list."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; {ADVICE}")
    if (size := path.stat().st_size) > MOST_JSON:
        raise UserError(f"{path} is too large, {size >> 20} MiB; {ADVICE}")
    return parse_json(read_text(path, ADVICE), [{}], str(path), ADVICE)


def _lists_of(folder: Path, tasks: Sequence[str]) -> dict[str, Path]:
    if unknown := [task for task in tasks if task not in MIGE_BENCH]:
        raise UserError(
            f"MIGEBench has no task {shorten(unknown[0])!r}; its tasks are {', '.join(MIGE_BENCH)}"
        )
    asked = [task for task in MIGE_BENCH if task in tasks]
    there = [task for task, name in MIGE_BENCH.items() if (folder / name).is_file()]
    if not (asked or there):
        raise UserError(f"{folder} has none of {', '.join(MIGE_BENCH.values())}; {ADVICE}")
    return {task: folder / MIGE_BENCH[task] for task in asked or there}


def written_items(items: Sequence[BenchItem], folder: Path) -> list[dict]:
    """A list in this folder that `mige.generate` or `mige.edit` paints, of the same order."""
    return [_written(each.item, folder.absolute()) for each in items]


def _written(item: Item, folder: Path) -> dict:
    paths = [Path(os.path.relpath(path.absolute(), folder)).as_posix() for path in item.paths]
    if item.task == "edit":
        task = "global" if item.is_global else "local"
        return {"instruction": item.text, "image": paths[0], "task": task}
    record = {"entity_path": paths, "multi_prompt": item.text}
    return record if item.source is None else record | {"source_path": [paths[item.source]]}


def check_split(records: Sequence[Mapping], split: str, path: Path) -> list[str]:
    """What a report is to say of a list's split; the hub has the two of Emu Edit swapped.

    Raises UserError where the items call themselves, or their number shows, another split.
    """
    if split == "any":
        return []
    other = SPLITS[1 - SPLITS.index(split)]
    count = len(records)
    wrong = [at for at, record in enumerate(records) if record.get("split", split) != split]
    if wrong:
        own = shorten(str(records[wrong[0]]["split"]))
        told = f"{len(wrong)} of {count} items call themselves {own!r}, as item {wrong[0]} does"
        raise UserError(
            f"{path}: --split is {split}, and {told}; the hub has the splits of Emu Edit swapped: "
            f"the test split has {TEST_ITEMS} items. Give the other list, --split {other}, or "
            "--split any"
        )
    if split == "validation" and count == TEST_ITEMS:
        raise UserError(
            f"{path} has {count} items, as many as the test split, and --split is validation; give "
            "the other list, --split test, or --split any"
        )
    if split == "test" and count != TEST_ITEMS:
        return [
            f"{path.name} has {count} items, and the test split of Emu Edit has {TEST_ITEMS}: "
            "these are the other split, or a part"
        ]
    return []
