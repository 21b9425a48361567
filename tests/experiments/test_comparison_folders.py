"""The instance folders of a comparison, and how each variant learns and paints them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hurried import settings_of
from thin import contents

from experiments.comparison.folders import (
    folder_name,
    learning_config,
    make_folder,
    make_job,
    prepare,
)
from experiments.comparison.settings import LOSSES, TEXTS, Settings, Variant, variants
from imagelab.errors import UserError
from mifo.defaults import Defaults, read_own
from mifo.learning.config import CHOICES, Recipe
from mifo.learning.instance import read_instance
from mifo.synthesis.config import SynthesisConfig
from toybox.scenes.instances import BETWEEN, look_alikes, read_looks
from toybox.stable_diffusion import FOLDER
from toybox.stable_diffusion.architecture import trained_kinds

KINDS = ["bear", "cat", "fox", "teapot"]
MIFO = Variant("toybox", "random", "mifo")

# ----------------------------------------------------------------------------------------------
# look-alikes


def steps_of(looks) -> np.ndarray:
    """Degrees from each hue to the next one, around the circle."""
    return np.diff([look.hue for look in looks]) % 360


def test_hues_lie_apart_around_the_circle():
    firsts, wrapped = [], 0
    for seed in range(300):
        looks = look_alikes(np.random.default_rng(seed), 2 + seed % 2, "kind", apart=(25, 50))
        steps, hues = steps_of(looks), [look.hue for look in looks]
        assert ((steps >= 24.9) & (steps <= 50.1)).all()  # hues are rounded to tenths
        assert all(0 <= hue <= 360 for hue in hues)
        assert all(hue == round(hue, 1) for hue in hues)
        assert len({look.kind for look in looks}) == 1
        firsts.append(hues[0])
        wrapped += hues != sorted(hues)
    assert min(firsts) < 10 and max(firsts) > 350  # they begin anywhere
    assert np.histogram(firsts, 4, (0, 360))[0].min() > 50
    assert wrapped > 10
    steps = [float(s) for seed in range(99) for s in steps_of(look_alikes(
        np.random.default_rng(seed), 3, "kind", apart=(25, 50)))]  # fmt: skip
    assert min(steps) < 28 and max(steps) > 47
    assert np.mean(steps) == pytest.approx(37.5, abs=2)


def test_hues_a_fixed_angle_apart():
    [first, *others] = look_alikes(np.random.default_rng(1), 3, "kind", apart=(30, 30))
    expected = [(first.hue + 30) % 360, (first.hue + 60) % 360]
    assert [look.hue for look in others] == pytest.approx(expected, abs=0.11)


def test_toys_of_one_hue_have_it_anywhere():
    hues = set()
    for seed in range(20):
        looks = look_alikes(np.random.default_rng(seed), 3, "hue", apart=(25, 50))
        [hue] = {look.hue for look in looks}
        assert len({look.kind for look in looks}) == 3
        hues.add(hue)
    assert len(hues) == 20 and not hues & set(BETWEEN)


# ----------------------------------------------------------------------------------------------
# instance folders


def test_folders_of_each_sort(work):
    names = [folder_name(index) for index in range(8)]
    assert len(set(names)) == 8
    sorts = [name.split("_")[0] for name in names]
    assert sorted(sorts) == sorted(2 * ["kind2", "kind3", "hue2", "hue3"])
    for index, name in enumerate(names[:4]):
        folder = work / name
        make_folder(folder, 3, index, KINDS)
        looks = read_looks(folder)
        assert {look.kind for look in looks} <= set(KINDS)
        assert len(read_instance(folder, 128, 8).masks) == len(looks)
        alike = "kind" if len({look.kind for look in looks}) == 1 else "hue"
        if alike == "kind":
            assert ((steps_of(looks) >= 24.9) & (steps_of(looks) <= 50.1)).all()
        else:
            assert len({look.hue for look in looks}) == 1
        assert name == f"{alike}{len(looks)}_{index:03d}"


def test_a_folder_is_finished_or_left_alone(work):
    folder = work / "kind2_000"
    make_folder(folder, 0, 0, KINDS)
    before = contents(folder)
    (folder / "scene.json").unlink()  # as if it had been stopped
    (folder / "mask1.png").unlink()
    make_folder(folder, 0, 0, KINDS)
    assert contents(folder) == before
    (folder / "img.jpg").write_bytes(b"mine")
    make_folder(folder, 0, 0, KINDS)
    assert (folder / "img.jpg").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="other toys than --seed 1"):
        make_folder(folder, 1, 0, KINDS)


def test_shipped_toybox_tells_its_kinds(tmp_path):
    assert {"car", "fish"} <= set(trained_kinds(FOLDER))
    with pytest.raises(ValueError, match="which kinds of toys"):
        trained_kinds(tmp_path)


def test_others_from_a_number_on(finished, work):
    shutil.copytree(finished, work)
    names = prepare(work, settings_of("--first", "1"), ["toybox"])
    assert names == ["kind3_001", "hue3_002"]
    assert {look.kind for look in read_looks(work / "folders/hue3_002")} <= set(
        trained_kinds(FOLDER)
    )


def test_settings_that_are_kept(finished):
    kept = json.loads((finished / "settings.json").read_text())
    digest = kept.pop("toybox")
    assert len(digest) == 12
    assert kept == {
        "seed": 0, "train_steps": 3, "finetune_steps": 1, "learning_rate": 5e-3,
        "finetune_learning_rate": 3e-4, "initializer_scale": 0.02, "num_class_images": 1,
        "weight": 1.0, "mixed_precision": "no",
    }  # fmt: skip


def test_the_base_models_stay_the_same(finished, work, tmp_path):
    """Another may join; one that has changed may not go on."""
    base, settings = tmp_path / "base", settings_of()
    shutil.copytree(FOLDER, base)
    shutil.copytree(finished, work)
    prepare(work, settings, ["toybox", str(base)])
    kept = json.loads((work / "settings.json").read_text())
    assert kept["toybox"] == kept[str(base)]  # the same weights
    prepare(work, settings, ["toybox"])
    assert json.loads((work / "settings.json").read_text()) == kept
    with (base / "vae/diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="with other settings .*base"):
        prepare(work, settings, [str(base)])
    prepare(work, settings, ["toybox"])


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_of_settings_is_told(finished, work, content):
    shutil.copytree(finished, work)
    (work / "settings.json").write_text(content)
    with pytest.raises(UserError, match="settings.json.* give another --work"):
        prepare(work, settings_of(), ["toybox"])


# ----------------------------------------------------------------------------------------------
# variants


def test_settings_are_the_defaults_but_for_what_toybox_brings():
    settings, recipe, paper = Settings(), Recipe(), Defaults()
    config = learning_config(Path("work"), settings, MIFO, "kind2_000")
    ours = config.recipe
    for name in ("train_steps", "reward_steps", "finetune_steps", "lora_rank", "prior_weight"):
        assert getattr(ours, name) == getattr(recipe, name)
    assert ours.learning_rate == paper.learning_rate
    assert (ours.attention_loss, ours.attention_weight) == ("mifo", 1.0)
    assert ours.finetune_learning_rate == 3e-4  # found for every loss, see docs/results.md
    brought = read_own("toybox").defaults
    assert ours.initializer_scale == brought.initializer_scale
    assert ours.num_class_images == brought.num_class_images
    assert settings.guidance_scale == brought.guidance_scale
    assert settings.num_inference_steps == SynthesisConfig().num_inference_steps
    assert settings.guidance_steps == SynthesisConfig().guidance.guidance_steps


def test_a_variant_s_learning(monkeypatch):
    settings = settings_of("--train_steps", "10", "--seed", "7", "--weight", "0.5")
    monkeypatch.setitem(LOSSES, "reward", 3.0)
    made = learning_config(Path("work"), settings, Variant("a/x", "kind", "reward"), "hue3_002")
    assert (made.instance, made.folder_path) == ("hue3_002", "work/folders")
    assert (made.model_path, made.output_dir) == ("a/x", "work/learned/x-kind-reward")
    assert made.seed == 7 + 2000
    recipe = made.recipe
    assert (recipe.train_steps, recipe.reward_steps, recipe.finetune_steps) == (10, 3, 1)
    assert (recipe.attention_loss, recipe.attention_weight) == ("reward", 1.5)
    assert recipe.initialize_from_class and not recipe.initializer_tokens
    assert not learning_config(
        Path("work"), settings, MIFO, "hue3_002"
    ).recipe.initialize_from_class
    assert recipe.num_class_images == 1
    assert made.runtime.mixed_precision == "no" and made.runtime.offline


def test_every_loss_is_one_of_learning():
    assert set(LOSSES) == set(TEXTS) == set(CHOICES["attention_loss"])
    names = [variant.name for variant in variants(["a/x", "y"], ["random"], ["mifo", "none"])]
    assert names == ["x-random-mifo", "x-random-none", "y-random-mifo", "y-random-none"]


def test_a_variant_s_pictures(finished):
    settings = settings_of("--pictures", "5", "--alone", "3", "--seed", "7")
    job = make_job(finished, settings, MIFO, "kind3_001")
    tasks = [(t.name, t.assets, t.has_boxes, t.images, t.seed) for t in job.tasks]
    assert tasks == [
        ("boxed", (0, 1, 2), True, 5, 1007),
        ("unboxed", (0, 1, 2), False, 5, 1007),
        ("alone 0", (0,), False, 3, 1007),
        ("alone 1", (1,), False, 3, 1007),
        ("alone 2", (2,), False, 3, 1007),
    ]
    assert job.looks == tuple(read_looks(finished / "folders/kind3_001"))
    assert job.about == {"base": "toybox", "tokens": "random", "loss": "mifo"}
    assert job.painting == {
        "num_inference_steps": 1, "guidance_scale": 3.0, "step_scale": 1.0, "guidance_steps": 1,
        "mixed_precision": "no",
    }  # fmt: skip
    assert job.name == "toybox-random-mifo, kind3_001"
