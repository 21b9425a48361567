"""Contact sheets: what outputs were painted from and compared with, beside them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imagelab.io.images import read_image
from imagelab.io.pictures import Tile, sheet_of_lines
from mige.evaluation.item import BenchItem
from mige.evaluation.measuring import Bench
from mige.evaluation.outputs import Output
from mige.method.wording import readable

SHEET_ITEMS, SHEET_SIDE = 24, 192


def sheet(bench: Bench, outputs: Sequence[Output]) -> Image.Image:
    """A line for each of the first items: source, entities, mask, what was wanted, outputs."""
    paths: dict[int, list[Path]] = {}
    for output in outputs:
        paths.setdefault(output.place, []).append(output.path)
    lines = [
        _line(bench, bench.items[place], painted)
        for place, painted in list(paths.items())[:SHEET_ITEMS]
    ]
    return sheet_of_lines(lines, SHEET_SIDE)


def _line(bench: Bench, item: BenchItem, outputs: Sequence[Path]) -> list[Tile]:
    given = [("source", [item.source] if item.source else []), ("entity", item.entities)]
    tiles = [Tile(_small(read_image(path)), name) for name, paths in given for path in paths]
    mask = bench.mask(item)
    if mask is not None:
        tiles.append(Tile(_small(Image.fromarray(mask.astype(np.uint8) * 255)), "mask"))
    if item.against != "source":
        name = item.against.removesuffix("s")
        tiles += [Tile(_small(read_image(path)), name) for path in item.compared]
    text = readable(item.item.text)
    return [*tiles, *(Tile(_small(read_image(path)), f"{item.idx}: {text}") for path in outputs)]


def _small(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return picture
