"""Paint learned instances inside boxes: python semantic_synthesis.py --help."""

from imagelab.boxes import Box
from mifo.cli import synthesis
from mifo.synthesis.layouts import preset_boxes


def get_boxes(count: int) -> list[Box]:
    """The boxes of ``count`` subjects, in the prompt's order: edit this to move them.

    A box is Box(x0, y0, x1, y1): its left, top, right and bottom edges in fractions of the
    picture's width and height, from the top left.
    """
    return preset_boxes(count)


def main(argv: list[str] | None = None) -> None:
    synthesis.main(argv, get_boxes)


if __name__ == "__main__":
    main()
