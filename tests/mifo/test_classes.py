"""What the things of a photo are, from instance.json; and scene.json, which nothing reads."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from thin import contents

import imagelab.figures
from imagelab.errors import UserError
from imagelab.models.stable_diffusion import load_base
from imagelab.training.interrupt import Interrupt
from mifo.learning import plan as planning
from mifo.learning import priors, stages
from mifo.learning.classes import class_prompt, read_classes
from mifo.learning.config import LearningConfig
from mifo.learning.plan import make_plan
from mifo.learning.session import Session
from mifo_lora import read_lora
from semantic_learning import main
from toybox.scenes.instances import EXAMPLES, example_scene, with_looks, write_folder
from toybox.scenes.toys import Look

ROOT = Path(__file__).parents[2]


# ----------------------------------------------------------------------------------------------
# instance.json


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        ("car", ("car",)),
        ("  toy \n car ", ("toy car",)),
        (["fox"], ("fox",)),
        (["cat", " barn  owl"], ("cat", "barn owl")),
        (["cat", "cat"], ("cat", "cat")),
    ],
)
def test_one_class_for_all_or_one_for_each_mask(tmp_path, found, classes):
    (tmp_path / "instance.json").write_text(json.dumps({"class": found}))
    assert read_classes(tmp_path, 2) == classes


def test_a_folder_need_not_say_its_class(tmp_path):
    assert read_classes(tmp_path, 2) == ()


@pytest.mark.parametrize(("classes", "masks"), [(2, 3), (3, 2), (2, 1)])
def test_as_many_classes_as_masks(tmp_path, classes, masks):
    (tmp_path / "instance.json").write_text(json.dumps({"class": ["cat"] * classes}))
    with pytest.raises(UserError, match=f"instance.json has {classes} classes for {masks} masks;"):
        read_classes(tmp_path, masks)


@pytest.mark.parametrize(
    ("classes", "prompt"),
    [
        (["car"], "a photo of a car"),
        (["cat", "owl"], "a photo of a cat and an owl"),
        (["owl", "cat", "owl"], "a photo of an owl and a cat"),
        (["Airbus", "toy car", "ice cream"], "a photo of an Airbus and a toy car and an ice cream"),
    ],
)
def test_the_class_prompt_names_each_class_once(classes, prompt):
    assert class_prompt(classes) == prompt


# ----------------------------------------------------------------------------------------------
# learning from a folder that says its class


@pytest.fixture
def own(examples, tmp_path, monkeypatch) -> Path:
    """A folder of the test's own with the instance folder `toys`, where the test works."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(examples, tmp_path / "mine")
    return tmp_path / "mine" / "toys"


def say(folder: Path, classes) -> None:
    (folder / "instance.json").write_text(json.dumps({"class": classes}))


@pytest.fixture
def plan(own, thin_argv):
    """The plan of a run with settings, on the test's own folder and the thin model."""
    given = {"folder_path": "mine", "instance": "toys", "model_path": thin_argv[-1], "seed": 1}

    def make(**settings):
        return make_plan(LearningConfig.from_settings(**given | settings))

    return make


def test_the_class_prompt_is_of_the_folders_classes(plan, own):
    def found(**settings):
        made = plan(**settings)
        return made.config.recipe.class_prompt, made.origins["class_prompt"]

    assert found() == ("a photo of a chair", "default")
    say(own, ["cat", "owl"])
    assert found() == ("a photo of a cat and an owl", "instance.json")
    assert found(class_prompt="a toy") == ("a toy", "as given")
    say(own, "car")
    assert found() == ("a photo of a car", "instance.json")


def test_class_images_are_made_of_the_folders_classes(plan, own, monkeypatch):
    """And stage 2 is shown them under that prompt."""
    say(own, ["cat", "owl"])
    prompts, latents = [], torch.zeros(1, 4, 16, 16)
    monkeypatch.setattr(
        stages, "class_latents", lambda _, prompt, *more, **__: prompts.append(prompt) or latents
    )
    session = Session(plan(finetune_steps=1, num_class_images=1))
    draw = session.views.draw
    monkeypatch.setattr(
        session.views, "draw", lambda *args: prompts.append(args[-1]) or draw(*args)
    )
    stage = stages.finetuning_stage(session, SimpleNamespace(interrupt=Interrupt()))
    with stage.losses(0):
        assert prompts == ["a photo of a cat and an owl"] * 2


def words_of(plan, word: str) -> torch.Tensor:
    """The mean of a word's rows in the embedding table."""
    pieces = plan.model.tokenizer(word, add_special_tokens=False).input_ids
    return plan.model.text_encoder.get_input_embeddings().weight.detach()[pieces].mean(0)


def test_tokens_start_from_their_classes_when_told(plan, own):
    at_random = plan().rows
    say(own, ["toy car", "dog"])
    assert torch.equal(plan().rows, at_random)  # not told
    made = plan(initialize_from_class=True)
    assert torch.allclose(
        made.rows, torch.stack([words_of(made, "toy car"), words_of(made, "dog")])
    )
    assert not torch.allclose(made.rows[0], made.rows[1])
    say(own, "dog")
    made = plan(initialize_from_class=True)
    assert torch.allclose(made.rows, words_of(made, "dog").expand(2, -1))


def test_the_option_starts_the_tokens_from_the_class(learn_argv, small_sd, own, monkeypatch):
    for name in ("plot_losses", "plot_attention"):
        monkeypatch.setattr(imagelab.figures, name, lambda path, *args: path.touch())
    say(own, "photo")
    options = "--folder_path mine --output_dir out --finetune none --train_steps 1"
    main([*learn_argv, *options.split(), "--learning_rate", "0", "--initialize_from_class"])
    base = load_base(str(small_sd))
    pieces = base.tokenizer("photo", add_special_tokens=False).input_ids
    wanted = base.text_encoder.get_input_embeddings().weight[pieces].mean(0)
    for index in range(2):
        row = read_lora(f"out/toys/asset{index}.safetensors")[0][f"<asset{index}>"][0]
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=0)
    settings = json.loads(Path("out/toys/manifest.json").read_text())["settings"]
    assert settings["initialize_from_class"] and settings["class_prompt"] == "a photo of a photo"


def test_a_class_is_looked_at_before_a_model_is_fetched(plan, own, monkeypatch):
    monkeypatch.setattr(planning, "read_own", lambda *_: pytest.fail("a model is fetched"))
    say(own, ["cat", "owl", "fox"])
    with pytest.raises(UserError, match="has 3 classes for 2 masks"):
        plan()


# ----------------------------------------------------------------------------------------------
# scene.json


def test_scene_json_changes_nothing_that_is_learned(thin_argv, tmp_path, monkeypatch):
    """With all that reads the folder: class images, first tokens, both stages, every file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(priors, "STEPS", 2)
    folder = tmp_path / "mine/toys"
    write_folder(folder, example_scene(EXAMPLES["fish"]), seed=3, size=128)
    assert "247.5" in (folder / "scene.json").read_text()
    options = [*thin_argv, "--folder_path", "mine", "--output_dir", "out"]
    options += ["--initialize_from_class", "--prior_weight", "1", "--num_class_images", "1"]

    def learned() -> dict[str, bytes]:
        main(options)
        made = contents(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        return made

    whole = learned()
    assert {"toys/manifest.json", "toys/asset1.safetensors", "toys/learning.png"} < whole.keys()
    assert (
        json.loads(whole["toys/manifest.json"])["settings"]["class_prompt"] == "a photo of a fish"
    )
    (folder / "scene.json").unlink()
    assert learned() == whole
    (folder / "scene.json").write_bytes(b"\xff no scene")
    assert learned() == whole
    (folder / "instance.json").write_text('{"class": "car"}')  # which is read
    assert learned() != whole


@pytest.mark.parametrize("package", ["imagelab", "mifo", "mifo_page", "lora-master", "."])
def test_no_command_of_mifo_knows_scene_json(package):
    files = list((ROOT / package).glob("**/*.py" if package != "." else "*.py"))
    assert files
    for file in files:
        assert "scene.json" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_examples_say_their_classes(name):
    """Each as a person would; the looks are in scene.json alone."""
    folder, looks = ROOT / "example" / name, EXAMPLES[name].looks
    kinds = tuple(look.kind for look in looks)
    classes = read_classes(folder, len(looks))
    assert classes == (kinds if len(set(kinds)) > 1 else kinds[:1])
    assert json.loads((folder / "instance.json").read_text()).keys() == {"class"}
    placed = json.loads((folder / "scene.json").read_text())["instances"]
    assert [toy["look"]["hue"] for toy in placed] == [look.hue for look in looks]


def test_classes_of_a_new_folder_are_words(tmp_path):
    scene = example_scene(EXAMPLES["creature"])
    kinds = ("tropical_fish", "shark", "tropical_fish")
    scene = with_looks(scene, tuple(Look(kind, 300) for kind in kinds))
    write_folder(tmp_path / "new", scene, 0, size=64)
    found = json.loads((tmp_path / "new/instance.json").read_text())
    assert found == {"class": ["tropical fish", "shark", "tropical fish"]}
    assert read_classes(tmp_path / "new", 3) == ("tropical fish", "shark", "tropical fish")
    assert class_prompt(found["class"]) == "a photo of a tropical fish and a shark"
