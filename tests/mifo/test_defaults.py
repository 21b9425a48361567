"""Numbers that depend on the base model: the user's, or those that it brings, or the paper's."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from thin import contents

import imagelab.figures
import mifo
import semantic_learning
import semantic_synthesis
from imagelab.errors import UserError
from imagelab.training.interrupt import Interrupt
from mifo import defaults, evaluation
from mifo.defaults import FILE, Defaults, Own, read_own, settle
from mifo.learning.config import LearningConfig
from mifo.learning.description import describe
from mifo.learning.plan import make_plan
from mifo.learning.session import Session
from mifo.learning.stages import finetuning_stage, token_stage
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import preset_boxes
from toybox.stable_diffusion import FOLDER

#: What a model brings; none is a default, nor what the settings of a test are.
LEARNING = {
    "initializer_scale": 0.75, "learning_rate": 0.25, "lora_learning_rate": 0.5,
    "full_learning_rate": 0.125, "num_class_images": 7,
}  # fmt: skip
PAINTING = {"guidance_scale": 3, "step_scale": 0.5}
OWN, DEFAULT, GIVEN = "the model's", "default", "as given"


def bring(folder: Path, numbers: dict) -> Path:
    (folder / FILE).write_text(json.dumps(numbers))
    return folder


# ----------------------------------------------------------------------------------------------
# the file


def test_a_model_without_the_file_goes_by_the_paper(tmp_path):
    assert read_own(str(tmp_path)) == Own(Defaults(), frozenset())
    assert asdict(Defaults()) == {
        "initializer_scale": 1.0, "learning_rate": 5e-3, "lora_learning_rate": 1e-4,
        "full_learning_rate": 2e-6, "num_class_images": 100, "guidance_scale": 7.5,
        "step_scale": 1.0,
    }  # fmt: skip


def test_a_model_brings_some_numbers(tmp_path):
    bring(tmp_path, {"guidance_scale": 5, "num_class_images": 16, "step_scale": 0})
    found, names = read_own(str(tmp_path))
    brought = {"num_class_images": 16, "guidance_scale": 5.0, "step_scale": 0.0}
    assert asdict(found) == asdict(Defaults()) | brought
    assert type(found.guidance_scale) is float and type(found.num_class_images) is int
    assert names == {"guidance_scale", "num_class_images", "step_scale"}


def test_a_single_file_brings_what_lies_beside_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    bring(tmp_path, {"learning_rate": 0.5})
    assert read_own(str(tmp_path / "model.safetensors")) == Own(
        Defaults(learning_rate=0.5), frozenset({"learning_rate"})
    )


def test_toybox_brings_its_file():
    numbers = json.loads((FOLDER / FILE).read_text())
    found, names = read_own("toybox")
    assert names == numbers.keys() and numbers
    assert {name: getattr(found, name) for name in numbers} == numbers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[1]", ": it is a list and not an object"),
        (
            '{"scale": 1}',
            " has a 'scale'; it may have initializer_scale, learning_rate, lora_learning_rate, ",
        ),
        ('{"learning_rate": "1e-3"}', ": learning_rate is 1e-3 and not a number from 0 on"),
        ('{"learning_rate": -1}', ": learning_rate is -1 and not a number from 0 on"),
        ('{"learning_rate": null}', ": learning_rate is None and not a number from 0 on"),
        ('{"step_scale": true}', ": step_scale is True and not a number from 0 on"),
        ('{"step_scale": NaN}', "is not valid JSON (it holds NaN)"),
        ('{"guidance_scale": Infinity}', "is not valid JSON (it holds Infinity)"),
        ('{"num_class_images": 0}', ": num_class_images is 0 and not a whole number from 1 on"),
        ('{"num_class_images": 8.0}', ": num_class_images is 8.0 and not a whole number from 1 on"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, sentence):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        read_own(str(tmp_path))
    assert str(error.value).startswith(str(tmp_path / FILE))
    assert str(error.value).endswith("mend the file, or take it away")


def test_offline_reaches_the_file(plan, paint, monkeypatch):
    """A hub id would be asked for it."""
    asked, locate = [], defaults.locate_model
    monkeypatch.setattr(
        defaults, "locate_model", lambda _, offline: asked.append(offline) or locate(_, offline)
    )
    for offline in (True, False):
        plan(offline=offline)
        paint(*["--offline"] * offline)
        assert asked == [offline] * 2
        asked.clear()


# ----------------------------------------------------------------------------------------------
# who goes first


def test_the_users_number_goes_before_the_models_and_that_before_the_papers():
    own = Own(Defaults(guidance_scale=3.0, step_scale=0.5), frozenset({"guidance_scale"}))
    wanted = {"guidance_scale": "guidance_scale", "step_scale": "step_scale"}
    config = SynthesisConfig.from_settings(prompt="a photo")
    found, origins = settle(config, own, wanted)
    assert (found.guidance_scale, found.guidance.step_scale) == (3.0, 0.5)
    assert origins == {"guidance_scale": OWN, "step_scale": DEFAULT}
    assert found == config.with_settings(guidance_scale=3.0, step_scale=0.5)
    found, origins = settle(config.with_settings(guidance_scale=0.0), own, wanted)
    assert (found.guidance_scale, found.guidance.step_scale) == (0.0, 0.5)
    assert origins == {"guidance_scale": GIVEN, "step_scale": DEFAULT}


def test_values_from_elsewhere_are_for_open_settings_too():
    config, own = LearningConfig(), Own(Defaults(), frozenset())
    wanted, more = {"learning_rate": "full_learning_rate"}, {"class_prompt": ("a dog", "a note")}
    found, origins = settle(config, own, wanted, more)
    assert (found.recipe.learning_rate, found.recipe.class_prompt) == (2e-6, "a dog")
    assert origins == {"learning_rate": DEFAULT, "class_prompt": "a note"}
    found, origins = settle(config.with_settings(class_prompt="a cat"), own, wanted, more)
    assert (found.recipe.class_prompt, origins["class_prompt"]) == ("a cat", GIVEN)


# ----------------------------------------------------------------------------------------------
# learning


@pytest.fixture
def thin_model(thin_argv, tmp_path) -> Path:
    return shutil.copytree(thin_argv[-1], tmp_path / "thin_model")


@pytest.fixture
def plan(examples, thin_model):
    """The plan of a run with settings."""
    given = {"folder_path": examples, "instance": "toys", "model_path": thin_model, "seed": 1}

    def make(**settings):
        return make_plan(LearningConfig.from_settings(**given | settings))

    return make


OPEN = (
    "initializer_scale", "learning_rate", "finetune_learning_rate", "num_class_images",
    "class_prompt",
)  # fmt: skip
CHAIR = "a photo of a chair"


@pytest.mark.parametrize(
    ("numbers", "settings", "values", "origins"),
    [
        ({}, {}, (1.0, 5e-3, 1e-4, 100, CHAIR), (DEFAULT,) * 5),
        ({}, {"finetune": "full"}, (1.0, 5e-3, 2e-6, 100, CHAIR), (DEFAULT,) * 5),
        (LEARNING, {}, (0.75, 0.25, 0.5, 7, CHAIR), (OWN, OWN, OWN, OWN, DEFAULT)),
        (
            LEARNING,
            {"finetune": "full"},
            (0.75, 0.25, 0.125, 7, CHAIR),
            (OWN, OWN, OWN, OWN, DEFAULT),
        ),
        (
            {"full_learning_rate": 0.125, "num_class_images": 7},
            {},
            (1.0, 5e-3, 1e-4, 7, CHAIR),
            (DEFAULT, DEFAULT, DEFAULT, OWN, DEFAULT),
        ),
        (
            LEARNING,
            {"learning_rate": 0, "num_class_images": 3, "class_prompt": "a toy"},
            (0.75, 0, 0.5, 3, "a toy"),
            (OWN, GIVEN, OWN, GIVEN, GIVEN),
        ),
    ],
)
def test_a_plan_has_every_number_and_says_where_it_is_from(
    plan, thin_model, numbers, settings, values, origins
):
    bring(thin_model, numbers)
    found = plan(**settings)
    assert tuple(found.config.settings()[name] for name in OPEN) == values
    assert found.origins == dict(zip(OPEN, origins, strict=True))


def test_tokens_alone_have_no_rate_of_stage_2(plan, thin_model):
    bring(thin_model, LEARNING)
    found = plan(finetune="none")
    assert found.config.recipe.finetune_learning_rate is None
    assert "finetune_learning_rate" not in found.origins
    assert "stage 1      600 steps, rate 0.25 (the model's)" in describe(found)
    assert "stage 2" not in describe(found)


def test_the_printed_plan_says_where_numbers_are_from(plan, thin_model):
    lines = describe(bring(thin_model, LEARNING) and plan(learning_rate=0.01)).splitlines()
    assert "stage 1      600 steps, rate 0.01 (as given)" in lines
    assert "stage 2      400 steps, rate 0.5 (the model's)" in lines
    assert 'class images 7 to make (the model\'s) of "a photo of a chair" (default)' in lines
    assert "class images none" in describe(plan(prior_weight=0)).splitlines()


@pytest.mark.parametrize(("finetune", "rate"), [("lora", 0.5), ("full", 0.125)])
def test_the_optimisers_go_by_the_models_rates(plan, thin_model, finetune, rate):
    bring(thin_model, LEARNING)
    session = Session(plan(finetune=finetune, prior_weight=0, warmup_steps=0))
    trainer = SimpleNamespace(interrupt=Interrupt())
    for stage, wanted in ((token_stage, 0.25), (finetuning_stage, rate)):
        (group,) = stage(session, trainer).optimizer.param_groups
        assert group["lr"] == wanted


@pytest.fixture
def learn(thin_argv, thin_model, tmp_path, monkeypatch):
    """Run the command on a copy of the thin model, whose file may change; the learned folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("plot_losses", "plot_attention"):
        monkeypatch.setattr(imagelab.figures, name, lambda path, *args: path.touch())

    def run(*more) -> Path:
        more = (*more, "--model_path", "thin_model", "--output_dir", "out", "--overwrite")
        semantic_learning.main([*thin_argv, *more])
        return tmp_path / "out" / "toys"

    return run


def test_what_is_learned_is_what_the_given_numbers_learn(learn, thin_model):
    """The manifest tells them apart, by where they are from."""

    def learned(*more) -> tuple[dict, dict]:
        files = contents(learn(*more, "--warmup_steps", "0"))
        manifest = json.loads(files["manifest.json"])
        rows = {name: data[8 + int.from_bytes(data[:8], "little") :]
                for name, data in files.items() if name.endswith(".safetensors")}  # fmt: skip
        assert len(rows) == 3
        return rows, manifest

    by_paper, manifest = learned()
    assert manifest["settings"]["learning_rate"] == 5e-3
    assert manifest["origins"]["learning_rate"] == DEFAULT
    bring(thin_model, {"learning_rate": 0.25})
    own, manifest = learned()
    assert manifest["settings"]["learning_rate"] == 0.25
    assert manifest["origins"] == {
        "initializer_scale": DEFAULT, "learning_rate": OWN, "finetune_learning_rate": GIVEN,
        "num_class_images": DEFAULT, "class_prompt": DEFAULT,
    }  # fmt: skip
    given, manifest = learned("--learning_rate", "0.25")
    assert manifest["origins"]["learning_rate"] == GIVEN
    assert given == own
    assert all(by_paper[name] != own[name] for name in own)


# ----------------------------------------------------------------------------------------------
# painting


@pytest.fixture
def model(small_sd, tmp_path) -> Path:
    """A copy of the model that was learned with."""
    return shutil.copytree(small_sd, tmp_path / "model")


@pytest.fixture
def paint(learned_dir, tmp_path, monkeypatch):
    """Paint one picture with more options; its pixels and its facts."""
    monkeypatch.chdir(tmp_path)
    options = f"""--models_dir {learned_dir} --model_id toys --output_path out --seed 7
        --num_inference_steps 2 --guidance_steps 1 --guidance_iterations 1 --refine_every 0
        --device cpu --mixed_precision no --prompt <asset0>""".split()

    def run(*more) -> tuple[np.ndarray, dict]:
        semantic_synthesis.main([*options, *map(str, more)])
        picture = max((tmp_path / "out/toys").glob("0*.png"))
        with Image.open(picture) as image:
            return np.asarray(image), json.loads(picture.with_suffix(".json").read_text())

    return run


def numbers_of(facts: dict) -> tuple:
    return tuple((facts["settings"][name], facts["origins"][name]) for name in PAINTING)


def test_pictures_go_by_the_models_numbers(paint, model, capsys):
    by_paper, facts = paint("--model_path", model)
    assert numbers_of(facts) == ((7.5, DEFAULT), (1.0, DEFAULT))
    assert (
        "guidance scale 7.5 (default), box steps 8 → 2 × 1 (default)\n" in capsys.readouterr().out
    )
    bring(model, PAINTING)
    own, facts = paint("--model_path", model)
    assert numbers_of(facts) == ((3.0, OWN), (0.5, OWN))
    told = "guidance scale 3 (the model's), box steps 8 → 2 × 0.5 (the model's)\n"
    assert told in capsys.readouterr().out
    given, facts = paint("--guidance_scale", 3, "--step_scale", 0.5)  # the model without the file
    assert numbers_of(facts) == ((3.0, GIVEN), (0.5, GIVEN))
    assert np.array_equal(given, own)
    assert not np.array_equal(by_paper, own)
    mixed, facts = paint("--model_path", model, "--guidance_scale", 7.5)
    assert numbers_of(facts) == ((7.5, GIVEN), (0.5, OWN))
    for other in (by_paper, own):
        assert not np.array_equal(mixed, other)


def test_a_prompt_without_boxes_has_no_box_steps(paint, model, capsys):
    paint("--model_path", bring(model, PAINTING), "--no_box_control")
    assert "guidance scale 3 (the model's)\n" in capsys.readouterr().out


@pytest.fixture
def at_home(learned_dir, model, tmp_path) -> Path:
    """A folder with a learned folder whose base model is the copy."""
    folder = shutil.copytree(learned_dir / "toys", tmp_path / "models/toys")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["base_model"]["source"] = str(model)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "models"


def test_the_model_that_was_learned_with_brings_its_numbers(at_home, model):
    bring(model, PAINTING)
    quick = {"num_inference_steps": 1, "guidance_steps": 0, "refine_every": 0, "device": "cpu"}
    toys = mifo.load("toys", at_home)
    (painting,) = toys.paint("<asset0>", seed=1, **quick)
    assert numbers_of(painting.facts) == ((3.0, OWN), (0.5, OWN))
    (painting,) = toys.paint("<asset0>", seed=1, guidance_scale=2, **quick)
    assert numbers_of(painting.facts) == ((2.0, GIVEN), (0.5, OWN))


def test_a_pipeline_that_is_saved_brings_the_numbers_of_its_base(learn, thin_model):
    """It paints by them, wherever its base is by then."""
    pipeline = learn("--finetune", "full") / "pipeline"
    assert not (pipeline / FILE).exists()
    brought = PAINTING | {"full_learning_rate": 0.125}  # and nothing of the paper's
    bring(thin_model, brought)
    learn("--finetune", "full")
    assert json.loads((pipeline / FILE).read_text()) == brought
    shutil.rmtree(thin_model)
    quick = {"num_inference_steps": 1, "guidance_steps": 0, "refine_every": 0, "device": "cpu"}
    (painting,) = mifo.load("toys", "out").paint("<asset0>", seed=1, **quick)
    assert numbers_of(painting.facts) == ((3.0, OWN), (0.5, OWN))


def test_an_evaluation_goes_by_the_models_numbers(at_home, model, examples):
    config = SynthesisConfig(models_dir=str(at_home), num_images=1, seed=0)

    def numbers(config) -> tuple[float, float]:
        (case,) = evaluation.plan_cases(config, ["toys"], [], str(examples), preset_boxes)
        return case.config.guidance_scale, case.config.guidance.step_scale

    assert numbers(config) == (7.5, 1.0)
    bring(model, PAINTING)
    assert numbers(config) == (3.0, 0.5)
    assert numbers(config.with_settings(step_scale=2)) == (3.0, 2.0)
