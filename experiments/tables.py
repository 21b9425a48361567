"""From rows of a study to tables and contact sheets."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from experiments.study import pictures_folder
from imagelab.boxes import Box, raster
from imagelab.evaluation.report import Mean, mean_interval

Row = dict
RIGHT, WRONG = "white", "red"


def right_boxes(row: Row) -> list[bool]:
    """Of each box in each picture: does it hold the right toy?"""
    return [each["is_right"] for picture in row["judged"] for each in picture]


def right_kinds(row: Row, kinds: Sequence[str]) -> list[bool]:
    """Of each box in each picture: does it hold the right kind? ``kinds``: of all instances."""
    own = [kinds[asset] for asset in row["assets"]]
    return [
        each["kind"] == kind
        for picture in row["judged"]
        for each, kind in zip(picture, own, strict=True)
    ]


def own_there(row: Row) -> list[bool]:
    """Of each asset of the prompt in each picture: is it anywhere?"""
    return [picture[asset] for picture in row["there"] for asset in row["assets"]]


def other_there(row: Row) -> list[bool]:
    """Of each picture: is an instance of the photo there that the prompt does not name?"""
    return [
        any(is_there for asset, is_there in enumerate(picture) if asset not in row["assets"])
        for picture in row["there"]
    ]


def share(rows: Iterable[Row], measure: Callable[[Row], list[bool]]) -> float | None:
    """Share of what is true, over all rows; None without any."""
    values = [value for row in rows for value in measure(row)]
    return float(np.mean(values)) if values else None


def of_task(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of a task; "alone" is that of the tasks "alone 0", "alone 1", …"""
    return [row for row in rows if row["task"].split()[0] == name]


def mean_share(
    rows: Sequence[Row], measure: Callable[[Row], list[bool]], by: Sequence[str]
) -> Mean | None:
    """Mean and interval of the shares of groups of rows, those with the same values of ``by``."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    shares = [share(group, measure) for group in groups.values()]
    return mean_interval([each for each in shares if each is not None])


def mean_separation(rows: Sequence[Row]) -> Mean | None:
    """Share of the attention on the own instance, by folder."""
    found = {(row["way"], row["folder"]): float(np.mean(row["separation"])) for row in rows}
    return mean_interval(list(found.values()))


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; None is a dash."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = ["–" if cell is None else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def marked(row: Row, index: int, work: Path) -> Image.Image:
    """Picture ``index`` of a row with its boxes: thin and white; thick and red for wrong ones."""
    folder = pictures_folder(work, row["way"], row["folder"])
    with Image.open(folder / row["pictures"][index]) as file:
        picture = file.convert("RGB")
    draw = ImageDraw.Draw(picture)
    judged = row["judged"][index] if row["judged"] else []
    for sides, each in zip(row["boxes"], judged, strict=True):
        down, across = raster(Box(*sides), picture.height, picture.width)
        frame = (across.start, down.start, across.stop - 1, down.stop - 1)
        is_right = each["is_right"]
        draw.rectangle(frame, outline=RIGHT if is_right else WRONG, width=1 if is_right else 3)
    return picture
