"""`mifo.learn` and `mifo.load(...).paint(...)`, and what a notebook shows of them."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import mifo
from imagelab.errors import UserError

QUICK = {"num_inference_steps": 2, "guidance_steps": 1, "guidance_iterations": 1, "device": "cpu"}
PROMPT = "a photo of <asset1> and <asset0>"


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
