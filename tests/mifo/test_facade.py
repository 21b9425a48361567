"""`mifo.learn` and `mifo.load(...).paint(...)`, and what a notebook shows of them."""

import io
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import mifo
import semantic_learning
from imagelab.errors import UserError
from mifo.learned import Learned
from mifo.synthesis import paint as painting

QUICK = {"num_inference_steps": 2, "guidance_steps": 1, "guidance_iterations": 1, "device": "cpu"}
PROMPT = "a photo of <asset1> and <asset0>"
#: The quickest way to paint, without boxes.
PLAIN = {"num_inference_steps": 1, "box_control": False, "device": "cpu", "seed": 3}


@pytest.fixture(scope="module")
def toys(learned_dir):
    return mifo.load("toys", learned_dir)


def test_the_function_learns_what_the_command_learns(examples, small_sd, learned_dir, tmp_path):
    learned = mifo.learn(
        examples / "toys", model_path=str(small_sd), device="cpu", mixed_precision="no", seed=1,
        train_steps=3, reward_steps=1, finetune_steps=2, lora_rank=2, finetune_learning_rate=0.02,
        prior_weight=0.0, output_dir=str(tmp_path / "mine"),
    )  # fmt: skip
    assert learned.folder == tmp_path / "mine/toys"
    assert learned.tokens == ["<asset0>", "<asset1>"] and len(learned.separation) == 2
    for name in ("asset0.safetensors", "pytorch_lora_weights.safetensors"):
        ours, theirs = ((f / name).read_bytes() for f in (learned.folder, learned_dir / "toys"))
        assert len(ours) > 1000
        weights = [data[8 + int.from_bytes(data[:8], "little") :] for data in (ours, theirs)]
        assert weights[0] == weights[1]
    with pytest.raises(UserError, match="is there already"):
        mifo.learn(examples / "toys", model_path=str(small_sd), output_dir=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="no setting 'train_stops'; the settings are attention_"):
        mifo.learn(examples / "toys", train_stops=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_steps": "30"}, "train_steps is '30'; give a whole number"),
        ({"train_steps": 2.5}, "train_steps is 2.5; give a whole number"),
        ({"prior_weight": True}, "prior_weight is True; give a number"),
        ({"offline": 1}, "offline is 1; give True or False"),
        ({"initializer_tokens": 3}, "initializer_tokens is 3; give a list of texts"),
        ({"seed": 2**70}, "the seed is 1180591620717411303424; give a whole number from 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": "abc"}, "seed is 'abc'; give a whole number"),
    ],
)
def test_settings_are_checked_before_anything_is_read(settings, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        mifo.learn(tmp_path / "nothing", output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_paths_and_single_words_are_settings_too(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("mifo.facade.make_plan", lambda config, device: seen.append(config))
    monkeypatch.setattr("mifo.learning.run.learn", lambda *_, **__: None)
    monkeypatch.setattr("mifo.facade.LearnedInstance", lambda folder: folder)
    (tmp_path / "toys").mkdir()
    monkeypatch.chdir(tmp_path / "toys")
    out = tmp_path / "out"
    found = mifo.learn(".", seed=1, output_dir=out, initializer_tokens="red car")
    assert found == out / "toys"
    (config,) = seen
    assert config.output_dir == str(out) and config.recipe.initializer_tokens == ("red car",)
    assert config.folder_path == str(tmp_path)


def test_boxes_by_asset_and_in_the_prompts_order_are_the_same(toys):
    left, right = (0.0, 0.1, 0.5, 0.9), "50%,10%,100%,90%"
    named = toys.paint(PROMPT, {"<asset0>": left, "<asset1>": [right]}, seed=3, **QUICK)
    listed = toys.paint(PROMPT, [right, left], seed=3, **QUICK)
    assert named[0].names == ("<asset1>", "<asset0>")
    assert named[0].boxes == listed[0].boxes == ((0.5, 0.1, 1, 0.9), left)
    assert np.array_equal(named[0].image, listed[0].image)
    pixels = {"<asset0>": "0,12.8,64,115.2px", "<asset1>": np.float32([0.5, 0.1, 1, 0.9])}
    sized = toys.paint(PROMPT, pixels, seed=3, width=128, height=128, **QUICK)
    assert sized[0].boxes[1] == left
    with pytest.raises(UserError, match="None is no box"):
        toys.paint(PROMPT, {"<asset0>": None, "<asset1>": right}, seed=3, **QUICK)
    one = toys.paint("a photo of <asset0>", left, seed=3, **QUICK)
    assert one[0].boxes == (left,)
    with pytest.raises(UserError, match="no box for <asset0>"):
        toys.paint(PROMPT, {"<asset1>": right}, seed=3, **QUICK)


def test_pictures_go_by_their_own_seeds_and_are_saved_under_new_numbers(toys, tmp_path):
    both = toys.paint(PROMPT, seed=5, num_images=2, batch_size=2, **QUICK)
    assert len(both) == 2 and len(both[1:]) == 1
    second = toys.paint(PROMPT, seed=6, **QUICK)
    assert np.abs(np.asarray(both[1].image, float) - np.asarray(second[0].image, float)).max() <= 1
    assert [path.name for path in both.save(tmp_path)] == ["0000.png", "0001.png"]
    assert [path.name for path in second.save(tmp_path)] == ["0002.png"]
    facts = json.loads((tmp_path / "0001.json").read_text())
    assert facts["settings"]["seed"] == 6 and facts["subjects"] == ["<asset1>", "<asset0>"]


def test_a_notebook_shows_pictures_with_boxes_and_what_was_learned(toys):
    paintings = toys.paint(PROMPT, seed=5, num_images=2, **QUICK)
    one = Image.open(io.BytesIO(paintings[0]._repr_png_()))
    assert one.size == paintings[0].image.size
    assert not np.array_equal(one, paintings[0].image)  # its boxes are drawn
    sheet = Image.open(io.BytesIO(paintings._repr_png_()))
    assert sheet.width > 2 * 256 - 1 and sheet.height >= 256
    assert toys._repr_html_().count('<img src="data:image/png;base64,') == 2
    assert "<asset0>" not in toys._repr_html_()  # the browser would take it for a tag
    assert toys.attention.size[0] > 100 and toys.curves.size[0] > 100


def test_a_package_that_only_reads_folders_needs_no_torch():
    code = "import sys, mifo, mifo.learning.instance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------------------
# the model that is kept


def pixels(thin, prompt="a photo of <asset0>", **settings) -> bytes:
    (picture,) = thin.paint(prompt, **PLAIN | settings)
    return picture.image.tobytes()


@pytest.fixture(scope="module")
def thin_dir(thin_argv, tmp_path_factory) -> Path:
    """The folder with a learned folder `toys` of a model that is loaded and paints at once."""
    folder = tmp_path_factory.mktemp("thin")
    semantic_learning.main([*thin_argv, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def thin(thin_dir):
    return mifo.load("toys", thin_dir)


@pytest.fixture
def files(thin_dir, tmp_path) -> dict[str, str]:
    """The files of the learned folder, in another place."""
    folder = shutil.copytree(thin_dir / "toys", tmp_path / "files")
    names = {"lora": "pytorch_lora_weights", "token": "asset0"}
    return {name: str(folder / f"{stem}.safetensors") for name, stem in names.items()}


@pytest.fixture
def loads(monkeypatch) -> list:
    """Weak references to the models that are loaded; no former one is there any more."""
    models, load = [], Learned.load

    def spied(*args):
        assert not [model for model in models if model()]
        model, ids = load(*args)
        models.append(weakref.ref(model))
        return model, ids

    monkeypatch.setattr(Learned, "load", spied)
    return models


def test_every_paint_has_the_model_that_it_asks_for(
    thin, thin_dir, thin_argv, files, loads, tmp_path
):
    """Each picture, whatever was painted before it, is the one of a fresh process."""
    moved = shutil.copytree(thin_argv[-1], tmp_path / "moved")
    weights = moved / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"conv_in.bias": state["conv_in.bias"] + 1}, weights)
    tokens = {"tokens": files["token"]}  # of <asset0> alone
    requests = {
        "plain": {"prompt": PROMPT, "mixed_precision": "no"},
        "rounded": {"prompt": PROMPT, "mixed_precision": "bf16"},
        "tokens": tokens,
        "LoRA": tokens | {"lora": files["lora"]},
        "strong LoRA": tokens | {"lora": files["lora"], "lora_scale": 5.0},
        "other base": tokens | {"model_path": moved},
    }
    wanted = {name: pixels(mifo.load("toys", thin_dir), **each) for name, each in requests.items()}
    assert len(set(wanted.values())) == 6
    loads.clear()
    order = ["plain", "rounded", "plain", "strong LoRA", "LoRA", "plain", "tokens", "plain"]
    order += ["tokens", "other base", "tokens"]
    for name in order:
        assert pixels(thin, **requests[name]) == wanted[name], name
    assert len(loads) == len(order)


def test_a_file_that_is_another_now_is_read_anew(thin, thin_dir, thin_argv, files):
    settings = {"lora": files["lora"], "tokens": files["token"], "model_path": thin_argv[-1]}
    weights, pictures = load_file(files["lora"]), []
    for factor in (1, 5):
        stronger = {key: factor * each for key, each in weights.items() if "lora_B" in key}
        save_file(weights | stronger, files["lora"])
        pictures.append(pixels(thin, **settings))
    assert pictures[0] != pictures[1] == pixels(mifo.load("toys", thin_dir), **settings)


def test_what_makes_no_other_model_loads_none(thin, loads):
    for more in ({"seed": 4}, {"negative_prompt": "noise"}, {"guidance_scale": 2}):
        pixels(thin, mixed_precision="no", **more)
    with pytest.raises(UserError):
        thin.paint("<asset9>", **PLAIN)
    pixels(thin, "<asset1>", mixed_precision="no", width=192)
    assert len(loads) == 1


# ----------------------------------------------------------------------------------------------
# what goes wrong, or takes long


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model_id", "get another learned folder with mifo.load"),
        ("models_dir", "get another learned folder with mifo.load"),
        ("output_path", "save the pictures with save(folder)"),
    ],
)
def test_what_paint_has_from_elsewhere_is_no_setting(thin, name, advice):
    with pytest.raises(UserError) as error:
        thin.paint("<asset0>", **{name: "x"})
    assert str(error.value) == f"{name} is no setting here; {advice}"


@pytest.mark.parametrize("name", ["instance", "folder_path"])
def test_the_folder_of_learn_is_its_argument(examples, name):
    with pytest.raises(UserError) as error:
        mifo.learn(examples / "toys", **{name: "x"})
    advice = "the first argument is the instance folder"
    assert str(error.value) == f"{name} is no setting here; {advice}"


@pytest.mark.parametrize(
    ("boxes", "option"),
    [([(0, 0, 0.5, 1)], "boxes"), ({"<asset0>": (0, 0, 0.5, 1)}, "box")],
)
def test_boxes_without_box_control_are_refused(thin, boxes, option):
    with pytest.raises(UserError) as error:
        thin.paint("<asset0>", boxes, **PLAIN)
    assert str(error.value) == f"--{option} and --no_box_control are both given; give one of them"


def test_a_bar_shows_the_steps(thin, capsys):
    thin.paint("<asset0>", num_images=3, batch_size=2, **PLAIN | {"num_inference_steps": 2})
    assert re.search(r"synthesis: 100%\|.*\| 4/4 \[", capsys.readouterr().err)  # of two batches


def test_one_batch_without_a_number(thin):
    assert len(thin.paint("<asset0>", num_images=None, batch_size=2, **PLAIN)) == 2


def test_ctrl_c_leaves_the_pictures_that_are_done(thin, tmp_path, monkeypatch):
    decode, done = painting.decode, []

    def interrupted(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(True)
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(painting, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            thin.paint("<asset0>", num_images=3, **PLAIN)
    assert [picture.facts["settings"]["seed"] for picture in thin.painted] == [3, 4]
    assert [path.name for path in thin.painted.save(tmp_path)] == ["0000.png", "0001.png"]
    kept = thin.painted
    with pytest.raises(UserError):
        thin.paint("<asset9>", **PLAIN)
    assert thin.painted is kept  # nothing was begun
    assert thin.paint("<asset0>", **PLAIN) is thin.painted
    assert np.array_equal(thin.painted[0].image, kept[0].image)


def test_nothing_is_painted_at_first(thin):
    assert len(thin.painted) == 0 and thin.painted._repr_png_() is None
    with pytest.raises(UserError, match="there are no pictures yet; paint some first"):
        thin.painted.sheet()


def test_too_little_memory_is_a_memory_error(thin, monkeypatch):
    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(painting, "denoise", full)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        thin.paint("<asset0>", **PLAIN)
    monkeypatch.setattr("mifo.facade.prepare", full)  # moves the model to its device
    with pytest.raises(MemoryError):
        thin.paint("<asset0>", **PLAIN)
