"""What a benchmark found: means with their intervals and protocols, rows, contact sheets."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagelab.evaluation.report import Mean, mean_interval
from imagelab.io.atomic import write_json, written_aside
from imagelab.io.pictures import encode_png
from imagelab.io.tensors import read_json
from mige.evaluation.item import BenchItem
from mige.evaluation.measuring import PLACES, Bench
from mige.evaluation.models import USUAL
from mige.evaluation.outputs import Output
from mige.evaluation.sheets import SHEET_ITEMS, sheet

FACTS = "report.json"
MEASURES = ("CLIP-I", "CLIP-T", "CLIP-dir", "DINO", "L1", "L2")
NAMES = (
    *(name + place for place in PLACES for name in MEASURES),
    "CLIP-I of the entity",
    "DINO of the entity",
)
MOST_NAMED = 10  # items of a note
#: What of the pictures is measured, by the place.
VIEWS = {
    "": "",
    " inside": "; both pictures black outside the mask, cropped to its box",
    " outside": "; both pictures black inside the mask",
}


class Row(NamedTuple):
    """A measure of a task: its mean over items, and how many there are."""

    mean: Mean
    count: int


@dataclass(frozen=True)
class Findings:
    """All that a report tells of.

    Attributes:
        title: of the bench and its outputs, for JSON.
        measured: outputs and their records; ``missing``: outputs that there are none of.
        protocols: of "clip", "dino" and "entity", those that were asked for.
        notes: sentences.
    """

    title: Mapping[str, str]
    bench: Bench
    measured: Sequence[tuple[Output, dict]]
    missing: Sequence[Output]
    protocols: Mapping[str, str]
    notes: Sequence[str] = ()

    def of(self, task: str | None) -> list[tuple[Output, dict]]:
        """The measured outputs of a task; None: of all."""
        return [pair for pair in self.measured if task in (None, self.item(pair[0]).task)]

    def item(self, output: Output) -> BenchItem:
        """What an output is of."""
        return self.bench.items[output.place]

    @property
    def tasks(self) -> list[str]:
        """Those that something was measured of, in their order."""
        return list(dict.fromkeys(self.item(output).task for output, _ in self.measured))


def summarise(measured: Sequence[tuple[Output, dict]]) -> dict[str, Row]:
    """Means and 95% intervals over items; several pictures of an item count as their mean."""
    values: dict[str, dict[int, list[float]]] = {}
    for output, record in measured:
        for name, value in record["values"].items():
            values.setdefault(name, {}).setdefault(output.place, []).append(value)
    return {
        name: Row(
            mean_interval([np.mean(each) for each in values[name].values()]), len(values[name])
        )
        for name in NAMES
        if name in values
    }


def protocol(name: str, found: Findings, measured: Sequence[tuple[Output, dict]]) -> str:
    """How a measure was taken, in words."""
    if name.endswith(" of the entity"):
        judge = "clip" if name.startswith("CLIP") else "dino"
        return f"{found.protocols['entity']}; against the entities; {found.protocols[judge]}"
    measure, view = next(
        (name.removesuffix(place), VIEWS[place])
        for place in reversed(PLACES)
        if name.endswith(place)
    )
    kinds = dict.fromkeys(found.item(output).against for output, _ in measured)
    against = " or ".join(f"the {kind}" for kind in kinds)
    if "references" in kinds:
        against += " (mean over them)"
    clip, dino = found.protocols.get("clip", ""), found.protocols.get("dino", "")
    resized = f"against {against}; the output resized to it, bicubic; values in [0, 1]"
    whole = {
        "CLIP-I": f"cosine against {against}; {clip}",
        "CLIP-T": f"cosine against the wanted caption; {clip}",
        "CLIP-dir": "cosine of the change of pictures (from the source) and of captions, unit "
        f"vectors; {clip}",
        "DINO": f"cosine against {against}; {dino}",
        "L1": f"mean of \\|a − b\\| {resized}",
        "L2": f"mean of (a − b)² {resized}",
    }[measure]
    if measure in ("L1", "L2"):
        where = {"": "", " inside": "; pixels of the mask", " outside": "; pixels outside the mask"}
        return whole + where[name.removeprefix(measure)]
    return whole + view


def notes(found: Findings, task: str | None) -> list[str]:
    """What is to be known beside the numbers of a task."""
    measured = found.of(task)
    items = list({output.place: found.item(output) for output, _ in measured}.values())
    told = [
        f"{len(which)} of {len(items)} items {reason} ({_named(which)})."
        for reason, which in _lacking(found, items).items()
        if which
    ]
    entities = [record["entity"] for _, record in measured if "entity" in record]
    if entities:
        lost = sum(entity["box"] is None for entity in entities)
        told.append(
            f"Entity not found in {lost} of {len(entities)} outputs; there the whole output counts."
        )
    return told


def _lacking(found: Findings, items: Sequence[BenchItem]) -> dict[str, list[BenchItem]]:
    """What items lack and which measures that takes from them, of those that are taken."""
    lacking: dict[str, list[BenchItem]] = {}
    if "clip" in found.protocols:
        told = [item for item in items if item.target_caption]
        edits = [item for item in told if item.source is not None]
        lacking |= {
            "have no caption of what is wanted, and neither CLIP-T nor CLIP-dir": [
                item for item in items if not item.target_caption
            ],
            "have no caption of the source, and no CLIP-dir": [
                item for item in edits if not item.caption
            ],
            "have equal captions, and no CLIP-dir": [
                item for item in edits if item.has_equal_captions
            ],
        }
    if found.bench.use_masks and any(item.mask for item in items):
        lacking["have no mask, and no measures inside and outside"] = [
            item for item in items if not item.mask
        ]
    if "entity" in found.protocols:
        lacking["have no object to look for, and no measures of the entity"] = [
            item for item in items if not (item.entities and item.noun)
        ]
    return lacking


def _named(items: Sequence[BenchItem]) -> str:
    """The first of some items, by their numbers, and by their tasks if these are several."""
    several = len({item.task for item in items}) > 1
    names = [f"{item.task} {item.idx}" if several else f"{item.idx}" for item in items]
    return "idx " + _plain(", ".join(names[:MOST_NAMED])) + ", …" * (len(names) > MOST_NAMED)


# ----------------------------------------------------------------------------------------------
# what is written


def write_report(found: Findings, folder: Path) -> str:
    """Write report.json, report.md and a contact sheet for each task; returns the text."""
    text = markdown(found)
    for number, task in enumerate(found.tasks):
        name = re.sub(r"[^A-Za-z0-9_-]", "_", task)
        with written_aside(folder / f"sheet_{number}_{name}.png") as aside:
            aside.write_bytes(encode_png(sheet(found.bench, [each for each, _ in found.of(task)])))
    bench = os.path.relpath(Path(found.title["bench"]).resolve(), folder.resolve())
    write_json(folder / FACTS, as_facts(found) | {"bench_from_here": Path(bench).as_posix()})
    with written_aside(folder / "report.md") as aside:
        aside.write_text(text, encoding="utf-8")
    return text


def read_bench_of(folder: Path) -> Path:
    """The bench that a report is of; a UserError where it is no report of one."""
    facts = read_json(folder / FACTS, {"bench": str}, "give another --report")
    here = facts.get("bench_from_here")  # older reports have none
    return (folder / here if type(here) is str else Path(facts["bench"])).resolve()


def as_facts(found: Findings) -> dict:
    """All that was found, for JSON."""
    return {
        **found.title,
        "outputs": {
            "measured": len(found.measured), "of": len(found.measured) + len(found.missing),
        },
        "missing": [
            {**_who(found, each), "reason": each.reason} for each in found.missing
        ],
        "notes": list(found.notes),
        "tasks": {task: _part(found, task) for task in found.tasks},
        "all": _part(found, None),
        "rows": [
            {**_who(found, output), **_without_key(record)} for output, record in found.measured
        ],
    }  # fmt: skip


def _part(found: Findings, task: str | None) -> dict:
    measured = found.of(task)
    return {
        "items": len({output.place for output, _ in measured}),
        "pictures": len(measured),
        "notes": notes(found, task),
        "means": {
            name: row.mean._asdict() | {"n": row.count, "protocol": protocol(name, found, measured)}
            for name, row in summarise(measured).items()
        },
    }


def _who(found: Findings, output: Output) -> dict:
    item = found.item(output)
    return {
        "item": output.place, "task": item.task, "idx": item.idx, "picture": output.index,
        "output": str(output.path),
    }  # fmt: skip


def _without_key(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "key"}


def markdown(found: Findings) -> str:
    """The report: a table for each task, and for several one over all."""
    count, total = len(found.measured), len(found.measured) + len(found.missing)
    lines = ["# Benchmark", ""]
    lines += [f"* {name}: {_plain(value)}" for name, value in found.title.items()]
    lines += [f"* {count} of {total} outputs measured", *(f"* {each}" for each in found.notes)]
    if found.missing:
        lines += ["", "Not measured:", ""]
        lines += [f"* {_plain(str(each.path))}: {_plain(each.reason)}" for each in found.missing]
    parts = found.tasks if len(found.tasks) == 1 else [*found.tasks, None]
    for task in parts:
        measured = found.of(task)
        items = len({output.place for output, _ in measured})
        title = "all tasks" if task is None else _plain(task)
        lines += [
            "",
            f"## {title}",
            "",
            f"{_count(items, 'item')}, {_count(len(measured), 'picture')}.",
            "",
        ]
        lines += ["| measure | mean ± 95% interval | items | protocol |", "|---|---:|---:|---|"]
        for name, (mean, n) in summarise(measured).items():
            half = "" if mean.half is None else f" ± {mean.half:.4f}"
            told = protocol(name, found, measured)
            lines.append(f"| {name} | {mean.mean:z.4f}{half} | {n} | {told} |")
        lines += [line for each in notes(found, task) for line in ("", each)]
    shown = f"The sheets show the first {SHEET_ITEMS} items of each task."
    return "\n".join([*lines, "", shown, ""])


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _plain(text: str) -> str:
    """A text of somebody's in one line of markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def not_measured(given: Sequence[str], items: Sequence[BenchItem]) -> list[str]:
    """What is left out for want of a model, and what to give."""
    needed = {"clip": "CLIP", "dino": "DINO"}
    told = [
        f"No {name}: it was not given (--{option}, such as {USUAL[option]})"
        for option, name in needed.items()
        if option not in given
    ]
    if any(item.entities and item.noun for item in items) and "detector" not in given:
        told.append(
            "No measures of entities: no detector was given (--detector and --sam, such as "
            f"{USUAL['detector']} and {USUAL['sam']})"
        )
    return told
