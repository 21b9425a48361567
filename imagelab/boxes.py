"""Boxes: parse, check, rasterise, draw.

A box is four fractions of the picture's width and height, `x0, y0, x1, y1` (left, top, right,
bottom), with the origin at the top left. Sizes are (width, height), as in Pillow; grids are
(rows, columns), as in numpy. Nothing here imports torch; numpy and Pillow are imported only by
the functions that use them, so that a command which only parses boxes starts at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from imagelab.box_formats import (
    FORMATS,
    holds_box,
    load_json,
    quote,
    read_numbers,
    split_boxes,
    to_corners,
)
from imagelab.errors import UserError, shown

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

ROUNDING = 1e-3  # of the picture, by which a box may exceed it: that much is cut off
EDGES = ("left", "top", "right", "bottom")

# Okabe and Ito's palette, which readers of every colour vision tell apart; its black is left out.
PALETTE = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
    (0, 114, 178),  # blue
)


class UnknownSize(UserError):
    """A box is in pixels, and the size of the picture is not given."""


class Box(NamedTuple):
    """A box in fractions of the width (x) and the height (y), origin at the top left."""

    x0: float
    y0: float
    x1: float
    y1: float


def parse_box(
    value: str | Sequence[float | str] | Mapping,
    size: tuple[int, int] | None = None,
    guess_pixels: bool = False,
    box_format: str | None = None,
) -> Box:
    """Read one box and check it.

    Args:
        value: four numbers, as a sequence or as text separated by commas or spaces, in brackets or
            not. A number is a fraction, or has a unit: `25%` or `128px`. A unit after the last
            number alone stands for all four: `256,256,512,512px`. Or an object with such numbers,
            such as `{"x": …, "y": …, "width": …, "height": …}`, or JSON text of one; see
            `imagelab.box_formats`.
        size: (width, height) of the canvas, needed only for a box in pixels.
        guess_pixels: if any number without a unit exceeds 1, all numbers without one are pixels.
        box_format: what the numbers are, one of FORMATS; None: corners, unless the object's names
            say otherwise.

    Raises:
        UnknownSize: the box is in pixels, and there is no `size`.
        UserError: the text is not a box, or the box is reversed, empty or outside the picture.
    """
    if box_format not in (None, *FORMATS):
        raise UserError(f"box_format is {shown(box_format)!r}; give {', '.join(FORMATS)}")
    name = f"the box {quote(value)}"
    numbers, units, box_format = read_numbers(value, box_format, name)
    if not any(units[:3]):
        units = [units[3]] * 4
    plain = [number for number, unit in zip(numbers, units, strict=True) if not unit]
    if guess_pixels and any(number > 1 + ROUNDING for number in plain):
        units = [unit or "px" for unit in units]
    fractions = _fractions(numbers, units, size, name)
    box = Box(*map(_clip, to_corners(fractions, box_format or "corners", name)))
    try:
        check_box(box, name=name)
    except UserError as error:
        if box_format is None and (box.x0 >= box.x1 or box.y0 >= box.y1):
            raise UserError(f"{error}, or give --box_format xywh for {FORMATS['xywh']}") from None
        raise
    return box


def _clip(edge: float) -> float:
    """An edge without what it exceeds the picture by, if that is as little as rounding makes."""
    return min(max(edge, 0.0), 1.0) if -ROUNDING <= edge <= 1 + ROUNDING else edge


def _fractions(
    numbers: list[float], units: list[str], size: tuple[int, int] | None, name: str
) -> list[float]:
    """Convert four numbers with their units ("", "%" or "px") to fractions of the canvas."""
    if "px" in units and size is None:
        raise UnknownSize(
            f"{name} is in pixels, but the size of the picture is not known here; "
            "write fractions or percent"
        )
    fractions = []
    for axis, (number, unit) in enumerate(zip(numbers, units, strict=True)):
        if not unit and number > 1 + ROUNDING:
            raise UserError(
                f"{name} holds {number:g}, which is more than the whole picture; "
                "append px for pixels or % for percent"
            )
        whole = {"": 1, "%": 100, "px": size and size[axis % 2]}[unit]
        fractions.append(number / whole)
    return fractions


def parse_boxes(
    text: str, size: tuple[int, int] | None = None, box_format: str | None = None
) -> list[Box]:
    """Read a JSON list of boxes, `[[x0, y0, x1, y1], ...]`; a single box is accepted too.

    Boxes are those of `parse_box`; numbers that JSON does not know, such as `.5` and `10%`, need
    no quotes.

    Raises:
        UserError: the text is not such a list, or one of its boxes is not valid.
    """
    form = "write a list of boxes, [[x0, y0, x1, y1], ...]"
    try:
        boxes = load_json(text, f"the boxes {quote(text)} are not", form)
    except UserError:
        if not (parts := split_boxes(text)):
            raise
        return [parse_box(box, size, box_format=box_format) for box in parts]
    if isinstance(boxes, dict) and holds_box(boxes):
        boxes = [boxes]
    if not isinstance(boxes, list) or not boxes:
        raise UserError(f"the boxes {quote(text)} are not a list with boxes in it; {form}")
    if not any(isinstance(box, list | dict) for box in boxes):
        boxes = [boxes]
    for box in boxes:
        if not isinstance(box, list | dict):
            raise UserError(
                f"the boxes {quote(text)} hold {quote(shown(box))}, which is not a box; {form}"
            )
    return [parse_box(box, size, box_format=box_format) for box in boxes]


def parse_named_box(
    text: str, size: tuple[int, int] | None = None, box_format: str | None = None
) -> tuple[str, Box]:
    """Read `<asset0>=x0,y0,x1,y1` into the name and the box; see `parse_box`.

    Raises:
        UserError: there is no name, or the box is not valid.
    """
    name, equals, box = text.partition("=")
    if not equals or not name.strip() or name.lstrip().startswith("{"):
        raise UserError(
            f"the box {quote(text)} does not name its asset; write '<asset0>=0.1,0.2,0.5,0.6'"
        )
    return name.strip(), parse_box(box, size, box_format=box_format)


def check_box(
    box: Box, rows: int | None = None, columns: int | None = None, name: str = "box 1"
) -> None:
    """Raise a UserError unless the box lies in the picture and its corners are in order.

    With `rows` and `columns` given, the box also has to cover some cell of that grid.
    `name` opens the message.
    """
    for edge, value in zip(EDGES, box, strict=True):
        if not 0 <= value <= 1:  # true of NaN, too
            raise UserError(
                f"{name} has its {edge} edge at {value} of the picture; "
                "keep it between 0 and 1 (0% and 100%)"
            )
    for low, high in ((0, 2), (1, 3)):
        if box[low] >= box[high]:
            relation = "at" if box[low] == box[high] else "beyond"
            raise UserError(
                f"{name} has its {EDGES[low]} edge ({box[low]}) {relation} its {EDGES[high]} edge "
                f"({box[high]}); write left, top, right, bottom"
            )
    if rows is None and columns is None:
        return
    down, across = raster(box, rows, columns)
    if down.start == down.stop or across.start == across.stop:
        raise UserError(
            f"{name} ({', '.join(map(str, box))}) covers nothing of a grid of {columns} columns "
            f"and {rows} rows; make it larger than one cell ({1 / columns:.4g} by {1 / rows:.4g})"
        )


def raster(box: Box, rows: int, columns: int) -> tuple[slice, slice]:
    """The (rows, columns) of a grid that a box covers: edges times size, rounded half to even."""
    return (
        slice(round(box.y0 * rows), round(box.y1 * rows)),
        slice(round(box.x0 * columns), round(box.x1 * columns)),
    )


def box_mask(box: Box, rows: int, columns: int) -> np.ndarray:
    """A boolean array [rows, columns], true inside the box."""
    import numpy as np

    mask = np.zeros((rows, columns), dtype=bool)
    mask[raster(box, rows, columns)] = True
    return mask


def color_of(index: int) -> tuple[int, int, int]:
    """The RGB colour (0..255) of box number `index`, from a palette safe for the colour-blind."""
    return PALETTE[index % len(PALETTE)]


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], labels: Sequence[str], fill: float = 0.0
) -> Image.Image:
    """Outline boxes on a copy of an image, each in its colour with its label.

    Args:
        image: any Pillow image; lines and letters grow with it.
        boxes: a box is drawn at least one pixel wide and high.
        labels: one for each box, written inside its top left corner, moved or made smaller where
            that keeps it inside the picture and off earlier labels; "" for none.
        fill: how much of a box's colour covers its inside, from 0 (none) to 1 (all).

    Returns:
        A new RGB image of the same size.
    """
    from PIL import Image, ImageDraw

    picture = image.convert("RGB")
    frames = [_frame(box, picture.size) for box in boxes]
    for index, (left, top, right, bottom) in enumerate(frames):
        inside = picture.crop((left, top, right + 1, bottom + 1))
        tint = Image.new("RGB", inside.size, color_of(index))
        picture.paste(Image.blend(inside, tint, fill), (left, top))

    draw = ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 160))
    for index, frame in enumerate(frames):
        # A dark inner rim keeps the outline visible on a ground of its own colour.
        draw.rectangle(frame, outline="black", width=line + max(1, line // 2))
        draw.rectangle(frame, outline=color_of(index), width=line)

    plates: list[tuple[int, int, int, int]] = []
    for index, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        if label:
            plates.append(_draw_label(picture, frame, " ".join(label.split()), index, plates))
    return picture


def _frame(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and last pixels of a box: left, top, right, bottom, all inside the picture."""
    down, across = raster(box, size[1], size[0])
    left, top = min(across.start, size[0] - 1), min(down.start, size[1] - 1)
    return left, top, max(left, across.stop - 1), max(top, down.stop - 1)


def _draw_label(
    picture: Image.Image,
    frame: tuple[int, int, int, int],
    label: str,
    index: int,
    plates: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Write a label on a plate of its box's colour; return where the plate lies."""
    from PIL import ImageDraw

    font, width, height, pad = _label_font(label, *picture.size)
    left, top = _free_spot(frame, (width, height), picture.size, plates)
    color = color_of(index)
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
    draw.text((left + pad, top + pad), label, font=font, fill="black" if luma > 90 else "white")
    return left, top, left + width, top + height


def _free_spot(
    frame: tuple[int, int, int, int],
    plate: tuple[int, int],
    canvas: tuple[int, int],
    plates: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int]:
    """The left and top of a plate in or beside a box, inside the canvas and off other plates."""
    (width, height), (_, box_top, _, box_bottom) = plate, frame
    left = max(0, min(frame[0], canvas[0] - width))
    last = max(0, canvas[1] - height)
    top = box_top if box_bottom - box_top >= 1.5 * height else box_bottom + 1
    if top > last:  # no room under a small box
        top = max(0, min(box_top - height, last))
    for free in range(top, last + 1, height):
        if not any(
            left < right and above_left < left + width and free < bottom and above < free + height
            for above_left, above, right, bottom in plates
        ):
            return left, free
    return left, top


def _label_font(
    label: str, canvas_width: int, canvas_height: int
) -> tuple[ImageFont.FreeTypeFont, int, int, int]:
    """Pillow's own font at a readable size, smaller where the label would not fit the picture.

    Returns the font and the plate's width, height and padding in pixels.
    """
    from PIL import ImageFont

    size = max(11, round(min(canvas_width, canvas_height) / 26))
    while True:
        font = ImageFont.load_default(size)
        pad = max(1, size // 6)
        width = math.ceil(font.getlength(label)) + 2 * pad
        height = sum(font.getmetrics()) + 2 * pad
        fit = min(canvas_width / width, canvas_height / height)
        if fit >= 1 or size <= 6:
            return font, width, height, pad
        size = max(6, min(size - 1, int(size * fit)))
