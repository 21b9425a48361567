"""The box of each subject: from a layout, a list or boxes by asset, and checked."""

from collections.abc import Callable, Sequence

from imagelab.boxes import Box, check_box, parse_box
from imagelab.errors import UserError, shorten

#: One box a subject in the order of the prompt, or lists of boxes by asset name.
GivenBoxes = Sequence[Box] | dict[str, list[Box]]


def place_boxes(
    names: Sequence[str], boxes: GivenBoxes | None, layout: Callable[[], Sequence[Box]]
) -> list[Box]:
    """The box of each subject, in the order of ``names``; a UserError where they do not fit.

    ``layout`` is asked where ``boxes`` is None.
    """
    if not names:
        raise UserError(
            "the prompt names no asset; name one, such as <asset0>, or give --no_box_control"
        )
    if isinstance(boxes, dict):
        return _place_named(names, boxes)
    placed = list(layout() if boxes is None else boxes)
    if len(placed) != len(names):
        raise UserError(
            f"there are {len(placed)} boxes and {len(names)} assets in the prompt "
            f"({', '.join(names)}); give one box for each"
        )
    return [parse_box(box) for box in placed]


def _place_named(names: Sequence[str], boxes: dict[str, list[Box]]) -> list[Box]:
    for name, given in boxes.items():
        if name not in names:
            raise UserError(
                f"--box names {shorten(name)}, which the prompt does not; "
                f"it names {', '.join(names)}"
            )
        if len(given) != names.count(name):
            raise UserError(
                f"--box gives {len(given)} boxes for {name}, which the prompt names "
                f"{names.count(name)} times; give one box each time"
            )
    if missing := [name for name in names if name not in boxes]:
        raise UserError(
            f"--box gives no box for {missing[0]}; give one for each asset of the prompt"
        )
    waiting = {name: iter(given) for name, given in boxes.items()}
    return [parse_box(next(waiting[name])) for name in names]


def check_placed(
    boxes: Sequence[Box], names: Sequence[str], grid: tuple[int, int] | None = None
) -> None:
    """Raises UserError unless each box lies in the picture and covers some cell of the grid.

    ``grid``: rows and columns; None where they are not known yet.
    """
    for index, (box, name) in enumerate(zip(boxes, names, strict=True), 1):
        check_box(box, *(grid or ()), name=f"box {index} ({name})")


def check_wanted(
    box_control: bool,
    boxes: GivenBoxes | None,
    subject_token_indices: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raises UserError for boxes, or their subjects, where no box shall be in control."""
    given = ["subject_token_indices"] if subject_token_indices is not None else []
    given += [] if boxes is None else ["box" if isinstance(boxes, dict) else "boxes"]
    if given and not box_control:
        raise UserError(f"--{given[0]} and --no_box_control are both given; give one of them")
