"""What an evaluation found: a table, JSON, a contact sheet and confusion matrices."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from imagelab.boxes import draw_boxes
from mifo.evaluation import PICTURES, Case
from imagelab.io.atomic import written_aside
from mifo.tokens import asset_token
from imagelab.evaluation.measures import confusion, diversity, margins

TILE, GAP = 192, 4  # pixels of a contact sheet's pictures, and between them


class Mean(NamedTuple):
    """A mean and the half-width of its 95% interval (None for a single value)."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:z.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def mean_interval(values: Sequence[float]) -> Mean | None:
    """Mean and Student's 95% interval, values being independent; None for no value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return Mean(float(values[0]), None) if count else None
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Mean(float(np.mean(values)), float(half))


def summarise(records: Sequence[dict]) -> dict[str, Mean | None]:
    """The measures of one case by name, means over its pictures.

    Identity is None for a single instance, which cannot be mistaken for another.
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
    """Means over the means of cases, as each is one draw of what could have been learned."""
    return {
        name: mean_interval([row[name].mean for row in rows if row[name] is not None])
        for name in rows[0]
    }


def total_confusion(records: Sequence[dict], space: str) -> np.ndarray:
    """Counts [n, n] over all records, n being the most instances that there are."""
    parts = [confusion(r["own"], r["spaces"][space]["similarities"]) for r in records]
    total = np.zeros((max(map(len, parts)),) * 2, dtype=int)
    for part in parts:
        total[: len(part), : len(part)] += part
    return total


# ----------------------------------------------------------------------------------------------
# what is written


def write_report(cases: Sequence[Case], records: Sequence[Sequence[dict]], output: Path) -> str:
    """Write evaluation.json, evaluation.md, sheet.png and confusion.png; returns the table."""
    rows = [summarise(each) for each in records]
    every = [record for each in records for record in each]
    matrices = {name: total_confusion(every, name) for name in every[0]["spaces"]}
    table = markdown(cases, rows)
    facts = {
        "cases": [
            {
                "model_id": case.config.model_id,
                "prompt": case.config.prompt,
                "boxes": case.boxes,
                "box_control": case.config.box_control,
                "settings": case.learned.manifest["settings"],
                "seeds": [record["seed"] for record in each],
                "measures": as_json(row),
            }
            for case, each, row in zip(cases, records, rows, strict=True)
        ],
        "all": as_json(over_all(rows)),
        "confusion": {name: matrix.tolist() for name, matrix in matrices.items()},
    }
    for name, text in (("evaluation.json", json.dumps(facts, indent=2)), ("evaluation.md", table)):
        with written_aside(output / name) as path:
            path.write_text(text + "\n", encoding="utf-8")
    with written_aside(output / "sheet.png") as path:
        contact_sheet(cases, records, output / PICTURES).save(path, "PNG")
    with written_aside(output / "confusion.png") as path:
        confusion_figure(path, matrices)
    return table


def as_json(row: dict[str, Mean | None]) -> dict:
    return {name: None if value is None else value._asdict() for name, value in row.items()}


def markdown(cases: Sequence[Case], rows: Sequence[dict[str, Mean | None]]) -> str:
    """One row a case; several cases have their mean in the last one."""
    names = list(rows[0])
    heads = [(case.config.model_id, case.config.prompt) for case in cases]
    if len(rows) > 1:
        rows, heads = [*rows, over_all(rows)], [*heads, ("all", "")]
    lines = ["| learned folder | prompt | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (2 + len(names)))
    for (model_id, prompt), row in zip(heads, rows, strict=True):
        cells = ["–" if row[name] is None else str(row[name]) for name in names]
        shown = f"`{prompt}`" if prompt else ""
        lines.append(f"| {model_id} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contact_sheet(
    cases: Sequence[Case], records: Sequence[Sequence[dict]], folder: Path
) -> Image.Image:
    """A row for each case: its photo, then the pictures with their boxes.

    A box says which instance it is for; "0 > 1" is a box for 0 that the first feature space takes
    for 1.
    """
    columns = 1 + max(map(len, records))
    line = TILE // 12
    tall = TILE + line + GAP
    sheet = Image.new("RGB", (columns * (TILE + GAP) - GAP, len(cases) * tall - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (case, each) in enumerate(zip(cases, records, strict=True)):
        tiles = [Image.fromarray(case.instance.image)]
        for record in each:
            with Image.open(folder / record["picture"]) as file:
                picture = file.convert("RGB")
            tiles.append(draw_boxes(picture, case.boxes, _labels(record)))
        head = f"{case.config.model_id}: {case.config.prompt}"
        draw.text((2, row * tall), head, "black", ImageFont.load_default(line - 3))
        for column, tile in enumerate(tiles):
            at = (column * (TILE + GAP), row * tall + line)
            sheet.paste(ImageOps.pad(tile, (TILE, TILE), color="white"), at)
    return sheet


def _labels(record: dict) -> list[str]:
    first = next(iter(record["spaces"].values()))
    labels = []
    for own, row in zip(record["own"], first["similarities"], strict=True):
        taken = int(np.argmax(row))
        labels.append(f"{own}" if taken == own else f"{own} > {taken}")
    return labels


def confusion_figure(path: Path, matrices: dict[str, np.ndarray]) -> None:
    """For each feature space, whose box (rows) was taken for which instance (columns)."""
    from matplotlib.figure import Figure

    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels[len(matrices) :]:
        panel.set_axis_off()
    for panel, (name, counts) in zip(panels, matrices.items(), strict=False):
        names = [asset_token(index) for index in range(len(counts))]
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.5 else "black"
            panel.text(column, row, str(count), ha="center", va="center", color=ink)
        panel.set_xticks(range(len(names)), names)
        panel.set_yticks(range(len(names)), names, rotation=90, va="center")
        panel.set(title=name, xlabel="is nearest to", ylabel="box of")
    figure.savefig(path, dpi=110, format="png")
