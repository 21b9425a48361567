"""What a toy MIGE is measured on: rows of held-out triplets, and how each is asked for."""

from collections.abc import Iterator
from typing import NamedTuple

from toybox.scenes import edits
from toybox.scenes.triplets import Triplet, draw_triplet

SPLIT = "test"  # which no training sees


class Row(NamedTuple):
    """Items of one task and op.

    Attributes:
        aims: the shares to reach, by the check.
    """

    title: str
    task: str
    op: str
    aims: dict[str, float]


_TITLES = {"resize": "resize (bigger, smaller)"}
_EDIT, _SUBJECT_EDIT = {"right": 0.8}, {"right": 0.75}
ROWS = {
    "subject-one": Row(
        "subject, one reference", "subject", "one", {"kind": 0.85, "hue": 0.8, "right": 0.8}
    ),
    "subject-two": Row("subject, two references", "subject", "two", {"right": 0.6}),
    "subject-word": Row("subject, one of words", "subject", "one_word", {}),
    **{f"edit-{op}": Row(f"edit: {_TITLES.get(op, op)}", "edit", op, _EDIT) for op in edits.EDITS},
    **{
        f"subject-edit-{op}": Row(f"subject edit: {op}", "subject_edit", op, _SUBJECT_EDIT)
        for op in edits.SUBJECT_EDITS
    },
}
MOST_L1 = 0.03  # outside of what an edit changes


class Item(NamedTuple):
    """One item.

    Attributes:
        row: one of :data:`ROWS`.
        text: the instruction.
        wording: of an edit, "mark" or "plain": whether it names the picture; None elsewhere.
    """

    row: str
    index: int
    triplet: Triplet
    text: str
    wording: str | None

    @property
    def name(self) -> str:
        """What its random draws are called by."""
        return f"{self.row}/{self.index}"


def draw_item(seed: int, row: str, index: int) -> Item:
    """Every second edit is asked for without a mark."""
    triplet = draw_triplet(seed, SPLIT, index, ROWS[row].task, ROWS[row].op)
    if triplet.plain is None:
        return Item(row, index, triplet, triplet.prompt, None)
    is_plain = index % 2 == 1
    text, wording = (triplet.plain, "plain") if is_plain else (triplet.prompt, "mark")
    return Item(row, index, triplet, text, wording)


def draw_items(seed: int, row: str, indices: list[int], size: int) -> Iterator[list[Item]]:
    """Items in batches of at most a size."""
    for start in range(0, len(indices), size):
        yield [draw_item(seed, row, index) for index in indices[start : start + size]]
