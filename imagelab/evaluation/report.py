"""What an evaluation found: a table, JSON, a contact sheet and confusion matrices.

A record is what :func:`imagelab.evaluation.runner.measure` found of one picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagelab.evaluation.measures import confusion, diversity, margins
from imagelab.evaluation.runner import PICTURES, RECORDS, Case, locked
from imagelab.io.atomic import write_json, written_aside
from imagelab.io.pictures import Tile, sheet_of_lines

TILE = 192  # pixels of the longer side of a contact sheet's pictures


class Mean(NamedTuple):
    """A mean and the half-width of its 95% interval (None for a single value)."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:z.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def mean_interval(values: Sequence[float]) -> Mean | None:
    """Mean and Student's 95% interval of independent values; None for no value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return Mean(float(values[0]), None) if count else None
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Mean(float(np.mean(values)), float(half))


def summarise(records: Sequence[dict]) -> dict[str, Mean | None]:
    """The measures of one case by name: means over the records of its pictures.

    Those of identity are None for a single instance, which cannot be mistaken for another.
    """
    values: dict[str, list[float]] = {}
    for name in records[0]["spaces"]:
        found = [record["spaces"][name] for record in records]
        own = [record["own"] for record in records]
        several = len(found[0]["similarities"][0]) > 1
        pairs = [(o, f["similarities"]) for o, f in zip(own, found, strict=True) if several]
        values[f"{name}: right instance"] = [np.trace(confusion(o, s)) / len(o) for o, s in pairs]
        values[f"{name}: margin"] = [np.mean(margins(o, s)) for o, s in pairs]
        if "prompt" in found[0]:
            values[f"{name}: prompt"] = [f["prompt"] for f in found]
        apart = diversity([f["features"] for f in found])
        values[f"{name}: diversity"] = [] if apart is None else [apart]
    values["IoU with the box"] = [np.mean(record["iou"]) for record in records]
    values["leakage"] = [r["leakage"] for r in records if r["leakage"] is not None]
    return {name: mean_interval(each) for name, each in values.items()}


def over_all(rows: Sequence[dict[str, Mean | None]]) -> dict[str, Mean | None]:
    """Means and intervals over the means of cases, each of which counts once."""
    return {
        name: mean_interval([row[name].mean for row in rows if row[name] is not None])
        for name in rows[0]
    }


def total_confusion(records: Sequence[dict], space: str) -> np.ndarray:
    """Counts [n, n] over all records, where n is the largest number of instances."""
    parts = [confusion(r["own"], r["spaces"][space]["similarities"]) for r in records]
    total = np.zeros((max(map(len, parts)),) * 2, dtype=int)
    for part in parts:
        total[: len(part), : len(part)] += part
    return total


# ----------------------------------------------------------------------------------------------
# what is written


def write_report(cases: Sequence[Case], records: Sequence[Sequence[dict]], output: Path) -> str:
    """Write evaluation.json, evaluation.md, sheet.png and confusion.png; returns the table.

    Of several processes one writes all four before the next.
    """
    rows = [summarise(each) for each in records]
    every = [record for each in records for record in each]
    matrices = {name: total_confusion(every, name) for name in every[0]["spaces"]}
    table = markdown(cases, rows)
    with locked(output / RECORDS):
        write_json(output / "evaluation.json", as_facts(cases, records, rows, matrices))
        with written_aside(output / "evaluation.md") as path:
            path.write_text(table + "\n", encoding="utf-8")
        with written_aside(output / "sheet.png") as path:
            sheet(cases, records, output / PICTURES).save(path, "PNG")
        with written_aside(output / "confusion.png") as path:
            confusion_figure(path, matrices, max((case.labels for case in cases), key=len))
    return table


def as_facts(
    cases: Sequence[Case],
    records: Sequence[Sequence[dict]],
    rows: Sequence[dict[str, Mean | None]],
    matrices: dict[str, np.ndarray],
) -> dict:
    """All that was found, for JSON."""
    return {
        "cases": [
            {
                "prompt": case.prompt,
                "boxes": case.boxes,
                **case.about,
                "seeds": [record["seed"] for record in each],
                "measures": as_json(row),
            }
            for case, each, row in zip(cases, records, rows, strict=True)
        ],
        "all": as_json(over_all(rows)),
        "confusion": {name: matrix.tolist() for name, matrix in matrices.items()},
    }


def as_json(row: dict[str, Mean | None]) -> dict:
    """A row of measures for JSON."""
    return {name: None if value is None else value._asdict() for name, value in row.items()}


def markdown(cases: Sequence[Case], rows: Sequence[dict[str, Mean | None]]) -> str:
    """The table: a row for each case, and for several a last one with the means of all."""
    names = list(rows[0])
    heads = [(case.name, f"`{case.prompt}`") for case in cases]
    if len(rows) > 1:
        rows, heads = [*rows, over_all(rows)], [*heads, ("all", "")]
    lines = ["| name | prompt | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (2 + len(names)))
    for (name, prompt), row in zip(heads, rows, strict=True):
        cells = ["–" if row[measure] is None else str(row[measure]) for measure in names]
        lines.append(f"| {name} | {prompt} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(
    cases: Sequence[Case],
    records: Sequence[Sequence[dict]],
    folder: Path,
    captions: Sequence[str] = (),
) -> Image.Image:
    """A contact sheet with a row for each case: its photo, then its pictures with their boxes.

    A box says which instance it is for; "0 > 1" is a box for 0 that the first feature space takes
    for 1.

    Args:
        folder: where the records' pictures are.
        captions: of the columns of pictures; without them each picture has its seed.
    """
    lines = []
    for case, each in zip(cases, records, strict=True):
        texts = captions or [f"seed {record['seed']}" for record in each]
        pictures = [
            Tile(folder / record["picture"], text, boxes=case.boxes, labels=_box_labels(record))
            for record, text in zip(each, texts, strict=True)
        ]
        lines.append([Tile(case.photo, f"{case.name}: {case.prompt}"), *pictures])
    return sheet_of_lines(lines, TILE)


def _box_labels(record: dict) -> list[str]:
    first = next(iter(record["spaces"].values()))
    nearest = np.argmax(first["similarities"], axis=1)
    return [
        f"{own}" if own == taken else f"{own} > {taken}"
        for own, taken in zip(record["own"], nearest, strict=True)
    ]


def confusion_figure(path: Path, matrices: dict[str, np.ndarray], labels: Sequence[str]) -> None:
    """Draw matrices by title: whose box (rows) was taken for which instance (columns).

    labels: of the instances, at least as many as the largest matrix has.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels[len(matrices) :]:
        panel.set_axis_off()
    for panel, (title, counts) in zip(panels, matrices.items(), strict=False):
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.5 else "black"
            panel.text(column, row, str(count), ha="center", va="center", color=ink)
        panel.set_xticks(range(len(counts)), labels[: len(counts)])
        panel.set_yticks(range(len(counts)), labels[: len(counts)], rotation=90, va="center")
        panel.set(title=title, xlabel="is nearest to", ylabel="box of")
    figure.savefig(path, dpi=110, format="png")
