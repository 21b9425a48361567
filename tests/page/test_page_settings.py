"""Settings of the page: those left open, emptied numbers, preset boxes in their proportions."""

import json
import shlex
from pathlib import Path

import pytest

from mifo.cli import learning, synthesis
from mifo.learning.config import LearningConfig
from mifo.synthesis.config import SynthesisConfig
from mifo_page.places import proportions

gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app]'")

OPEN_LEARNING = ("learning_rate", "finetune_learning_rate", "num_class_images", "class_prompt")
OPEN_PAINTING = ("guidance_scale", "step_scale")


def words(told: str) -> list[str]:
    """The options of a command that the page shows."""
    argv = shlex.split(told)
    assert argv[:2] == ["python", "-m"]
    return argv[3:]


def learning_options(told):
    return learning.parse_args(words(told))[1]


def painting_options(told):
    return synthesis.parse_args(words(told))[1]


# ----------------------------------------------------------------------------------------------
# fields


def test_settings_of_the_model_are_left_to_it(events):
    told = events("learning_command", instance="toys")
    assert not [name for name in OPEN_LEARNING if f"--{name}" in told]
    options = learning_options(told)
    assert all(getattr(options, name) is None for name in OPEN_LEARNING)
    assert (options.train_steps, options.finetune_steps, options.seed) == (600, 400, 0)
    assert not options.initialize_from_class and "--initialize_from_class" not in told

    told = events("painting_command", model_id="toys")
    options = painting_options(told)
    assert not [name for name in OPEN_PAINTING if f"--{name}" in told]
    assert all(getattr(options, name) is None for name in OPEN_PAINTING)
    assert (options.num_images, options.seed, options.num_inference_steps) == (4, 0, 50)


def test_token_steps_are_lowered_together_with_those_of_the_reward(events):
    options = learning_options(events("learning_command", instance="toys", train_steps=150))
    assert (options.train_steps, options.reward_steps) == (150, 200)
    given = {"train_steps": 150, "reward_steps": 50}
    options = learning_options(events("learning_command", instance="toys", **given))
    assert (options.train_steps, options.reward_steps) == (150, 50)


def test_settings_that_are_given_go_before_the_model_s(events):
    given = {"learning_rate": "2e-3", "finetune_learning_rate": " 0.0001 "}
    given |= {"num_class_images": "16", "class_prompt": " a photo of a van "}
    told = events("learning_command", instance="toys", initialize_from_class=True, **given)
    options = learning_options(told)
    assert (options.learning_rate, options.finetune_learning_rate) == (2e-3, 1e-4)
    assert (options.num_class_images, options.class_prompt) == (16, "a photo of a van")
    assert options.initialize_from_class

    given = {"guidance_scale": "0", "step_scale": ".5", "painting_seed": ""}
    options = painting_options(events("painting_command", model_id="toys", **given))
    assert (options.guidance_scale, options.step_scale, options.seed) == (0.0, 0.5, None)


@pytest.mark.parametrize(
    ("tab", "field", "label"),
    [
        ("learning", "train_steps", "Token steps"),
        ("learning", "reward_steps", "Of these, with the reward"),
        ("learning", "finetune_steps", "Fine-tuning steps"),
        ("learning", "checkpoint_steps", "Steps between curves"),
        ("painting", "count", "Pictures"),
        ("painting", "steps", "Steps"),
        ("painting", "step_size", "Box step"),
        ("painting", "final_step_size", "Box step at last"),
    ],
)
def test_an_emptied_number_is_told_and_nothing_runs(events, tab, field, label):
    name = {"learning": "instance", "painting": "model_id"}[tab]
    told = events(f"{tab}_command", **{name: "toys", field: None})
    assert told == f"# {label} is empty; give a number"
    button = {"learning": "learn", "painting": "paint"}[tab]
    with pytest.raises(gradio.Error, match=f"{label} is empty; give a number"):
        events(button, at=button, **{name: "toys", field: None})


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("learning_rate", "fast", "Token rate is 'fast'; give a number, or nothing"),
        ("num_class_images", "1.5", "Class images is '1.5'; give a whole number, or nothing"),
        ("learning_seed", "-", "Seed is '-'; give a whole number, or nothing"),
    ],
)
def test_what_is_no_number_is_told(events, field, text, told):
    assert events("learning_command", instance="toys", **{field: text}) == f"# {told}"


def test_the_fields_name_settings_that_there_are(events):
    told = events("learning_command", instance="toys", start="overwrite", initializer_tokens="a,b")
    options = vars(learning_options(told))
    assert LearningConfig().settings().keys() <= options.keys()
    assert options["initializer_tokens"] == ["a", "b"] and options["overwrite"]
    told = events("painting_command", model_id="toys", negative="fog", step_size=2.0)
    options = painting_options(told)
    assert (options.negative_prompt, options.step_size) == ("fog", 2.0)
    assert SynthesisConfig().guidance.final_step_size == options.final_step_size


# ----------------------------------------------------------------------------------------------
# preset boxes

#: Two subjects have places of 0.4 × 0.5 of the picture, in the middle of its left and right half.
PLACES = [[0.05, 0.25, 0.45, 0.75], [0.55, 0.25, 0.95, 0.75]]


def write_learned(places, name, shapes):
    """The manifest of a learned folder of two assets; ``shapes``: their proportions, or None."""
    manifest = {
        "format": 1,
        "base_model": {"source": "toybox", "sha256": "0"},
        "tokens": ["<asset0>", "<asset1>"],
        "image_sha256": "0",
        "mask_sha256": ["0", "0"],
        "settings": {
            "instance": name,
            "folder_path": "example",
            "finetune": "none",
            "finetune_steps": 0,
        },
        "separation": [0.5, 0.5],
    }
    folder = Path(places.models_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    if shapes is not None:
        manifest["proportions"] = shapes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_proportions_are_the_manifest_s(places, tmp_path):
    write_learned(places, "toys", [2.0, 0.4])
    write_learned(places, "older", None)
    write_learned(places, "damaged", [2.0, -1.0])
    assert proportions(places, "toys") == {"<asset0>": 2.0, "<asset1>": 0.4}
    for name in ("older", "damaged", "missing", "../learned/toys", "", None):
        assert proportions(places, name) == {}


def test_preset_boxes_have_the_proportions_of_the_chosen_folder(places, events):
    from mifo_page.stage import staged

    write_learned(places, "wide", [2.0, 0.4])
    write_learned(places, "tall", [0.5, 0.8])
    prompt = "a photo of <asset0> and <asset1>"
    old = staged(prompt, {})
    assert old["boxes"] == PLACES
    # 2 : 1 in 0.4 × 0.5 is 0.4 × 0.2; 2 : 5 is 0.2 × 0.5
    wide = [[0.05, 0.4, 0.45, 0.6], [0.65, 0.25, 0.85, 0.75]]
    new, written = events("stage", at="model_id", model_id="wide", stage=old)
    assert new["names"] == ["<asset0>", "<asset1>"]
    assert new["boxes"] == json.loads(written) == wide
    # another folder: 1 : 2 is 0.25 × 0.5; 4 : 5 is 0.4 × 0.5
    values = {"model_id": "tall", "stage": new, "boxes": written}
    new, written = events("stage", at="model_id", **values)
    assert new["boxes"] == [[0.125, 0.25, 0.375, 0.75], PLACES[1]]
    # the other way round in the prompt, so are the boxes; one asset has a place of 0.6 × 0.6
    values = {"model_id": "wide", "stage": new, "boxes": written}
    new, _ = events("stage", at="prompt", **values, prompt="<asset1>, <asset0>")
    assert new["boxes"] == [[0.15, 0.25, 0.35, 0.75], [0.55, 0.4, 0.95, 0.6]]
    new, _ = events("stage", at="prompt", **values, prompt="<asset0>")
    assert new["boxes"] == [[0.2, 0.35, 0.8, 0.65]]


@pytest.mark.parametrize("way", ["dragged", "written"])
def test_boxes_that_were_moved_stay_while_the_prompt_names_the_same(places, events, way):
    from mifo_page.stage import staged

    write_learned(places, "wide", [2.0, 0.4])
    mine = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]
    old = staged("<asset0> and <asset1>", {})
    values = {"model_id": "wide", "stage": old, "boxes": json.dumps(old["boxes"])}
    values |= {"stage": {**old, "boxes": mine}} if way == "dragged" else {"boxes": json.dumps(mine)}
    for at in ("model_id", "prompt"):
        for told in events("stage", at=at, **values, prompt="now <asset0> by <asset1>"):
            assert told == gradio.skip()
    new, written = events("stage", at="prompt", **values, prompt="<asset0>")
    assert new["boxes"] == json.loads(written) == [[0.2, 0.35, 0.8, 0.65]]


def test_written_boxes_reach_the_stage_and_keep_its_preset(places, events):
    from mifo_page.stage import staged

    old = staged("<asset0> and <asset1>", {})
    text = "[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]"
    new = events("stage", at="boxes", boxes=text, stage=old)
    assert new == {**old, "boxes": json.loads(text)} and new["preset"] == PLACES
    with pytest.raises(gradio.Error, match="1 boxes and 2 assets"):
        events("stage", at="boxes", boxes="[[0, 0, 1, 1]]", stage=old)
