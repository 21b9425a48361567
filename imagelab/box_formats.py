"""The ways to write a box: its numbers and their units, what they are, what tools call them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from imagelab.errors import UserError, shorten, shown

LONGEST = 1000  # characters of a box
NUMBER_AND_UNIT = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)(px|%|)", re.IGNORECASE)

#: What the four numbers of a box may be, in their order.
FORMATS = {
    "corners": "left, top, right, bottom",
    "xywh": "left, top, width, height",
    "cxcywh": "centre x, centre y, width, height",
}
#: The format that the names of the numbers say, in small letters without underscores.
NAMES = {
    ("xmin", "ymin", "xmax", "ymax"): "corners",
    ("x0", "y0", "x1", "y1"): "corners",
    ("x1", "y1", "x2", "y2"): "corners",
    ("left", "top", "right", "bottom"): "corners",
    ("x", "y", "width", "height"): "xywh",
    ("x", "y", "w", "h"): "xywh",
    ("left", "top", "width", "height"): "xywh",
    ("cx", "cy", "width", "height"): "cxcywh",
    ("cx", "cy", "w", "h"): "cxcywh",
    ("xcenter", "ycenter", "width", "height"): "cxcywh",
}
#: Names of a list of four numbers, and the format that they say; COCO's bbox says none.
LISTS = {"bbox2d": "corners", "bbox": None}


def read_numbers(
    value: str | Iterable | Mapping, box_format: str | None, name: str
) -> tuple[list[float], list[str], str | None]:
    """The four numbers of a box, the unit of each ("", "px" or "%"), and its format if it is known.

    Args:
        value: text, a sequence, an object of an annotation tool, or JSON text of one.
        box_format: what the user says; None: nothing.
        name: opens a message.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        form = 'write {"x": 0.1, "y": 0.2, "width": 0.4, "height": 0.4}'
        value = load_json(value, f"{name} is not", form)
    if isinstance(value, Mapping):
        value, box_format = _values(value, box_format, name)
    parts = _split(value) if isinstance(value, str) else map(shown, value)
    parts = [re.sub(r"\s+(?=px|%)", "", part.strip(), flags=re.IGNORECASE) for part in parts]
    if len(parts) != 4:
        order = FORMATS[box_format or "corners"]
        raise UserError(
            f"{name} does not hold four numbers; write {order}, such as 0.1,0.2,0.5,0.6"
        )
    matches = [NUMBER_AND_UNIT.fullmatch(part) for part in parts]
    if None in matches:
        culprit = quote(parts[matches.index(None)])
        raise UserError(
            f"{name} holds {culprit}, which is not a number; "
            "write fractions (0.25), percent (25%) or pixels (128px)"
        )
    numbers, units = zip(*(match.groups() for match in matches), strict=True)
    return list(map(float, numbers)), [unit.lower() for unit in units], box_format


def quote(value: object) -> str:
    """What the user wrote, in quotes on one line, shortened where it is long."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return repr(shorten(", ".join(map(shown, value)) if is_list else str(value).strip()))


def load_json(text: str, what: str, form: str) -> object:
    """JSON, or a UserError that says what is not JSON, and the form that it should have."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).split(":")[0]
        raise UserError(f"{what} valid JSON ({reason}); {form}") from None


def split_boxes(text: str) -> list[str]:
    """The boxes of a text that is one box without brackets, or a list of them in brackets."""
    if not re.search(r"[][{}]", text):
        return [text] if text.strip() else []
    innermost = r"\[([^][{}]*)\]"
    around = re.sub(innermost, "\0", text)  # what is left of a list, or of one box in brackets
    return re.findall(innermost, text) if re.fullmatch(r"\s*(\[[\s,\0]*\]|\0)\s*", around) else []


def _split(text: str) -> list[str]:
    """The parts of a text without brackets, quotes and spaces; none of one that is too long."""
    if len(text) > LONGEST:
        return []
    text = re.sub(r"\s+(?=px|%)", "", text.strip(), flags=re.IGNORECASE)
    inner = text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()") else text
    return [part.strip("'\"") for part in re.split(r"\s*,\s*|\s+", inner)]


def holds_box(found: Mapping) -> bool:
    """Whether an object holds a box, under names of NAMES or LISTS."""
    return bool(_ways(_plain(found)))


def _values(found: Mapping, box_format: str | None, name: str) -> tuple[Iterable, str | None]:
    """The four values of an object, and the format that their names say, or else the given one.

    Raises a UserError where there is not one box, or its names and the user's format disagree.
    """
    plain = _plain(found)
    ways = _ways(plain)
    if len(ways) != 1:
        why = "holds its box in several ways" if ways else "has no names that are known"
        raise UserError(
            f"{name} {why}; write it once, with xmin, ymin, xmax, ymax, or x, y, width, height, or "
            "cx, cy, width, height, or bbox_2d"
        )
    names = ways[0]
    written, values = zip(*(plain[key] for key in names), strict=True)
    says = LISTS[names[0]] if names[0] in LISTS else NAMES[names]
    if says and box_format and says != box_format:
        raise UserError(
            f"{name} has the names {', '.join(written)}, which say {FORMATS[says]}, and "
            f"--box_format is {box_format}; leave that out, or write a list of four numbers"
        )
    if names[0] in LISTS:
        values = values[0]
        if isinstance(values, Mapping) or not isinstance(values, Iterable):
            raise UserError(f"{name} has no list under {written[0]}; write four numbers there")
    return values, says or box_format


def _plain(found: Mapping) -> dict[str, tuple[str, object]]:
    """Keys and values of an object, by the keys in small letters without underscores."""
    return {str(key).lower().replace("_", ""): (str(key), found[key]) for key in found}


def _ways(plain: Mapping) -> list[tuple[str, ...]]:
    """The names under which an object holds a box."""
    return [names for names in (*NAMES, *((key,) for key in LISTS)) if plain.keys() >= set(names)]


def to_corners(numbers: Sequence[float], box_format: str, name: str) -> list[float]:
    """Left, top, right and bottom of a box in any format; all are fractions.

    Raises a UserError, which ``name`` opens, for a width or height that is not above 0.
    """
    if box_format == "corners":
        return list(numbers)
    x, y, width, height = numbers
    for side, length in (("width", width), ("height", height)):
        if not length > 0:
            raise UserError(f"{name} has a {side} of {length:g}; write {FORMATS[box_format]}")
    if box_format == "cxcywh":
        x, y = x - width / 2, y - height / 2
    # 0.2 + 0.4 is 0.6000000000000001: what a sum of floats adds at the end is cut off.
    return [round(edge, 12) for edge in (x, y, x + width, y + height)]
