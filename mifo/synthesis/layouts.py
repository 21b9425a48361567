"""Preset boxes, for prompts whose boxes are not given."""

import math

from imagelab.boxes import Box

#: Layouts of few subjects, side by side around the middle of the picture.
ROWS = {
    1: [Box(0.2, 0.2, 0.8, 0.8)],
    2: [Box(0.05, 0.25, 0.45, 0.75), Box(0.55, 0.25, 0.95, 0.75)],
    3: [Box(0.03, 0.3, 0.32, 0.7), Box(0.355, 0.3, 0.645, 0.7), Box(0.68, 0.3, 0.97, 0.7)],
}


def preset_boxes(count: int) -> list[Box]:
    """Boxes of ``count`` subjects: a row of up to three, a grid of more."""
    return list(ROWS[count]) if count in ROWS else grid_boxes(count)


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
