"""Preset boxes: places for so many subjects, and in each place a box of its subject's proportion.

Two subjects have places 0.4 wide and 0.5 high.
"""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import semantic_synthesis
from imagelab.boxes import Box, check_box
from imagelab.io.images import proportion
from mifo import evaluation
from mifo.learned import Learned
from mifo.learning.config import LearningConfig
from mifo.learning.plan import make_plan
from mifo.learning.result import describe_result
from mifo.learning.session import Session
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import fit, preset_boxes
from mifo.synthesis.scene import lay_out

LEFT, RIGHT = Box(0.05, 0.25, 0.45, 0.75), Box(0.55, 0.25, 0.95, 0.75)


def near(*boxes):
    return [pytest.approx(tuple(box)) for box in boxes]


# ----------------------------------------------------------------------------------------------
# boxes in places


@pytest.mark.parametrize("count", range(1, 10))
def test_places_are_apart(count):
    boxes = preset_boxes(count)
    assert len(boxes) == count
    for box in boxes:
        check_box(box, rows=8, columns=8)
    for a, b in itertools.combinations(boxes, 2):
        assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
    assert preset_boxes(count, [None] * count) == boxes


@pytest.mark.parametrize(
    ("wanted", "box"),
    [
        (None, (0.05, 0.25, 0.45, 0.75)),
        (0.8, (0.05, 0.25, 0.45, 0.75)),  # the place's own
        (1.0, (0.05, 0.3, 0.45, 0.7)),  # as wide as the place: 0.4×0.4
        (2.0, (0.05, 0.4, 0.45, 0.6)),  # 0.4×0.2
        (0.4, (0.15, 0.25, 0.35, 0.75)),  # as high as the place: 0.2×0.5
        (2.5, (0.05, 0.42, 0.45, 0.58)),  # 0.4×0.16
        (9.0, (0.05, 0.43, 0.45, 0.57)),  # taken for 3, and 0.4×0.133 for 0.4×0.14
        (0.1, (0.25 - 0.25 / 3, 0.25, 0.25 + 0.25 / 3, 0.75)),  # taken for a third
    ],
)
def test_the_largest_box_of_a_proportion_in_the_middle_of_a_place(wanted, box):
    assert fit(LEFT, wanted) == pytest.approx(box)


def test_each_subject_has_a_box_of_its_own_proportion():
    assert preset_boxes(2, [2.0, None]) == near((0.05, 0.4, 0.45, 0.6), RIGHT)
    assert preset_boxes(2, [None, 0.4]) == near(LEFT, (0.65, 0.25, 0.85, 0.75))
    # A row of three has places of 0.29×0.4; a grid of four cells of 0.4×0.4.
    assert preset_boxes(3, [None, 2.0, None])[1] == pytest.approx((0.355, 0.4275, 0.645, 0.5725))
    assert preset_boxes(4, [None] * 3 + [0.5])[3] == pytest.approx((0.65, 0.55, 0.85, 0.95))


@given(st.data(), st.integers(1, 9))
def test_boxes_of_any_proportions_fill_their_places_one_way(data, count):
    known = st.none() | st.floats(1e-3, 1e3)
    proportions = data.draw(st.lists(known, min_size=count, max_size=count))
    for place, box, wanted in zip(
        preset_boxes(count), preset_boxes(count, proportions), proportions, strict=True
    ):
        check_box(box, rows=8, columns=8)
        sides = [(b.x1 - b.x0, b.y1 - b.y0) for b in (place, box)]
        slack = [of_place - of_box for of_place, of_box in zip(*sides, strict=True)]
        assert min(slack) == pytest.approx(0, abs=1e-9)
        assert min(slack) > -1e-9
        assert box.x0 + box.x1 == pytest.approx(place.x0 + place.x1)
        assert box.y0 + box.y1 == pytest.approx(place.y0 + place.y1)
        if wanted is not None and min(sides[1]) > 0.1400001:
            assert sides[1][0] / sides[1][1] == pytest.approx(min(max(wanted, 1 / 3), 3))
        elif wanted is not None:
            assert min(sides[1]) == pytest.approx(0.14)
            assert 1 / 3 <= sides[1][0] / sides[1][1] <= 3


def learned(proportions=None, assets=(0, 1)) -> Learned:
    manifest = {} if proportions is None else {"proportions": proportions}
    return Learned(dict.fromkeys(assets), {}, None, (), where="here", manifest=manifest)


NAMES = ("<asset0>", "<asset1>")


def test_proportions_become_fractions_of_the_picture():
    """A mask of 60×20 pixels on a picture twice as wide as high: 3 / 2 in fractions."""
    boxes = lay_out(NAMES, learned([3.0, 0.25]), preset_boxes, (16, 32))
    # 0.4 wide, 0.4 / 1.5 high; the other's 1 / 8 is taken for a third
    wide = (0.05, 0.5 - 0.2 / 1.5, 0.45, 0.5 + 0.2 / 1.5)
    assert boxes == near(wide, (0.75 - 0.25 / 3, 0.25, 0.75 + 0.25 / 3, 0.75))
    width, height = 200 * (wide[2] - wide[0]), 100 * (wide[3] - wide[1])
    assert width / height == pytest.approx(3)
    upright = lay_out(NAMES, learned([0.5, 1.0]), preset_boxes, (32, 16))  # 1 and 2
    assert upright == near((0.05, 0.3, 0.45, 0.7), (0.55, 0.4, 0.95, 0.6))
    square = lay_out(NAMES, learned([1.0, 2.0]), preset_boxes)
    assert square == near((0.05, 0.3, 0.45, 0.7), (0.55, 0.4, 0.95, 0.6))


def test_a_layout_gets_the_proportions_of_the_subjects_by_their_names():
    seen = []

    def get_boxes(count, proportions):
        seen.append((count, proportions))
        return [LEFT] * count

    names = ("<asset1>", "subject 2", "<asset0>", "<asset1>")
    assert lay_out(names, learned([2.0, 0.5]), get_boxes, (8, 16)) == [LEFT] * 4
    lay_out(NAMES, learned(), get_boxes)
    assert seen == [(4, [0.25, None, 1.0, 0.25]), (2, [None, None])]


# ----------------------------------------------------------------------------------------------
# the proportions of masks


def test_the_proportion_of_a_mask_is_that_of_its_bounding_box():
    mask = np.zeros((40, 100), bool)
    mask[10, 30] = mask[29, 89] = True  # rows 10 to 29, columns 30 to 89
    assert proportion(mask) == 3.0
    mask[:, 30] = True
    assert proportion(mask) == 1.5
    only = np.zeros((3, 3), bool)
    only[0, 2] = True
    assert proportion(only) == 1.0


@pytest.mark.parametrize(
    ("resize", "found"), [("aspect", [96 / 32, 24 / 64]), ("squash", [64 / 32, 16 / 64])]
)
def test_the_manifest_keeps_proportions_at_the_size_that_was_worked_on(
    thin_argv, tmp_path, resize, found
):
    """A photo of 512×256 pixels is squeezed to 192×128, the longest there is, or to 128×128."""
    folder = tmp_path / "wide"
    folder.mkdir()
    Image.effect_noise((512, 256), 80).convert("RGB").save(folder / "img.png")
    for index, (left, top, right, bottom) in enumerate([(0, 0, 256, 64), (384, 0, 448, 128)]):
        mask = np.zeros((256, 512), np.uint8)
        mask[top:bottom, left:right] = 255
        Image.fromarray(mask).save(folder / f"mask{index}.png")
    config = LearningConfig.from_settings(
        folder_path=tmp_path, instance="wide", model_path=thin_argv[-1], seed=0, resize=resize
    )
    manifest = describe_result(Session(make_plan(config)), {"loss": [1.0]}, [0.5, 0.5])
    assert json.loads(json.dumps(manifest))["proportions"] == found


# ----------------------------------------------------------------------------------------------
# commands


@pytest.fixture
def models(learned_dir, tmp_path, monkeypatch) -> Path:
    """A folder with `toys`, whose masks are 5:4 and 3:5, and `old`, without that."""
    monkeypatch.chdir(tmp_path)
    for name in ("toys", "old"):
        folder = shutil.copytree(learned_dir / "toys", tmp_path / "models" / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest.pop("proportions") == [0.75, 0.75]  # masks of 48×64 pixels
        manifest |= {"proportions": [1.25, 0.6]} if name == "toys" else {}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "models"


def painted_boxes(models, name, *more, prompt="<asset1> and <asset0>") -> list[list[float]]:
    argv = f"""--models_dir {models} --model_id {name} --output_path out --seed 1 --device cpu
        --mixed_precision no --num_inference_steps 1 --guidance_steps 0 --refine_every 0"""
    semantic_synthesis.main([*argv.split(), "--prompt", prompt, *more])
    latest = max(Path("out", name).glob("*.json"))
    return json.loads(latest.read_text())["boxes"]


#: What masks of 3:5 and 5:4 get in the places on a square picture: 0.3×0.5 and 0.4×0.32.
HIGH, WIDE = Box(0.1, 0.25, 0.4, 0.75), Box(0.55, 0.34, 0.95, 0.66)


def test_the_command_lays_out_by_proportion(models):
    assert painted_boxes(models, "toys") == near(HIGH, WIDE)
    wide = painted_boxes(models, "toys", "--width", "256", "--height", "128")
    # In fractions 0.3, which is taken for a third, and 0.625: 0.167×0.5 and 0.3125×0.5.
    assert wide == near(
        (0.25 - 0.25 / 3, 0.25, 0.25 + 0.25 / 3, 0.75), (0.59375, 0.25, 0.90625, 0.75)
    )
    own = "[[0,0,0.5,1],[0.5,0,1,1]]"
    assert painted_boxes(models, "toys", "--boxes", own) == json.loads(own)


def test_the_whole_place_is_for_what_has_no_proportion(models):
    assert painted_boxes(models, "old") == near(LEFT, RIGHT)
    given = ("--subject_token_indices", "[[2],[4]]")  # "photo" and <asset0>
    boxes = painted_boxes(models, "toys", *given, prompt="a photo of <asset0>")
    assert boxes == near(LEFT, WIDE)


def test_the_evaluation_lays_out_by_proportion(models, examples):
    config = SynthesisConfig(models_dir=str(models), num_images=1, seed=0)
    cases = evaluation.plan_cases(
        config, ["toys", "old"], ["<asset1>", "<asset1> <asset0>"], str(examples), preset_boxes
    )
    one, two, _, old = (list(case.boxes) for case in cases)
    assert one == near((0.32, 0.2, 0.68, 0.8))  # of 0.6×0.6
    assert two == near(HIGH, WIDE)
    assert old == near(LEFT, RIGHT)
