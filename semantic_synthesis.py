"""Paint learned instances inside boxes: python semantic_synthesis.py --help."""

from collections.abc import Sequence

from imagelab.boxes import Box
from mifo.cli import synthesis
from mifo.synthesis.layouts import preset_boxes


def get_boxes(count: int, proportions: Sequence[float | None]) -> list[Box]:
    """The boxes of ``count`` subjects, in the prompt's order: edit this to move them.

    A box is Box(x0, y0, x1, y1): its left, top, right and bottom edges in fractions of the
    picture's width and height, from the top left. ``proportions`` are those of each subject in its
    photo, width over height in such fractions, or None; a layout may ignore them.
    """
    return preset_boxes(count, proportions)


def main(argv: list[str] | None = None) -> None:
    synthesis.main(argv, get_boxes)


if __name__ == "__main__":
    main()
