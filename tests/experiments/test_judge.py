"""Reading pictures: which toy is in a box, which toys are there; on renders and by hand."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.judge import find_instances, judge_boxes
from imagelab.boxes import Box
from toybox.classifier.boxes import covered, read_boxes
from toybox.classifier.network import CROP, SCENE, load_classifier
from toybox.scenes.instances import EXAMPLES, example_scene
from toybox.scenes.scenes import Placement, Scene, render
from toybox.scenes.toys import KINDS, Look

BLANK = Image.new("RGB", (128, 128))
WHOLE = Box(0, 0, 1, 1)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


class Told:
    """Stands in for the classifier: what each cell shows is given.

    Args:
        kinds: [rows, columns] names of kinds, "" for the background; one name for all.
        hues: [rows, columns] in degrees; one number for all.
        cells: rows and columns.
        seen: how surely each kind is seen; the rest is background.
    """

    def __init__(self, kinds, hues, cells=CROP // 8, seen=1.0):
        kinds = np.broadcast_to(kinds, (cells, cells))
        hues = np.broadcast_to(np.deg2rad(hues), (cells, cells))
        shares = seen * (kinds == np.array(["", *KINDS])[:, None, None])
        shares[0] = 1 - shares[1:].sum(0)
        self.logits = torch.from_numpy(np.log(shares.clip(1e-20)))[None].float()
        self.vectors = torch.from_numpy(np.stack([np.cos(hues), np.sin(hues)]))[None].float()

    def __call__(self, pictures):
        self.shown = pictures
        return self.logits, self.vectors


def boxes_of(masks: np.ndarray) -> list[Box]:
    """The bounding boxes of masks [toys, height, width]."""
    boxes = []
    for mask in masks:
        height, width = mask.shape
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        low, high = (columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)
        boxes.append(Box(low[0] / width, low[1] / height, high[0] / width, high[1] / height))
    return boxes


# ----------------------------------------------------------------------------------------------
# what is in a box, on renders


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_toy_is_right_in_its_box_and_wrong_in_another_s(name, classifier):
    looks = EXAMPLES[name].looks
    picture, masks = render(example_scene(EXAMPLES[name]), 128)
    boxes, own = boxes_of(masks), list(range(len(looks)))
    judged = judge_boxes(classifier, picture, boxes, own, looks)
    assert [each.kind for each in judged] == [look.kind for look in looks]
    assert all(each.is_right and each.error < 10 for each in judged)
    exchanged = judge_boxes(classifier, picture, boxes, own[1:] + own[:1], looks)
    assert not any(each.is_right for each in exchanged)
    assert [each.hue for each in exchanged] == [each.hue for each in judged]  # same boxes
    turned = judge_boxes(classifier, picture, boxes[::-1], own[::-1], looks)
    assert all(each.is_right for each in turned)


def test_toys_in_corners(classifier):
    looks = (Look("duck", 52), Look("duck", 92), Look("fox", 14))
    places = ((0.16, 0.16), (0.84, 0.84), (0.84, 0.16))
    toys = tuple(Placement(look, *at, 0.32) for look, at in zip(looks, places, strict=True))
    picture, masks = render(Scene(toys, "on the grass", (0, 0, 0), 0), 128)
    boxes = [Box(0, 0, 0.32, 0.32), Box(0.68, 0.68, 1, 1), Box(0.68, 0, 1, 0.32)]
    judged = judge_boxes(classifier, picture, boxes, (0, 1, 2), looks)
    assert all(each.is_right for each in judged)
    judged = judge_boxes(classifier, picture, boxes, (1, 0, 2), looks)
    assert [each.is_right for each in judged] == [False, False, True]


def test_a_toy_of_another_hue_is_wrong_where_no_instance_is_nearer(classifier):
    scene = Scene((Placement(Look("fox", 100), 0.5, 0.5, 0.6),), None, (200, 200, 200), 0)
    picture, _ = render(scene, 128)
    for hue, is_right in ((100, True), (115, True), (140, False), (280, False)):
        [judged] = judge_boxes(
            classifier, picture, [Box(0.2, 0.2, 0.8, 0.8)], [0], [Look("fox", hue)]
        )
        assert judged.is_right == is_right
        assert judged.error == pytest.approx(hue - 100, abs=8)


# ----------------------------------------------------------------------------------------------
# what is in a box, by hand


PHOTO = (Look("fox", 100), Look("fox", 130), Look("cat", 350))


@pytest.mark.parametrize(
    ("own", "kind", "hue", "error", "is_right"),
    [
        (0, "fox", 100, 0, True),
        (0, "fox", 76, 24, True),
        (0, "fox", 74, 26, False),  # nearest, but too far
        (0, "fox", 114, 14, True),  # 16 from the other fox
        (0, "fox", 116, 16, False),  # 14 from the other fox
        (1, "fox", 116, 14, True),
        (1, "fox", 154, 24, True),
        (1, "fox", 156, 26, False),
        (0, "cat", 100, 0, False),
        (0, "bear", 100, 0, False),
        (2, "cat", 350, 0, True),
        (2, "cat", 14, 24, True),  # over 360
        (2, "cat", 16, 26, False),
        (2, "fox", 350, 0, False),
    ],
)
def test_kind_and_nearest_hue_of_the_photo(own, kind, hue, error, is_right):
    [judged] = judge_boxes(Told(kind, hue), BLANK, [WHOLE], [own], PHOTO)
    assert judged.kind == kind
    assert judged.hue == pytest.approx(hue, abs=0.01)
    assert judged.error == pytest.approx(error, abs=0.01)
    assert judged.is_right == is_right


def test_a_hue_nearer_to_an_instance_of_another_kind_is_wrong():
    photo = (Look("fox", 100), Look("cat", 120))
    [judged] = judge_boxes(Told("fox", 112), BLANK, [WHOLE], [0], photo)
    assert not judged.is_right
    [judged] = judge_boxes(Told("fox", 108), BLANK, [WHOLE], [0], photo)
    assert judged.is_right


@pytest.mark.parametrize(("cells", "is_right"), [(5, False), (6, False), (7, True), (12, True)])
def test_a_box_that_hardly_shows_its_toy_is_wrong(cells, is_right):
    """A tenth of 8×8 cells is 6.4 of them; the others are background."""
    kinds = np.full((8, 8), "", dtype=object)
    kinds.flat[:cells] = "fox"
    [judged] = judge_boxes(Told(kinds, np.full((8, 8), 100)), BLANK, [WHOLE], [0], PHOTO)
    assert judged.cover == pytest.approx(cells / 64, abs=1e-3)
    assert (judged.kind, judged.is_right) == ("fox", is_right)


def test_covered():
    found = covered((0.1, 0.8), 8).tolist()  # eighths end at 0.125, …, 0.75, 0.875
    assert found == pytest.approx([0.2, 1, 1, 1, 1, 1, 0.4, 0], abs=1e-6)
    assert covered((0.3, 0.4), 4).tolist() == pytest.approx([0, 0.4, 0, 0], abs=1e-6)
    assert covered((-0.5, 1.5), 3).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_only_what_is_inside_the_box_counts():
    """A box of 64 pixels in the corner: the window has 80, of whose 8 cells it covers 6.4."""
    kinds, hues = np.full((8, 8), "bus", dtype=object), np.full((8, 8), 90)
    kinds[:6, :4], hues[:6, :4] = "car", 0
    kinds[0], hues[0] = "", 180  # background, whose hue says nothing
    ((kind, cover, hue),) = read_boxes(Told(kinds, hues), BLANK, [Box(0, 0, 0.5, 0.5)])
    # car: 5 rows of 4; bus: 5 rows of 2.4 and 0.4 rows of 6.4 (in the window: 20 cells and 36)
    assert kind == "car"
    assert cover == pytest.approx(20 / 6.4**2, abs=1e-4)
    assert hue == pytest.approx(np.rad2deg(np.arctan2(14.56, 20)), abs=1e-3)
    assert read_boxes(Told(kinds, hues), BLANK, [WHOLE])[0].kind == "bus"


def test_a_wide_box_covers_columns_of_its_window():
    """64 by 32 pixels of a window of 80: 6.4 columns and 3.2 rows."""
    kinds, hues = np.full((8, 8), "bus", dtype=object), np.full((8, 8), 90)
    kinds[:3], hues[:3] = "car", 0
    ((kind, cover, hue),) = read_boxes(Told(kinds, hues), BLANK, [Box(0, 0, 0.5, 0.25)])
    assert kind == "car"  # 3 rows of 6.4, and 0.2 of them of the bus
    assert hue == pytest.approx(np.rad2deg(np.arctan2(1.28, 19.2)), abs=1e-3)


@pytest.mark.parametrize(
    ("box", "left", "top", "side"),
    [
        (Box(0.25, 0.25, 0.75, 0.75), 24, 24, 80),  # 64 pixels from 32 on: 8 more on each side
        (Box(0.25, 0.375, 0.75, 0.625), 24, 24, 80),  # its longer side counts
        (Box(0.75, 0, 1, 0.25), 88, 0, 40),  # moved into the picture
        (Box(0, 0.75, 0.25, 1), 0, 88, 40),
        (Box(0, 0, 1, 1), 0, 0, 128),
    ],
)
def test_the_window_around_a_box(box, left, top, side):
    ramp = np.arange(128, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], 0), -1)
    told = Told("car", 0)
    read_boxes(told, Image.fromarray(pixels.astype(np.uint8)), [box])
    assert told.shown.shape == (1, 3, CROP, CROP)
    red, green, _ = (told.shown[0] + 1) * 127.5  # each pixel's column and row
    at = (np.arange(4, 60) + 0.5) * side / CROP - 0.5  # where the middles of its pixels lie
    np.testing.assert_allclose(red[10, 4:60], left + at, atol=0.51)
    np.testing.assert_allclose(green[4:60, 10], top + at, atol=0.51)


def test_the_window_in_a_wide_picture():
    """It is as high as the picture, and the box covers all of it."""
    kinds = np.full((8, 8), "car", dtype=object)
    kinds[:, 5:] = "bus"
    wide = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (64, 1)))
    told = Told(kinds, 0)
    assert read_boxes(told, wide, [WHOLE])[0].kind == "car"  # 5 columns of 8
    red = (told.shown[0, 0] + 1) * 127.5
    np.testing.assert_allclose(red[30, 4:60], np.arange(36, 92), atol=0.51)


# ----------------------------------------------------------------------------------------------
# who is there


@pytest.mark.parametrize("name", EXAMPLES)
def test_who_is_there_and_who_is_not(name, classifier):
    """Of an example's toys, every selection."""
    scene, looks = example_scene(EXAMPLES[name]), EXAMPLES[name].looks
    everyone = range(len(looks))
    shown = [each for count in range(len(looks) + 1) for each in combinations(everyone, count)]
    scenes = [replace(scene, toys=tuple(scene.toys[toy] for toy in each)) for each in shown]
    found = find_instances(classifier, [render(each, 128)[0] for each in scenes], looks)
    assert found.shape == (2 ** len(looks), len(looks))
    assert found.tolist() == [[toy in each for toy in everyone] for each in shown]


def test_look_alikes_that_the_photo_does_not_show_are_nobody(classifier):
    looks = (Look("fox", 14), Look("fox", 40))
    others = (Look("fox", 140), Look("cat", 14))
    toys = tuple(
        Placement(look, x, 0.5, 0.45) for look, x in zip(others, (0.25, 0.75), strict=True)
    )
    picture, _ = render(Scene(toys, None, (200, 200, 200), 0), 128)
    assert find_instances(classifier, [picture], looks).tolist() == [[False, False]]
    assert find_instances(classifier, [picture], others).tolist() == [[True, True]]


def find_by_hand(kind: str, hue: float, cells: int = 144, seen: float = 1.0) -> list[bool]:
    """Who of PHOTO is there, if so many of a scene's 144 cells show this."""
    kinds = np.full(144, "", dtype=object)
    kinds[:cells] = kind
    told = Told(kinds.reshape(12, 12), hue, SCENE // 8, seen)
    [found] = find_instances(told, [BLANK], PHOTO)
    assert told.shown.shape == (1, 3, SCENE, SCENE)
    return found.tolist()


def test_cells_that_show_an_instance():
    assert find_by_hand("fox", 100) == [True, False, False]
    assert find_by_hand("fox", 114) == [True, False, False]
    assert find_by_hand("fox", 116) == [False, True, False]
    assert find_by_hand("fox", 76) == [True, False, False]
    assert find_by_hand("fox", 74) == [False] * 3  # 26 degrees off
    assert find_by_hand("cat", 14) == [False, False, True]  # over 360
    assert find_by_hand("cat", 16) == [False] * 3
    assert find_by_hand("cat", 100) == [False] * 3
    assert find_by_hand("bear", 100) == [False] * 3


def test_an_instance_of_another_kind_takes_no_hue_away():
    told = Told("fox", 112, SCENE // 8)
    photo = (Look("fox", 100), Look("cat", 120))
    assert find_instances(told, [BLANK], photo).tolist() == [[True, False]]


def test_an_instance_covers_a_share_at_least():
    """Of 144 cells 1.5 percent, which is 2.16; a cell counts as far as it is seen."""
    assert find_by_hand("fox", 130, cells=2) == [False] * 3
    assert find_by_hand("fox", 130, cells=3) == [False, True, False]
    assert find_by_hand("fox", 130, cells=7, seen=0.3) == [False] * 3  # 2.1
    assert find_by_hand("fox", 130, cells=8, seen=0.3) == [False, True, False]  # 2.4
