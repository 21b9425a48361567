"""From rows to shares, intervals and tables, worked by hand."""

import numpy as np
import pytest
from PIL import Image

from experiments.tables import (
    markdown,
    marked,
    mean_separation,
    mean_share,
    of_task,
    other_there,
    own_there,
    right_boxes,
    right_kinds,
    share,
)
from imagelab.evaluation.report import Mean

T1, T2 = 12.706205, 4.302653  # Student's t of 97.5 % with one and two degrees of freedom
KINDS = ["fox", "cat", "bear"]


def row(*pictures, assets=(0, 1), **more) -> dict:
    """Boxed pictures; each is a text of one letter a box: r right, h wrong hue, k wrong kind."""
    judged = [
        [
            {"kind": "van" if letter == "k" else KINDS[asset], "is_right": letter == "r"}
            for letter, asset in zip(picture, assets, strict=True)
        ]
        for picture in pictures
    ]
    return {"assets": list(assets), "judged": judged, **more}


def found(*there, assets=(0,), **more) -> dict:
    """Pictures without boxes; each is a text such as "x.x": which instances are there."""
    shown = [[letter == "x" for letter in picture] for picture in there]
    return {"assets": list(assets), "there": shown, "judged": [], **more}


# ----------------------------------------------------------------------------------------------
# measures of a row


def test_right_boxes_and_kinds():
    one = row("rh", "kr", "hk")
    assert right_boxes(one) == [True, False, False, True, False, False]
    assert right_kinds(one, KINDS) == [True, True, False, True, True, False]
    other = row("rr", assets=(2, 0))
    assert right_kinds(other, KINDS) == [True, True]
    assert right_kinds(other, ["bear", "cat", "fox"]) == [False, False]


def test_own_and_others_there():
    alone = found("x..", ".x.", "xx.", "...")
    assert own_there(alone) == [True, False, True, False]
    assert other_there(alone) == [False, True, True, False]
    two = found("x.x", ".xx", "..x", assets=(2, 0))
    assert own_there(two) == [True, True, True, False, True, False]
    assert other_there(two) == [False, True, False]
    assert other_there(found("xxx", "...", assets=(0, 1, 2))) == [False, False]


def test_share_is_over_all_values():
    rows = [row("rh"), row("rr", "rr", "rk")]
    assert share(rows, right_boxes) == 6 / 8  # and not the mean of 1/2 and 5/6
    assert share([], right_boxes) is None
    assert share([found("x")], right_boxes) is None
    assert share(iter(rows), right_boxes) == 6 / 8


def test_rows_of_a_task():
    names = ("boxed", "alone 0", "unboxed", "alone 1", "alone 10")
    rows = [{"task": name} for name in names]
    assert [each["task"] for each in of_task(rows, "alone")] == ["alone 0", "alone 1", "alone 10"]
    assert of_task(rows, "boxed") == rows[:1]
    assert of_task(rows, "unboxed") == rows[2:3]
    assert of_task(rows, "three") == []


# ----------------------------------------------------------------------------------------------
# means and intervals


def test_mean_share_over_groups():
    rows = [
        row("rr", way="a", folder="x"),  # a, x: of 8 boxes 6
        row("rr", "rr", "hk", way="a", folder="x"),
        row("rh", way="a", folder="y"),  # a, y: 1/2
        row("rr", way="b", folder="x"),  # b, x: 1
        found("x", way="b", folder="y"),  # no box: no group
    ]
    mean, half = mean_share(rows, right_boxes, ["way", "folder"])  # 3/4, 1/2, 1
    assert (mean, half) == (0.75, pytest.approx(T2 * 0.25 / 3**0.5))
    mean, half = mean_share(rows, right_boxes, ["way"])  # 7/10, 1
    assert (mean, half) == (pytest.approx(0.85), pytest.approx(T1 * 0.15))
    mean, half = mean_share(rows, right_boxes, ["folder"])  # 8/10, 1/2
    assert (mean, half) == (pytest.approx(0.65), pytest.approx(T1 * 0.15))
    assert mean_share(rows[:2], right_boxes, ["way"]) == Mean(0.75, None)
    assert mean_share([], right_boxes, ["way"]) is None


def test_mean_separation_counts_a_learned_folder_once():
    rows = [
        {"way": "a", "folder": "x", "separation": [0.25, 0.75]},
        {"way": "a", "folder": "x", "separation": [0.25, 0.75]},
        {"way": "b", "folder": "x", "separation": [1.0, 1.0]},
    ]
    mean, half = mean_separation(rows)  # 1/2 and 1
    assert (mean, half) == (0.75, pytest.approx(T1 * 0.25))
    assert mean_separation([]) is None


def test_markdown():
    text = markdown(["a", "b"], [["x", None], [Mean(0.5, 0.25), 3], [Mean(1.0, None), ""]])
    assert text.splitlines() == [
        "| a | b |",
        "|---|---|",
        "| x | – |",
        "| 0.500 ± 0.250 | 3 |",
        "| 1.000 |  |",
    ]


# ----------------------------------------------------------------------------------------------
# pictures


@pytest.fixture
def painted(tmp_path):
    """A row of two grey pictures of 40 by 20 pixels, and the folder that they are in."""
    folder = tmp_path / "pictures/way/x/boxed"
    folder.mkdir(parents=True)
    for index, level in enumerate((80, 120)):
        Image.new("RGB", (40, 20), (level,) * 3).save(folder / f"{index:02d}.png")
    boxes = [[0.0, 0.0, 0.4, 1.0], [0.5, 0.1, 0.95, 0.9]]
    names = ["boxed/00.png", "boxed/01.png"]
    return row("rh", "kr", way="way", folder="x", boxes=boxes, pictures=names), tmp_path


def frame(left, top, right, bottom, width) -> np.ndarray:
    """Bool [20, 40]: the outermost pixels of a rectangle; right and bottom are outside."""
    mask = np.zeros((20, 40), bool)
    mask[top:bottom, left:right] = True
    mask[top + width : bottom - width, left + width : right - width] = False
    return mask


def test_wrong_boxes_are_marked(painted):
    one, work = painted
    for index, level in enumerate((80, 120)):
        expected = np.full((20, 40, 3), level, np.uint8)
        is_wrong = [[False, True], [True, False]][index]
        for sides, wrong in zip(((0, 0, 16, 20), (20, 2, 38, 18)), is_wrong, strict=True):
            colour = (255, 0, 0) if wrong else (255, 255, 255)
            expected[frame(*sides, 3 if wrong else 1)] = colour
        np.testing.assert_array_equal(np.asarray(marked(one, index, work)), expected)


def test_a_picture_without_boxes_is_unmarked(painted):
    one, work = painted
    plain = found("x", way="way", folder="x", boxes=[], pictures=["boxed/01.png"])
    assert np.unique(np.asarray(marked(plain, 0, work))).tolist() == [120]
