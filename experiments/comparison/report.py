"""What a comparison found: a table with intervals, contact sheets."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from experiments.comparison.settings import TEXTS, Variant
from experiments.tables import (
    Row,
    markdown,
    marked,
    mean_separation,
    mean_share,
    of_task,
    other_there,
    own_there,
    right_boxes,
    share,
)
from imagelab.evaluation.report import Mean, mean_interval
from imagelab.io.atomic import written_aside
from imagelab.io.pictures import Tile, sheet_of_lines

BASE = "mifo"  # the loss that the others are compared with
SHEET_ROWS, SHEET_SIDE = 12, 144

Measure = Callable[[Row], list[bool]]
#: The columns: a title, the task, what is counted.
COLUMNS: tuple[tuple[str, str, Measure], ...] = (
    ("boxes right", "boxed", right_boxes),
    ("without boxes: there", "unboxed", own_there),
    ("alone: there", "alone", own_there),
    ("alone: another there", "alone", other_there),
)


def difference(one: Sequence[Row], other: Sequence[Row], measure: Measure) -> Mean | None:
    """A share less another, folder by folder, over the folders that both have."""
    apart = []
    for name in dict.fromkeys(row["folder"] for row in one):
        pair = [[row for row in rows if row["folder"] == name] for rows in (one, other)]
        if pair[1]:
            apart.append(share(pair[0], measure) - share(pair[1], measure))
    return mean_interval(apart) if apart else None


def table(variants: Sequence[Variant], rows: Sequence[Row]) -> str:
    """A line for each variant that has rows; differences from MIFO's with the same base, tokens."""
    by_way: dict[str, list[Row]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    heads = ["base", "tokens", "loss", "folders", COLUMNS[0][0], f"less {BASE}'s"]
    heads += [title for title, _, _ in COLUMNS[1:]] + ["attention on the own instance"]
    lines = []
    for variant in variants:
        mine = by_way.get(variant.name, [])
        if not mine:
            continue
        base = by_way.get(Variant(variant.base, variant.tokens, BASE).name, [])
        cells = [
            mean_share(of_task(mine, task), measure, ["folder"]) for _, task, measure in COLUMNS
        ]
        apart = None
        if variant.loss != BASE:
            apart = difference(of_task(mine, "boxed"), of_task(base, "boxed"), right_boxes)
        count = len({row["folder"] for row in mine})
        lines.append(
            [variant.base_name, variant.tokens, TEXTS[variant.loss], count, cells[0], apart,
             *cells[1:], mean_separation(mine)]
        )  # fmt: skip
    return markdown(heads, lines)


def write_comparison(
    variants: Sequence[Variant],
    rows: Sequence[Row],
    work: Path,
    failures: Mapping[str, str],
) -> str:
    """Write comparison.md, and a sheet for each base and kind of tokens; returns the table."""
    text = table(variants, rows)
    text += "".join(f"\n\n{name} failed: {why}" for name, why in failures.items())
    with written_aside(work / "comparison.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    for base, tokens in dict.fromkeys((v.base_name, v.tokens) for v in variants):
        shown = [row for row in rows if (row["base"], row["tokens"]) == (base, tokens)]
        if shown:
            with written_aside(work / f"sheet_{base}_{tokens}.jpg") as path:
                loss_sheet(shown, work).save(path, "JPEG", quality=88)
    return text


def loss_sheet(rows: Sequence[Row], work: Path) -> Image.Image:
    """A line for each folder: its photo, then its first picture with boxes by each loss."""
    lines = []
    for name in list(dict.fromkeys(row["folder"] for row in rows))[:SHEET_ROWS]:
        with Image.open(work / "folders" / name / "img.jpg") as file:
            line = [Tile(file.convert("RGB"), name)]
        for row in rows:
            if row["folder"] == name and row["task"] == "boxed":
                wrong = sum(not each["is_right"] for each in row["judged"][0])
                caption = row["loss"] + (f": {wrong} wrong" if wrong else "")
                line.append(Tile(marked(row, 0, work), caption, "red" if wrong else "black"))
        lines.append(line)
    return sheet_of_lines(lines, SHEET_SIDE)
