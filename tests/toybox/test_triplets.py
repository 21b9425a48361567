"""Triplets: one thing changes, what words say is there, references show the target's toys.

Pictures are measured by their pixels and by the classifier, which knows nothing of how they were
drawn.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toybox.classifier.boxes import read_boxes
from toybox.classifier.network import SCENE, load_classifier, to_input
from toybox.scenes import edits
from toybox.scenes.layouts import (
    clearance,
    draw_looks,
    draw_reference,
    fits,
    hue_distance,
    on_ground,
    stands_out,
)
from toybox.scenes.scenes import GROUNDS, Placement, Scene, render
from toybox.scenes.toys import HUES, KINDS, Look
from toybox.scenes.triplets import OPS, SIDE, WORDS, Triplet, box_of, draw_triplet
from toybox.scenes.wording import MARK, TASKS

EACH = [(task, op) for task in TASKS for op in OPS[task]]
CHANGES = [(task, op) for task, op in EACH if task != "subject"]
OF_A_TOY = [(task, op) for task, op in CHANGES if op != "ground"]
COUNT = 12  # of each op
PICTURES = Path(__file__).parents[2] / "example/pictures"
#: What they show, for the README's commands of MIGE.
SHIPPED = {
    ("subject", "two", 2): ("robot", "rocket"),
    ("edit", "recolour", 9): ("fox",),
    ("subject_edit", "replace", 6): ("tractor", "car"),
}


@cache
def drawn(task: str, op: str) -> list[Triplet]:
    return [draw_triplet(5, "test", index, task, op) for index in range(COUNT)]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=int)


def source_of(triplet: Triplet) -> np.ndarray:
    return pixels(triplet.entities[triplet.source])


def cropped(picture: np.ndarray, box) -> np.ndarray:
    left, top, right, bottom = (round(SIDE * edge) for edge in box)
    return picture[top:bottom, left:right]


def centre(box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@cache
def classifier():
    return load_classifier()


def read(picture: Image.Image, box) -> tuple[str, float, float]:
    return read_boxes(classifier(), picture, [box])[0]


def new_of(triplet: Triplet):
    (toy,) = (toy for toy in triplet.toys if toy.is_new)
    return toy


# ----------------------------------------------------------------------------------------------
# exactly one thing


@pytest.mark.parametrize(("task", "op"), CHANGES)
def test_outside_of_the_mask_nothing_differs_and_inside_nearly_all_does(task, op):
    for triplet in drawn(task, op):
        differs = (source_of(triplet) != pixels(triplet.target)).any(-1)
        assert not differs[~triplet.mask].any()
        assert differs[triplet.mask].mean() > 0.6
        assert 0.01 < triplet.mask.mean() < (1 if op == "ground" else 0.8)


@pytest.mark.parametrize(("task", "op"), OF_A_TOY)
def test_only_the_place_of_the_toy_before_and_after_is_changed(task, op):
    """A toy's sprite is square, and what is seen of it spans most of one of its sides."""
    for triplet in drawn(task, op):
        allowed = np.zeros((SIDE, SIDE), bool)
        for toy in (triplet.gone, *triplet.toys):
            if toy is not None and (toy is triplet.gone or toy.is_new):
                x, y = centre(toy.box)
                reach = 0.5 * 1.15 * max(toy.box[2] - toy.box[0], toy.box[3] - toy.box[1]) + 0.02
                inside = [
                    np.abs((np.arange(SIDE) + 0.5) / SIDE - middle) < reach for middle in (x, y)
                ]
                allowed |= inside[1][:, None] & inside[0]
        assert not (triplet.mask & ~allowed).any()
        assert len(triplet.toys) == {"add": 1}.get(op, 0) + len(
            [toy for toy in triplet.toys if not toy.is_new]
        ) + (op not in ("add", "remove"))


def test_a_recoloured_toy_has_the_hue_that_words_name_and_its_old_shape():
    for triplet in drawn("edit", "recolour"):
        new = new_of(triplet)
        named = [word for word in triplet.plain.split() if word in HUES][-1]
        kind, _, hue = read(triplet.target, new.box)
        assert HUES[named] == new.look.hue
        assert hue_distance(hue, HUES[named]) < 25
        assert hue_distance(triplet.gone.look.hue, new.look.hue) >= 45
        assert kind == new.look.kind == triplet.gone.look.kind
        assert new.box == triplet.gone.box
        assert replace(new.look, hue=0) == replace(triplet.gone.look, hue=0)


def test_a_replaced_toy_is_of_the_named_kind_in_the_same_colour_and_place():
    for triplet in drawn("edit", "replace"):
        new, old = new_of(triplet), triplet.gone
        kind, _, hue = read(triplet.target, new.box)
        assert f" {kind.replace('_', ' ')}" in triplet.plain
        assert hue_distance(hue, old.look.hue) < 25
        assert replace(new.look, kind=old.look.kind) == old.look
        assert kind != read(Image.fromarray(source_of(triplet).astype(np.uint8)), old.box)[0]
        assert np.abs(np.subtract(centre(new.box), centre(old.box))).max() < 0.1


def test_an_added_toy_is_the_one_of_the_words():
    for triplet in drawn("edit", "add"):
        new = new_of(triplet)
        kind, cover, hue = read(triplet.target, new.box)
        assert f" {new.look.colour} {kind.replace('_', ' ')}" in triplet.plain
        assert cover > 0.1
        assert hue_distance(hue, HUES[new.look.colour]) < 25
        assert triplet.gone is None
        assert kind not in [toy.look.kind for toy in triplet.toys[:-1]]
    for op in ("add", "replace"):  # a subject is of a kind that no other toy has
        for triplet in (draw_triplet(5, "train", index, "subject_edit", op) for index in range(40)):
            kinds = [toy.look.kind for toy in triplet.toys]
            assert kinds.count(new_of(triplet).look.kind) == 1
            assert triplet.gone is None or new_of(triplet).look.kind != triplet.gone.look.kind


@pytest.mark.parametrize("task", ["edit", "subject_edit"])
def test_an_added_toy_is_where_the_words_say(task):
    thirds = {"left": (0, 0), "right": (0, 2), "top": (1, 0), "bottom": (1, 2)}
    told = Counter()
    for index in range(40):
        triplet = draw_triplet(6, "train", index, task, "add")
        where = [1, 1]  # column and row of three
        if "middle" not in triplet.prompt:
            said = [word for word in thirds if word in triplet.prompt.replace(MARK, " ").split()]
            for word in said:
                axis, third = thirds[word]
                where[axis] = third
            told[" ".join(said)] += 1
            if not said:
                continue
        else:
            told["middle"] += 1
        assert [int(3 * edge) for edge in centre(new_of(triplet).box)] == where, triplet.prompt
    assert 10 < told[""] < 30
    assert len(told) > 7


def test_without_a_place_in_words_the_freest_one_is_taken():
    """A toy in the top left corner leaves most room in the opposite corner."""
    corner = Placement(Look("car", 0), 0.2, 0.2, 0.3)
    scene = Scene((corner,), None, (200, 200, 200), 0)
    rooms = {name: clearance(edits._new_at(at), scene.toys) for name, at in edits.PLACES.items()}
    # the other square is 0.4 wide: 0.77 - 0.2 - (0.3 + 0.4) / 2 = 0.22
    assert rooms["in the bottom right corner"] == pytest.approx(0.22)
    assert rooms["in the middle"] == pytest.approx(-0.05)
    assert max(rooms.values()) == pytest.approx(0.22)
    for seed in range(40):
        change = edits.add_named(np.random.default_rng(seed))
        if not change.fields["place"]:
            *others, new = change.after.toys
            places = [replace(new, x=x, y=y) for x, y in edits.PLACES.values()]
            rooms = [clearance(toy, others) for toy in places]
            assert clearance(new, others) == max(rooms) >= 0.02


def test_where_a_toy_was_removed_the_ground_is_whole():
    flat = 0
    for index in range(30):
        triplet = draw_triplet(5, "train", index, "edit", "remove")
        assert not any(toy.is_new for toy in triplet.toys)
        if triplet.ground is None:
            flat += 1
            inside = pixels(triplet.target)[triplet.mask]
            assert (inside == inside[0]).all()
        kind, cover, _ = read(triplet.target, triplet.gone.box)
        assert cover < 0.1 or kind != triplet.gone.look.kind
    assert flat > 5


def test_a_moved_toy_is_the_same_one_at_the_edge_of_its_side():
    for triplet in drawn("edit", "move"):
        new, old = new_of(triplet), triplet.gone
        side = next(word for word in ("left", "right") if word in triplet.plain.split())
        way = centre(new.box)[0] - centre(old.box)[0]
        assert (way < -0.2) if side == "left" else (way > 0.2)
        assert (new.box[0] if side == "left" else 1 - new.box[2]) < 0.16
        assert new.box[1::2] == old.box[1::2]
        if triplet.ground is None:
            before, after = source_of(triplet), pixels(triplet.target)
            np.testing.assert_array_equal(cropped(before, old.box), cropped(after, new.box))


def test_a_resized_toy_grows_or_shrinks_by_half_around_its_middle():
    told = Counter()
    for triplet in [draw_triplet(5, "train", index, "edit", "resize") for index in range(24)]:
        new, old = new_of(triplet), triplet.gone
        grows = bool({"bigger", "larger", "enlarge"} & set(triplet.plain.split()))
        told[grows] += 1
        for low, high in ((0, 2), (1, 3)):
            sides = [toy.box[high] - toy.box[low] for toy in (new, old)]
            assert sides[0] / sides[1] == pytest.approx(1.5 if grows else 1 / 1.5, rel=0.12)
        assert (
            np.abs(np.subtract(centre(new.box), centre(old.box))).max() < 0.06
        )  # shapes are off their centres
    assert min(told.values()) > 5


def test_another_ground_is_the_one_of_the_words_and_toys_stay():
    stuff = {text.split()[-1]: ground for ground in GROUNDS for text in [ground]}
    for triplet in drawn("edit", "ground"):
        said = [stuff[word] for word in triplet.plain.split() if word in stuff]
        assert said == [triplet.ground]
        colour, amplitude, _ = GROUNDS[triplet.ground]
        free = triplet.mask.copy()
        for toy in triplet.toys:
            cropped(free, toy.box)[:] = False
        assert np.abs(pixels(triplet.target)[free].mean(0) - colour).max() < amplitude
        for toy in triplet.toys:
            assert not cropped(triplet.mask, toy.box).all()
        assert triplet.captions[0] != triplet.captions[1]
        assert triplet.captions[1].endswith(triplet.ground)


# ----------------------------------------------------------------------------------------------
# references, and what a judge finds


@pytest.mark.parametrize(("task", "op"), EACH)
def test_a_judge_finds_each_toy_in_its_box(task, op):
    for triplet in drawn(task, op)[:6]:
        for toy in triplet.toys:
            kind, cover, hue = read(triplet.target, toy.box)
            assert kind == toy.look.kind
            assert cover >= 0.1
            assert hue_distance(hue, toy.look.hue) < 25


@pytest.mark.parametrize(("task", "op"), [each for each in EACH if each[0] != "edit"])
def test_references_show_the_toys_of_the_target_alone(task, op):
    shown = {"one": 1, "two": 2, "one_word": 1, "two_word": 2}.get(op, 1)
    right = []
    for triplet in drawn(task, op):
        marked = {toy.reference: toy.look for toy in triplet.toys if toy.reference is not None}
        others = set(range(len(triplet.entities))) - {triplet.source}
        assert set(marked) == others
        assert len(others) == shown
        seen = classifier().read(to_input(list(triplet.entities), SCENE))
        for place, look in marked.items():
            right.append(KINDS[seen.kind()[place]] == look.kind)
            assert hue_distance(float(seen.hue[place]), look.hue) < 25
    assert np.mean(right) > 0.9


def test_a_reference_differs_from_the_target_in_size_and_ground_and_is_mirrored_half_the_time():
    placed = Placement(Look("car", 199, 0.9, 0.85), 0.5, 0.5, 0.6)
    scenes = [
        draw_reference(np.random.default_rng(seed), placed, "in the snow") for seed in range(200)
    ]
    toys = [scene.toys[0] for scene in scenes]
    assert all(toy.look == placed.look for toy in toys)
    assert all(abs(toy.size - 0.6) >= 0.08 for toy in toys)
    assert all(0.45 <= toy.size <= 0.75 for toy in toys)
    assert "in the snow" not in {scene.ground for scene in scenes}
    assert 0.35 < np.mean([toy.flip for toy in toys]) < 0.65
    cut = [scene.ground is None and sum(scene.colour) in (0, 765) for scene in scenes]
    assert 0.15 < np.mean(cut) < 0.35
    assert len({scene.ground for scene in scenes}) == len(GROUNDS)


def test_references_are_drawn_for_the_place_and_ground_of_their_toy(monkeypatch):
    asked = []

    def watched(rng, toy, ground):
        asked.append((toy, ground))
        return draw_reference(rng, toy, ground)

    monkeypatch.setattr("toybox.scenes.triplets.draw_reference", watched)
    named = 0
    for task, op in EACH:
        for index in range(6):
            asked.clear()
            triplet = draw_triplet(9, "train", index, task, op)
            looks = {t.reference: t.look for t in triplet.toys if t.reference is not None}
            assert [toy.look for toy, _ in asked] == [looks[place] for place in sorted(looks)]
            assert {ground for _, ground in asked} <= {triplet.ground}
            named += triplet.ground is not None and bool(asked)
    assert named > 10


def test_captions_are_of_the_source_and_of_the_target():
    for triplet in drawn("edit", "recolour"):
        before, after = triplet.captions
        name = triplet.gone.look.kind.replace("_", " ")
        assert f"{new_of(triplet).look.colour} {name}" in after
        assert before.count(f"{new_of(triplet).look.colour} {name}") < after.count(
            f"{new_of(triplet).look.colour} {name}"
        )


def test_boxes_by_hand():
    mask = np.zeros((4, 8), bool)
    mask[1, 2] = mask[2, 5] = True
    assert box_of(mask) == (2 / 8, 1 / 4, 6 / 8, 3 / 4)
    triplet = drawn("edit", "recolour")[0]
    left, top, right, bottom = (round(SIDE * e) for e in triplet.facts()["mask_box"])
    assert triplet.mask[top:bottom, left:right].sum() == triplet.mask.sum()
    assert triplet.mask[top, left:right].any()
    assert triplet.mask[top:bottom, right - 1].any()
    facts = triplet.facts()["toys"][0]
    assert facts["box"] == [round(edge, 6) for edge in triplet.toys[0].box]
    assert (facts["kind"], facts["hue"]) == (triplet.toys[0].look.kind, triplet.toys[0].look.hue)


def test_the_picture_to_edit_is_the_one_of_its_mark():
    for op, of in (("replace", "in"), ("add", None)):
        firsts = Counter()
        for triplet in drawn("subject_edit", op):
            before = triplet.prompt.split(MARK)[triplet.source].split()
            firsts[triplet.source] += 1
            if of:
                assert before[-1] == of
            elif triplet.source == 1:
                assert before[-1] in ("to", "into")
            else:
                assert before == ["into"]
        assert set(firsts) == {0, 1}


def test_subjects_stand_as_the_words_say():
    """ "a … to the left of b": a is left of b."""
    seen = Counter()
    phrases = {
        "to the left of": (0, -1), "on the left and": (0, -1),
        "to the right of": (0, 1), "on the right and": (0, 1),
        "above": (1, -1), "at the top and": (1, -1),
        "below": (1, 1), "at the bottom and": (1, 1),
        "beside": (0, 0), "next to": (0, 0),
    }  # fmt: skip
    for index in range(60):
        for op in ("two", "one_word"):
            triplet = draw_triplet(7, "train", index, "subject", op)
            said = [phrase for phrase in phrases if phrase in triplet.prompt]
            if not said:
                continue
            seen[said[0]] += 1
            axis, sign = phrases[said[0]]
            first, second = triplet.toys
            first_is_second = (
                second.reference == 0
                if op == "two"
                else not triplet.prompt.split(said[0])[0].endswith(MARK)
                and MARK not in triplet.prompt.split(said[0])[0]
            )
            if first_is_second:
                first, second = second, first
            away = np.subtract(centre(first.box), centre(second.box))
            assert abs(away[axis]) > abs(away[1 - axis]) - 0.05
            assert sign * away[axis] >= 0, triplet.prompt
    assert len(seen) == len(phrases)


def test_toys_in_words_alone_are_in_the_target():
    for op in ("one_word", "two_word"):
        for triplet in drawn("subject", op):
            (worded,) = (toy for toy in triplet.toys if toy.reference is None)
            name = f"{worded.look.colour} {worded.look.kind.replace('_', ' ')}"
            assert f" {name} " in f" {triplet.prompt.replace(MARK, ' ')} "
            assert worded.look.kind not in [
                toy.look.kind for toy in triplet.toys if toy is not worded
            ]


# ----------------------------------------------------------------------------------------------
# scenes


def test_no_toy_is_cut_off_or_touches_another():
    for task, op in EACH:
        for triplet in drawn(task, op):
            boxes = [toy.box for toy in triplet.toys]
            for index, (left, top, right, bottom) in enumerate(boxes):
                assert min(left, top) > 0
                assert max(right, bottom) < 1
                for other in boxes[:index]:
                    apart = max(other[0] - right, left - other[2], other[1] - bottom)
                    assert max(apart, top - other[3]) > 0


def test_what_fits():
    car = Placement(Look("car", 0), 0.3, 0.5, 0.4)
    assert fits(car, [])
    assert not fits(replace(car, x=0.21), [])  # 0.01 to the edge
    assert fits(replace(car, x=0.22), [])
    assert not fits(replace(car, y=0.79), [])
    other = replace(car, x=0.72, y=0.5)
    assert fits(other, [car])  # 0.02 between 0.5 and 0.52
    assert not fits(replace(other, x=0.71), [car])
    assert fits(replace(other, x=0.3, y=0.75, size=0.05), [car])


def test_toys_stand_out_from_their_ground():
    def scene(look, ground=None, colour=(0, 0, 0)):
        return Scene((Placement(look, 0.5, 0.5, 0.5),), ground, colour, 0)

    assert not stands_out(scene(Look("crocodile", 120), "on the grass"))
    assert stands_out(scene(Look("crocodile", 275), "on the grass"))
    picture, masks = render(scene(Look("balloon", 220)), SIDE)
    colour = tuple(int(level) for level in pixels(picture)[masks[0]].mean(0))
    assert not stands_out(scene(Look("balloon", 220), None, colour))
    for task, op in CHANGES:
        for triplet in drawn(task, op)[:4]:
            if triplet.ground is None and triplet.source is not None:
                ground = pixels(triplet.target)[0, 0]
                for toy in triplet.toys:
                    inside = cropped(pixels(triplet.target), toy.box).reshape(-1, 3)
                    own = inside[(inside != ground).any(1)]
                    assert np.linalg.norm(own.mean(0) - ground) > 30


def test_a_toy_is_put_on_grounds_and_colours_that_it_stands_out_from():
    """A green crocodile is never drawn on the grass, and never recoloured to be lost there."""
    lost = Placement(Look("crocodile", 120), 0.5, 0.5, 0.5)
    grounds = {on_ground(np.random.default_rng(seed), [lost], 0.9).ground for seed in range(150)}
    assert grounds == {None, *GROUNDS} - {"on the grass"}
    scene = Scene((lost,), "on the grass", (0, 0, 0), 0)
    other = replace(scene, ground="in the snow")
    changes = iter([edits.Change(other, scene, "ground"), edits.Change(scene, other, "ground")])
    assert edits.draw_change(np.random.default_rng(0), lambda rng: next(changes)).after == other


def test_hues_are_any_and_kinds_all():
    looks = [look for seed in range(600) for look in draw_looks(np.random.default_rng(seed), 3)]
    assert {look.kind for look in looks} == set(KINDS)
    hues = np.array([look.hue for look in looks])
    assert np.mean([look.colour is not None for look in looks]) == pytest.approx(0.55, abs=0.06)
    free = hues[[look.colour is None for look in looks]]
    assert np.histogram(free, 12, (0, 360))[0].min() > len(free) / 12 * 0.6
    assert hues.max() < 360
    assert all(0.8 <= gain <= 1 for look in looks for gain in (look.saturation, look.value))


def test_toys_of_one_kind_are_told_apart_by_named_hues():
    repeated = 0
    for seed in range(300):
        looks = draw_looks(np.random.default_rng(seed), 3)
        kinds = [look.kind for look in looks]
        assert not {"fish", "tropical_fish"} <= set(kinds)
        if len(set(kinds)) < 3:
            repeated += 1
            assert kinds[0] == kinds[1] != kinds[2]
            assert None not in (looks[0].colour, looks[1].colour)
            assert hue_distance(looks[0].hue, looks[1].hue) >= 45
    assert 30 < repeated < 95


# ----------------------------------------------------------------------------------------------
# seeds


def same(first: Triplet, second: Triplet) -> bool:
    pictures = zip((first.target, *first.entities), (second.target, *second.entities), strict=True)
    alike = all(one.tobytes() == other.tobytes() for one, other in pictures)
    return alike and first.prompt == second.prompt and first.facts() == second.facts()


def test_a_triplet_depends_on_seed_split_and_index_alone():
    forth = [draw_triplet(3, "train", index) for index in range(12)]
    back = [draw_triplet(3, "train", index) for index in reversed(range(12))]
    assert all(same(*pair) for pair in zip(forth, reversed(back), strict=True))
    asked = draw_triplet(3, "train", 4, forth[4].task, forth[4].op)
    assert same(asked, forth[4])
    assert forth[4].task == draw_triplet(3, "train", 4, forth[4].task).task
    targets = [one.target.tobytes() for one in forth]
    for seed, split in ((4, "train"), (3, "test")):
        assert not set(targets) & {
            draw_triplet(seed, split, index).target.tobytes() for index in range(12)
        }
    assert len(set(targets)) == 12


def test_splits_share_no_seed(monkeypatch):
    asked = {"train": set(), "test": set()}

    def watched(seed, *labels):
        from imagelab.training.seeds import seed_for

        number = seed_for(seed, *labels)
        asked[labels[1]].add(number)
        return np.random.default_rng(number)

    monkeypatch.setattr("toybox.scenes.triplets._rng", watched)
    for split in asked:
        for index in range(20):
            draw_triplet(0, split, index)
    assert [len(seeds) for seeds in asked.values()] == [40, 40]
    assert not asked["train"] & asked["test"]


def test_the_draws_of_this_version():
    """Whoever changes them changes `VERSION` of the files, and these lines."""
    assert [draw_triplet(0, "train", index).prompt for index in range(6)] == PROMPTS


PROMPTS = [
    "show a yellow van in<imagehere>",
    "change the ground to sand in<imagehere>",
    "there is a<imagehere>on the grass",
    "delete the pink dog from<imagehere>",
    "there is a<imagehere>with a red pufferfish and a<imagehere>in the snow",
    "a<imagehere>and a<imagehere>in the snow",
]


def test_tasks_and_ops_come_equally_often(monkeypatch):
    seen = Counter()
    empty = Triplet("", "", "", None, (), None, None, (), None, None, None, (None, ""))
    monkeypatch.setattr("toybox.scenes.triplets._subject", lambda rng, op: seen.update([op]))
    monkeypatch.setattr(
        "toybox.scenes.triplets._edit",
        lambda task, op, *_: seen.update([(task, op)]) or empty,
    )
    for index in range(450):
        draw_triplet(1, "train", index)
    assert sum(seen[op] for op in OPS["subject"]) / 450 == pytest.approx(1 / 3, abs=0.08)
    assert sum(seen["edit", op] for op in OPS["edit"]) / 450 == pytest.approx(1 / 3, abs=0.08)
    assert min(seen.values()) > 8
    assert len(seen) == len(EACH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "dev", 0), "no split 'dev'; give one of train, test"),
        ((0, "train", 0, "paint"), "no task 'paint'; give one of subject, edit, subject_edit"),
        ((0, "train", 0, "edit", "two"), "no op 'two'; give one of recolour, replace, add"),
        ((0, "train", 0, None, "add"), "no op 'add'; give one of none without a task"),
        ((-1, "train", 0), "the seed is -1"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_triplet(*arguments)


def test_all_words_are_known():
    for task, op in EACH:
        for triplet in drawn(task, op):
            text = " ".join([triplet.prompt.replace(MARK, " "), *filter(None, triplet.captions)])
            assert set(text.split()) <= set(WORDS)


# ----------------------------------------------------------------------------------------------
# what ships


@pytest.mark.parametrize("drawn", SHIPPED)
def test_shipped_pictures_are_of_held_out_triplets(drawn):
    task, op, index = drawn
    entities = draw_triplet(7, "test", index, task, op).entities
    for name, entity in zip(SHIPPED[drawn], entities, strict=True):
        shipped = Image.open(PICTURES / f"{name}.png")
        assert np.array_equal(np.asarray(shipped), np.asarray(entity))
