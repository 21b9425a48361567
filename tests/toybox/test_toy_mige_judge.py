"""The judge of toy MIGEs: by hand where it counts, on renders where the classifier answers."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from toybox.classifier.boxes import Seen, read_boxes
from toybox.classifier.network import load_classifier
from toybox.mige.judge import (
    detail,
    is_ground,
    judge,
    judge_edit,
    judge_subject,
    judge_subject_edit,
    l1,
)
from toybox.mige.sight import Sight, View
from toybox.scenes import triplets
from toybox.scenes.edits import Change
from toybox.scenes.scenes import GROUNDS, Placement, Scene, render
from toybox.scenes.toys import KINDS, Look
from toybox.scenes.triplets import OPS, SIDE, Shown, Triplet, draw_triplet
from toybox.scenes.wording import MARK, TASKS, Wording

EACH = [(task, op) for task in TASKS for op in OPS[task]]
CAR, CAT, BUS = Look("car", 0.0), Look("cat", 220.0), Look("bus", 120.0)
SAND = (222, 196, 146)


@cache
def classifier():
    return load_classifier()


def scene(*toys: Placement, ground: str | None = None) -> Scene:
    return Scene(toys, ground, (200, 200, 205), 3)


def at(look: Look, x: float, y: float = 0.5, size: float = 0.4) -> Placement:
    return Placement(look, x, y, size)


def painted(*toys: Placement, ground: str | None = None) -> Image.Image:
    return render(scene(*toys, ground=ground), SIDE, sprites=SIDE)[0]


def edit(op: str, before: Scene, after: Scene, old, new, text: str = "", subject=None) -> Triplet:
    """An edit in which one toy changes."""
    order = ("source",) if subject is None else ("source", "subject")
    task = "edit" if subject is None else "subject_edit"
    change = Change(before, after, op, old, new)
    return triplets._edit(task, op, change, Wording(text, order, text), subject)


def checks(triplet: Triplet, *toys: Placement, ground: str | None = None) -> dict[str, bool]:
    return judge(classifier(), painted(*toys, ground=ground), triplet)


def wrong(found: dict[str, bool]) -> set[str]:
    return {name for name, value in found.items() if not value}


# ----------------------------------------------------------------------------------------------
# what is seen, by hand


def sight(cells: int = 4, **areas) -> Sight:
    """Kinds by name as (rows, columns, hue): cells that they fill."""
    kinds = np.zeros((len(KINDS), cells, cells), np.float32)
    vectors = np.zeros((2, cells, cells), np.float32)
    for name, (rows, columns, hue) in areas.items():
        kinds[KINDS.index(name.rstrip("_")), rows, columns] = 1
        angle = np.deg2rad(hue)
        vectors[:, rows, columns] = np.array([np.cos(angle), np.sin(angle)])[:, None, None]
    return Sight(kinds, vectors)


def test_a_toy_is_found_with_its_area_spread_and_hue():
    seen = sight(car=(slice(0, 2), slice(0, 2), 350))
    # four of 16 cells; each is 1/8 from the middle in both axes: 1/32 over an area of 1/4
    assert seen.find(CAR) == pytest.approx((0.25, 0.125, 350), abs=1e-3)
    far = sight(car=(slice(0, 1), slice(0, 1), 90), car_=(slice(3, 4), slice(3, 4), 90))
    # 3/8 from the middle in both axes: 9/32 over an area of 1/8
    assert far.find(CAR) == pytest.approx((0.125, 2.25, 90), abs=1e-3)
    assert far.find(CAT).area == 0


def test_toys_of_a_kind_are_told_apart_by_the_nearer_hue():
    seen = sight(car=(slice(0, 1), slice(0, 4), 20), car_=(slice(1, 4), slice(0, 4), 200))
    red, teal = Look("car", 355), Look("car", 178)
    assert seen.find(red, [teal]) == pytest.approx((0.25, 0.3125, 20), abs=1e-3)
    assert seen.find(teal, [red, CAT]).area == 0.75
    assert seen.find(red, [CAT]).area == 1


def test_area_besides_some_kinds_and_boxes():
    seen = sight(car=(slice(0, 2), slice(0, 4), 0), cat=(slice(2, 3), slice(0, 2), 0))
    assert seen.area_besides() == 10 / 16
    assert seen.area_besides(["car"]) == 2 / 16
    # the box touches columns 0 to 2 of rows 0 and 1
    assert seen.area_besides(boxes=[(0.05, 0.1, 0.51, 0.4)]) == 4 / 16
    assert seen.area_besides(["cat"], [(0.0, 0.0, 0.25, 0.25)]) == 7 / 16


def test_pixels_get_what_their_cells_show():
    seen = sight(2, car=(slice(0, 1), slice(0, 2), 0))
    shown = seen.toys((8, 4))
    assert shown.shape == (4, 8)
    assert (shown[0] == 1).all()
    assert (shown[-1] == 0).all()


class HalfAndHalf(torch.nn.Module):
    """Sees a car of 90 degrees in the three columns on the left, and a bus of 180 elsewhere.

    In the two rows at the top it sees nothing.
    """

    def forward(self, pictures):
        rows, columns = (side // 8 for side in pictures.shape[2:])
        logits = torch.zeros(len(pictures), 1 + len(KINDS), rows, columns)
        logits[:, 1 + KINDS.index("car"), 2:, :3] = 50
        logits[:, 1 + KINDS.index("bus"), 2:, 3:] = 50
        logits[:, 0, :2] = 50
        vectors = torch.zeros(len(pictures), 2, rows, columns)
        vectors[:, 1, :, :3] = 1
        vectors[:, 0, :, 3:] = -1
        self.seen = pictures
        return logits, vectors


def test_a_box_is_read_in_a_window_around_it():
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, 24:104] = 255
    # windows of 80 pixels, 24 to 104, whose cells have 10; the boxes are 8 to 72 in them
    model, middle = HalfAndHalf(), (0.25, 0.25, 0.75, 0.75)
    (seen,) = read_boxes(model, Image.fromarray(pixels), [middle])
    assert model.seen.shape == (1, 3, 64, 64)
    assert model.seen[..., 1:-1].min() == 1
    assert seen.kind == "bus"
    assert seen.cover == pytest.approx((72 - 30) / 64 * (72 - 20) / 64)
    car, bus = 22, 42
    assert seen.hue == pytest.approx(180 - np.rad2deg(np.arctan2(car, bus)), abs=1e-3)
    # at the edge the window is moved in: 0 to 80 across, of which the box is 0 to 64; down it is 24
    # to 56 of 40 to 120, where nothing is missing
    (seen,) = read_boxes(model, Image.fromarray(pixels), [(0, 0.5, 0.5, 0.75)])
    assert seen.kind == "bus"
    assert seen.cover == pytest.approx(34 / 64)
    assert model.seen[..., :18].max() == -1
    assert model.seen[..., 22:].min() == 1
    assert read_boxes(model, Image.fromarray(pixels), []) == []


def test_l1_by_hand():
    black = Image.new("RGB", (2, 1))
    other = black.copy()
    other.putpixel((1, 0), (51, 102, 0))
    assert l1(black, other) == pytest.approx((0.2 + 0.4) / 6)
    assert l1(black, other, np.array([[False, True]])) == pytest.approx(0.2)
    assert l1(black, other, np.array([[True, False]])) == 0


def test_a_ground_is_that_of_most_pixels_and_not_far_on_the_whole():
    grass = GROUNDS["on the grass"][0]
    assert is_ground(np.array([SAND] * 80 + [(215, 200, 150)] * 20, float), "on the sand")
    # of an amplitude of 14, the mean may be 7 + 12 away; four of five have to be nearest
    assert is_ground(np.array([SAND] * 10, float) - [18.5, 0, 0], "on the sand")
    assert not is_ground(np.array([SAND] * 10, float) - [19.5, 0, 0], "on the sand")
    assert is_ground(np.array([SAND] * 85 + [(232, 238, 246)] * 15, float), "on the sand")
    assert not is_ground(np.array([SAND] * 79 + [(232, 238, 246)] * 21, float), "on the sand")
    assert not is_ground(np.array([grass] * 10, float), "on the sand")
    assert not is_ground(np.zeros((0, 3)), "on the sand")


# ----------------------------------------------------------------------------------------------
# thresholds, by hand


class Told:
    """A view that sees what it is told."""

    def __init__(self, scene: Sight, *seen: Seen, picture=None):
        self.scene, self.seen = scene, seen
        self.picture = picture or Image.new("RGB", (SIDE, SIDE))

    def read(self, boxes):
        return list(self.seen[: len(boxes)])


def facts(op: str, *toys: Shown, task: str = "edit", prompt: str = "") -> Triplet:
    mask = np.zeros((SIDE, SIDE), bool)
    return Triplet(
        task, op, prompt, Image.new("RGB", (SIDE, SIDE)), (), 0, mask, toys, None, None, None,
        (None, ""),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "is_right"),
    [
        (Seen("car", 0.3, 25.0), True),
        (Seen("car", 0.3, 335.0), True),
        (Seen("car", 0.3, 25.1), False),
        (Seen("car", 0.29, 0.0), False),  # half of what the target shows
        (Seen("van", 0.9, 0.0), False),
    ],
)
def test_what_is_right_in_a_box(seen, is_right):
    box, empty = (0.1, 0.1, 0.4, 0.4), sight()
    new = Shown(CAR, box, is_new=True)
    target = Told(empty, Seen("car", 0.6, 3.0))
    found = judge_edit(Told(empty, seen), target, facts("recolour", new))
    assert found == {"change": is_right, "others": True, "alone": True}
    other = new._replace(is_new=False)
    found = judge_edit(Told(empty, seen), target, facts("remove", other))
    assert found == {"change": True, "others": is_right, "alone": True}
    found = judge_subject_edit(
        Told(empty, seen), target, facts("replace", new, task="subject_edit")
    )
    is_kind = seen.kind == "car" and seen.cover >= 0.3
    assert found == {"kind": is_kind, "hue": is_right, "others": True, "alone": True}


def test_what_is_stray():
    """Of 40 x 40 cells 40 are 0.025 of the picture; those that the target shows are not counted."""
    row = slice(0, 1), slice(0, 39), 0
    more = slice(0, 2), slice(0, 21), 0
    triplet = facts("remove", Shown(CAR, (0.0, 0.5, 0.5, 1.0)))
    seen = Seen("car", 0.5, 0.0)
    inside = sight(40, car=(slice(20, 40), slice(0, 20), 0))
    for own, scene_, is_alone in (
        (sight(40), sight(40, cat=row), True),
        (sight(40), sight(40, cat=more), False),
        (sight(40, cat=row), sight(40, cat=more), True),
        (sight(40), inside, True),
        (sight(40), sight(40, car=more), False),
    ):
        found = judge_edit(Told(scene_, seen), Told(own, seen), triplet)
        assert found["alone"] == is_alone


@pytest.mark.parametrize(
    ("level", "width", "is_back"),
    [(25, 64, True), (26, 64, False), (255, 1, True), (255, 2, False)],
)
def test_the_ground_is_measured_where_the_toy_was_and_is_no_more(level, width, is_back):
    """Of 255 levels 25 are .098; a column of 32 pixels cannot be told, two can.

    The new toy, in the left half, may look as it likes.
    """
    triplet = facts("move", Shown(CAR, (0.0, 0.0, 0.5, 0.25), is_new=True))
    triplet.mask[:32, : 64 + width] = True
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:32, :64] = 255
    pixels[:32, 64 : 64 + width] = level
    pixels[32:] = 255  # outside of the mask
    seen = Seen("car", 0.5, 0.0)
    views = Told(sight(), seen, picture=Image.fromarray(pixels)), Told(sight(), seen)
    assert judge_edit(*views, triplet)["change"] == is_back


def test_a_toy_may_be_added_anywhere_if_no_word_says_where():
    new = Shown(CAR, (0.0, 0.0, 0.5, 0.5), is_new=True)
    own = sight(10, car=(slice(0, 4), slice(0, 5), 0))
    for cells, kind in ((10, True), (9, False), (40, True), (41, False)):
        kinds = np.zeros((len(KINDS), 10, 10), np.float32)
        kinds[KINDS.index("car")].reshape(-1)[-cells:] = 1
        vectors = np.stack([np.ones((10, 10)), np.zeros((10, 10))])
        found = judge_edit(
            Told(Sight(kinds, vectors), Seen("cat", 0.0, 0.0)),
            Told(own, Seen("car", 0.8, 0.0)),
            facts("add", new, prompt=f"add a red car to{MARK}"),
        )
        assert found == {"change": kind, "others": True, "alone": True}
    told = facts("add", new, prompt=f"add a red car to{MARK}on the left")
    found = judge_edit(
        Told(Sight(kinds, vectors), Seen("cat", 0.0, 0.0)), Told(own, Seen("car", 0.8, 0.0)), told
    )
    assert wrong(found) == {"change", "alone"}


def test_subjects_have_to_be_there_once():
    triplet = replace(facts("one", Shown(CAR, (0, 0, 1, 1), 0), task="subject"), source=None)
    own = Told(sight(20, car=(slice(5, 10), slice(5, 10), 0)))
    for areas, missing in (
        ({"car": (slice(12, 14), slice(3, 5), 24)}, set()),  # smaller, elsewhere
        ({"car": (slice(12, 14), slice(3, 5), 26)}, {"hue"}),
        ({"car": (slice(12, 13), slice(3, 6), 0)}, {"kind", "hue"}),  # 3 of 400 cells
        ({"car": (slice(0, 4), slice(0, 4), 0), "car_": (slice(15, 19), slice(15, 19), 0)},
         {"alone"}),
        ({"car": (slice(0, 4), slice(0, 4), 0), "cat": (slice(9, 10), slice(0, 9), 0)}, set()),
        ({"car": (slice(0, 4), slice(0, 4), 0), "cat": (slice(9, 10), slice(0, 11), 0)},
         {"alone"}),
    ):  # fmt: skip
        found = judge_subject(Told(sight(20, **areas)), own, triplet)
        assert wrong(found) == missing
        assert set(found) == {"kind", "hue", "alone"}


# ----------------------------------------------------------------------------------------------
# renders


@pytest.mark.parametrize(("task", "op"), EACH)
def test_targets_are_right_and_all_else_is_wrong(task, op):
    drawn = [draw_triplet(3, "test", index, task, op) for index in range(4)]
    for index, triplet in enumerate(drawn[:3]):
        assert judge(classifier(), triplet.target, triplet)["right"], index
        assert not judge(classifier(), drawn[index + 1].target, triplet)["right"], index
        blurred = triplet.target.filter(ImageFilter.GaussianBlur(4))
        assert judge(classifier(), blurred, triplet)["crisp"] == (not triplet.toys), index
        if triplet.source is not None:
            source = triplet.entities[triplet.source]
            assert not judge(classifier(), source, triplet)["right"], index


def test_recolour():
    other = at(BUS, 0.75)

    def car(hue):
        return at(Look("car", hue), 0.25)

    triplet = edit("recolour", scene(car(0.0), other), scene(car(220.0), other), 0, 0)
    assert wrong(checks(triplet, car(232.0), other)) == set()
    assert wrong(checks(triplet, car(260.0), other)) == {"right", "change"}
    assert wrong(checks(triplet, at(CAT, 0.25), other)) == {"right", "change"}
    assert wrong(checks(triplet, car(220.0), at(replace(BUS, hue=220.0), 0.75))) == {
        "right", "others",
    }  # fmt: skip
    assert wrong(checks(triplet, car(220.0))) == {"right", "others"}


def test_replace():
    other = at(BUS, 0.75)
    before, after = scene(at(CAR, 0.25), other), scene(at(replace(CAT, hue=0.0), 0.25), other)
    free = edit("replace", before, after, 0, 0, f"swap the car in{MARK}for a cat")
    told = edit(
        "replace", before, after, 0, 0, f"replace the car in{MARK}with a cat of the same colour"
    )
    assert wrong(checks(free, at(CAT, 0.25), other)) == set()
    assert wrong(checks(told, at(CAT, 0.25), other)) == {"right", "change"}
    assert wrong(checks(told, at(replace(CAT, hue=0.0), 0.25), other)) == set()
    assert "change" in wrong(checks(free, at(CAT, 0.5, 0.2, 0.3), other))


def test_add():
    before, new = scene(at(BUS, 0.75, size=0.3)), at(CAT, 0.23)
    texts = (f"add a blue cat to{MARK}", f"add a blue cat to{MARK}on the left")
    anywhere, told = (
        edit("add", before, scene(*before.toys, new), None, 1, text) for text in texts
    )
    above = at(CAT, 0.4, 0.23, 0.36)
    assert wrong(checks(told, *before.toys, new)) == set()
    assert wrong(checks(anywhere, *before.toys, above)) == set()
    assert wrong(checks(told, *before.toys, above)) >= {"right", "change"}
    assert wrong(checks(anywhere, *before.toys, new, at(CAT, 0.7, 0.15, 0.3))) <= {
        "right", "change", "alone",
    }  # fmt: skip
    assert "alone" in wrong(checks(told, *before.toys, new, at(CAR, 0.6, 0.2, 0.3)))
    assert "others" in wrong(checks(told, new, at(CAT, 0.75, size=0.3)))


@pytest.mark.parametrize("ground", [None, "on the grass"])
def test_remove(ground):
    other = at(BUS, 0.75)
    triplet = edit(
        "remove", scene(at(CAR, 0.25), other, ground=ground), scene(other, ground=ground), 0, None
    )
    assert wrong(checks(triplet, other, ground=ground)) == set()
    again = painted(other, ground=ground)
    moved = render(replace(scene(other, ground=ground), texture_seed=8), SIDE, sprites=SIDE)[0]
    assert judge(classifier(), moved, triplet)["change"]  # no two pieces of grass are the same
    again.paste((150, 40, 60), (8, 48, 60, 84))  # a smear that is no toy
    assert "change" in wrong(judge(classifier(), again, triplet))
    assert wrong(checks(triplet, at(CAT, 0.25), other, ground=ground)) >= {"change", "alone"}
    assert wrong(checks(triplet, ground=ground)) >= {"others"}


def test_move():
    other = at(BUS, 0.75, 0.25, 0.3)
    old, new = at(CAR, 0.75, 0.7), at(CAR, 0.22, 0.7)
    triplet = edit("move", scene(old, other), scene(new, other), 0, 0)
    assert wrong(checks(triplet, new, other)) == set()
    assert wrong(checks(triplet, at(CAR, 0.26, 0.7, 0.38), other)) == set()
    assert "change" in wrong(checks(triplet, at(CAR, 0.5, 0.7), other))
    assert wrong(checks(triplet, old, new, other)) >= {"change", "alone"}
    mush = painted(new, other)
    mush.paste((150, 90, 90), (70, 70, 122, 110))  # where the car was
    assert "change" in wrong(judge(classifier(), mush, triplet))


@pytest.mark.parametrize("grows", [True, False])
def test_resize(grows):
    size = 0.4
    asked = size * (1.5 if grows else 1 / 1.5)
    triplet = edit("resize", scene(at(CAR, 0.5)), scene(at(CAR, 0.5, size=asked)), 0, 0)
    for factor, is_right in ((1, True), (1.1, True), (0.92, True)):
        found = checks(triplet, at(CAR, 0.5, size=asked * factor))
        assert found["right"] == is_right, factor
    half_way = size * (1.15 if grows else 1 / 1.1)
    assert "change" in wrong(checks(triplet, at(CAR, 0.5, size=half_way)))
    assert "change" in wrong(checks(triplet, at(CAR, 0.5, size=size)))
    assert not checks(triplet, at(CAR, 0.5, size=min(0.95, asked * 1.6)))["right"]
    assert "change" in wrong(checks(triplet, at(CAT, 0.5, size=asked)))


def test_ground():
    toys = at(CAR, 0.25), at(BUS, 0.75)
    triplet = edit("ground", scene(*toys), scene(*toys, ground="on the sand"), None, None)
    assert wrong(checks(triplet, *toys, ground="on the sand")) == set()
    assert wrong(checks(triplet, *toys, ground="in the snow")) == {"right", "change"}
    assert wrong(checks(triplet, at(CAR, 0.25), ground="on the sand")) == {"right", "others"}
    half = painted(*toys, ground="on the sand")
    half.paste(painted(*toys).crop((0, 0, SIDE, 64)), (0, 0))
    assert "change" in wrong(judge(classifier(), half, triplet))


def test_an_edit_with_a_subject():
    other = at(BUS, 0.75)
    before, after = scene(at(CAR, 0.25), other), scene(at(CAT, 0.25), other)
    triplet = edit("replace", before, after, 0, 0, "", scene(at(CAT, 0.5)))
    assert wrong(checks(triplet, at(CAT, 0.25), other)) == set()
    assert wrong(checks(triplet, at(replace(CAT, hue=280.0), 0.25), other)) == {"right", "hue"}
    assert wrong(checks(triplet, at(CAR, 0.25), other)) == {"right", "kind", "hue"}
    assert wrong(checks(triplet, at(CAT, 0.25))) == {"right", "others"}


def test_subjects():
    toys = at(CAR, 0.25), at(CAT, 0.75)
    shown = tuple(Shown(toy.look, (0, 0, 1, 1), place) for place, toy in enumerate(toys))
    prompt = f"a{MARK}and a{MARK}on the sand"
    triplet = Triplet(
        "subject", "two", prompt, painted(*toys, ground="on the sand"), (), None, None, shown,
        None, "on the sand", None, (None, ""),
    )  # fmt: skip
    elsewhere = at(CAR, 0.7, 0.2, 0.34), at(CAT, 0.25, 0.7, 0.46)
    assert wrong(checks(triplet, *elsewhere, ground="on the sand")) == set()
    swapped = at(replace(CAR, hue=220.0), 0.25), at(replace(CAT, hue=0.0), 0.75)
    assert wrong(checks(triplet, *swapped, ground="on the sand")) == {"right", "hue"}
    assert wrong(checks(triplet, toys[0], ground="on the sand")) >= {"kind", "hue"}
    assert wrong(checks(triplet, *elsewhere, at(BUS, 0.7, 0.75), ground="on the sand")) == {
        "right", "alone",
    }  # fmt: skip
    twice = at(CAR, 0.2, 0.2, 0.3), at(CAR, 0.2, 0.8, 0.3), at(CAT, 0.75)
    assert wrong(checks(triplet, *twice, ground="on the sand")) == {"right", "alone"}
    found = checks(triplet, *elsewhere, ground="in the snow")
    assert (found["ground"], found["right"]) == (False, True)
    assert "ground" not in checks(replace(triplet, prompt=f"a{MARK}and a{MARK}"), *toys)


def test_detail_is_about_the_same_at_all_sizes_and_lost_in_a_blur():
    small, large = (View(classifier(), painted(at(CAR, 0.5, size=size))) for size in (0.4, 0.75))
    assert detail(large) / detail(small) == pytest.approx(1, abs=0.5)
    blurred = View(classifier(), large.picture.filter(ImageFilter.GaussianBlur(3)))
    assert detail(blurred) < 0.35 * detail(large)
    assert detail(View(classifier(), painted())) == 0
