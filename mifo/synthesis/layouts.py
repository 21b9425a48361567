"""Preset boxes, for prompts whose boxes are not given."""

import math
from collections.abc import Callable, Sequence

from imagelab.boxes import Box

#: What lays out a number of subjects. It also gets the proportion of each, width over height in
#: fractions of the picture, as the photo shows it; None where that is not known.
GetBoxes = Callable[[int, Sequence[float | None]], Sequence[Box]]

#: Layouts of few subjects, side by side around the middle of the picture.
ROWS = {
    1: [Box(0.2, 0.2, 0.8, 0.8)],
    2: [Box(0.05, 0.25, 0.45, 0.75), Box(0.55, 0.25, 0.95, 0.75)],
    3: [Box(0.03, 0.3, 0.32, 0.7), Box(0.355, 0.3, 0.645, 0.7), Box(0.68, 0.3, 0.97, 0.7)],
}


#: Boxes are at most so many times as long as wide, and their sides at least so long, which covers
#: some cell of the smallest usual grid (8×8, Stable Diffusion 2.1 at 256 pixels).
MOST_PROPORTION, LEAST_SIDE = 3.0, 0.14


def preset_boxes(count: int, proportions: Sequence[float | None] = ()) -> list[Box]:
    """Boxes of ``count`` subjects: places in a row of up to three, in a grid of more.

    A subject of a known proportion, width over height in fractions of the picture, gets the largest
    box of that proportion in the middle of its place; any other gets the whole place.
    """
    places = ROWS[count] if count in ROWS else grid_boxes(count)
    known = proportions or [None] * count
    return [fit(place, each) for place, each in zip(places, known, strict=True)]


def fit(place: Box, proportion: float | None) -> Box:
    """The largest box of a proportion in the middle of a place, but for boxes too thin to see."""
    if proportion is None:
        return place
    proportion = min(max(proportion, 1 / MOST_PROPORTION), MOST_PROPORTION)
    width, height = place.x1 - place.x0, place.y1 - place.y0
    width, height = (
        min(width, max(height * proportion, LEAST_SIDE)),
        min(height, max(width / proportion, LEAST_SIDE)),
    )
    x, y = (place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def grid_boxes(count: int, gap: float = 0.1) -> list[Box]:
    """Boxes in the cells of a grid, in reading order.

    ``gap`` is the share of a cell's sides that is left free on each side of its box.
    """
    columns = math.isqrt(count - 1) + 1  # the least n with n² >= count
    rows = -(-count // columns)
    boxes = []
    for index in range(count):
        row, column = divmod(index, columns)
        boxes.append(
            Box(
                (column + gap) / columns,
                (row + gap) / rows,
                (column + 1 - gap) / columns,
                (row + 1 - gap) / rows,
            )
        )
    return boxes
