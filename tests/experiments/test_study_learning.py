"""How the folders of a study are learned: what ways share changes nothing."""

import copy
import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hurried import Counter, job_of
from PIL import Image
from safetensors.torch import load_file

from experiments.learning import learn_folder, share_class_images, stage_1_name
from imagelab.errors import UserError
from imagelab.training.checkpoint import read_checkpoint, write_checkpoint
from imagelab.training.loop import Trainer
from mifo.learned import read_manifest
from mifo.learning import priors
from mifo.learning.places import CHECKPOINT
from mifo.learning.plan import make_plan
from mifo.learning.resume import kept_settings
from mifo_lora import read_lora


def config_of(work, way="other", loss="mifo", **settings):
    """How the first folder is learned in a way of its own."""
    config = job_of(work, "kind2_000", loss).config
    return config.with_settings(output_dir=work / "learned" / way, **settings)


@pytest.fixture
def begun(finished, work):
    """A study with the folders and the kept stages 1 of the finished comparison."""
    for name in ("folders", "stage1"):
        shutil.copytree(finished / name, work / name)
    return work


def test_a_kept_stage_1_changes_nothing(begun, finished, tmp_path, monkeypatch):
    """Learned behind mifo's stage 1 and from its own: the same to the bit."""
    folders = []
    shutil.copytree(finished / "folders", tmp_path / "own/folders")
    for work in (begun, tmp_path / "own"):
        steps = Counter(monkeypatch, Trainer, "update")
        config = config_of(work, lora_rank=4, finetune_steps=2, finetune_learning_rate=0.01)
        learn_folder(work, config, "cpu")
        assert steps.count == 2 + 3 * (work != begun)
        folders.append(work / "learned/other/kind2_000")
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors"))
    assert len(files) == 2 + 1  # two tokens and a LoRA
    for file in files:
        ours, theirs = (read_lora(folder / file)[0] for folder in folders)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), file
    assert read_manifest(folders[0])["settings"]["lora_rank"] == 4


def test_a_stage_1_alone_is_what_was_kept(begun, monkeypatch):
    steps = Counter(monkeypatch, Trainer, "update")
    config = config_of(begun, finetune="none")
    name = stage_1_name(make_plan(config))
    learn_folder(begun, config, "cpu")
    assert steps.count == 0
    rows = read_checkpoint(begun / "stage1" / name).tensors["trained.rows"]
    for asset in range(2):
        path = begun / f"learned/other/kind2_000/asset{asset}.safetensors"
        [row] = load_file(path).values()
        assert torch.equal(row[0], rows[asset])


@pytest.mark.parametrize("is_unfinished", [False, True])
def test_another_photo_than_was_begun_with_is_told_with_what_there_is_to_do(begun, is_unfinished):
    """Not with --overwrite, which no experiment has."""
    config = config_of(begun)
    plan = make_plan(config)
    checkpoint = plan.work / CHECKPOINT
    if is_unfinished:
        plan.work.mkdir(parents=True)
        saved = read_checkpoint(begun / "stage1" / stage_1_name(plan))
        saved.facts["settings"] = kept_settings(plan.config)
        write_checkpoint(checkpoint, saved)
    with Image.open(begun / "folders/kind2_000/img.jpg") as photo:
        photo.transpose(Image.Transpose.ROTATE_180).save(begun / "folders/kind2_000/img.jpg")
    told = "the picture is not what the unfinished run had; put that back, or give another --work$"
    with pytest.raises(UserError, match=told):
        learn_folder(begun, config, "cpu")
    assert checkpoint.is_file() == is_unfinished
    if is_unfinished:
        checkpoint.write_bytes(b"half")
        with pytest.raises(UserError, match=f"{checkpoint} cannot be read .*; delete {checkpoint}"):
            learn_folder(begun, config, "cpu")


def test_another_attention_loss_has_a_stage_1_of_its_own(begun, monkeypatch):
    """What it shares with the others are the class images, which are made once."""
    kept = {path.name for path in (begun / "stage1").iterdir()}
    assert len(kept) == 4  # two folders, two losses
    steps = Counter(monkeypatch, Trainer, "update")
    made = Counter(monkeypatch, priors, "denoise")
    learn_folder(begun, config_of(begun, "one", "penalty"), "cpu")
    assert (steps.count, made.count) == (3 + 1, 1)
    now = {path.name for path in (begun / "stage1").iterdir()}
    assert now > kept and len(now) == 5
    learn_folder(begun, config_of(begun, "other"), "cpu")
    assert (steps.count, made.count) == (3 + 1 + 1, 1)
    learn_folder(begun, config_of(begun, "other"), "cpu")  # it is learned
    assert steps.count == 3 + 1 + 1


@pytest.fixture(scope="module")
def plan(finished):
    return make_plan(config_of(finished))


def test_what_stage_1_depends_on(plan):
    def name(**settings):
        return stage_1_name(replace(plan, config=plan.config.with_settings(**settings)))

    same = [
        {"finetune": "none"},
        {"finetune": "full"},
        {"finetune_steps": 9},
        {"finetune_learning_rate": 0.5},
        {"lora_rank": 9},
        {"prior_weight": 0.5},
        {"class_prompt": "a photo of a cat"},
        {"num_class_images": 9},
        {"output_dir": "elsewhere"},
    ]
    assert {name(**each) for each in same} == {name()}
    assert name().startswith("kind2_000-") and name().endswith(".safetensors")
    others = [
        {"instance": "kind2_004"},
        {"seed": 9},
        {"train_steps": 9},
        {"reward_steps": 2},
        {"learning_rate": 0.5},
        {"warmup_steps": 9},
        {"attention_loss": "none"},
        {"attention_weight": 0.5},
        {"initialize_from_class": True},
        {"initializer_tokens": ("cat",)},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.5},
    ]
    names = [name(), *(name(**each) for each in others)]
    assert len(set(names)) == len(names)


def test_a_whole_model_in_half_precision_has_a_stage_1_of_its_own(plan):
    """It is autocast, while a LoRA learns in half precision itself."""
    half = replace(plan, dtype=torch.bfloat16)
    full = replace(half, config=plan.config.with_settings(finetune="full"))
    assert len({stage_1_name(each) for each in (plan, half, full)}) == 3


def test_another_base_model_has_a_stage_1_of_its_own(plan):
    model = copy.copy(plan.model)
    model.digest = "another"
    assert stage_1_name(replace(plan, model=model)) != stage_1_name(plan)


# ----------------------------------------------------------------------------------------------
# class images


def test_class_images_are_shared_but_not_replaced(tmp_path):
    for way, name, content in (
        ("one", "a", b"from one"),
        ("two", "a", b"from two"),
        ("two", "b", b"from two"),
        ("two", ".half", b"unfinished"),
        ("mine", "b", b"mine"),
    ):
        path = tmp_path / way / ".class_images" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    share_class_images(tmp_path, tmp_path / "mine")
    mine = {path.name: path for path in (tmp_path / "mine/.class_images").iterdir()}
    assert sorted(mine) == ["a.safetensors", "b.safetensors"]
    assert mine["a.safetensors"].read_bytes() in (b"from one", b"from two")
    assert mine["a.safetensors"].stat().st_nlink == 2
    assert mine["b.safetensors"].read_bytes() == b"mine"


def test_class_images_are_shared_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    made = tmp_path / "mifo/.class_images/a.safetensors"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"latents")

    def link(*paths):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    share_class_images(tmp_path, tmp_path / "rank4")
    assert (tmp_path / "rank4/.class_images/a.safetensors").read_bytes() == b"latents"
