"""The folders of a comparison, and how they are learned: what variants share changes nothing."""

import errno
import os
import shutil

import pytest
from hurried import Counter, config_of
from thin import contents

import semantic_learning
from experiments.comparison.folders import folder_name, make_folder
from experiments.comparison.learning import learn_folder, share_class_images
from imagelab.training.loop import Trainer
from mifo.learning import priors, stages
from mifo.learning.instance import read_instance
from mifo_lora import read_lora
from toybox.scenes.instances import read_looks
from toybox.scenes.toys import KINDS
from toybox.stable_diffusion.architecture import trained_kinds

# ----------------------------------------------------------------------------------------------
# instance folders


def test_folders_of_each_sort(work):
    kinds = ["bear", "cat", "fox", "teapot"]
    names = [folder_name(index) for index in range(8)]
    assert len(set(names)) == 8
    sorts = []
    for index, name in enumerate(names):
        folder = work / name
        make_folder(folder, 3, index, kinds)
        looks = read_looks(folder)
        assert {look.kind for look in looks} <= set(kinds)
        assert len(read_instance(folder, 128, 8).masks) == len(looks)
        alike = "kind" if len({look.kind for look in looks}) == 1 else "hue"
        assert alike == "kind" or len({look.hue for look in looks}) == 1
        assert name == f"{alike}{len(looks)}_{index:03d}"
        sorts.append((alike, len(looks)))
    assert sorted(sorts) == sorted(2 * [("kind", 2), ("kind", 3), ("hue", 2), ("hue", 3)])


def test_a_folder_is_finished_or_left_alone(work):
    kinds = ["bear", "cat", "fox"]
    folder = work / "kind2_000"
    make_folder(folder, 0, 0, kinds)
    before = contents(folder)
    (folder / "instance.json").unlink()  # as if it had been stopped
    (folder / "mask1.png").unlink()
    make_folder(folder, 0, 0, kinds)
    assert contents(folder) == before
    (folder / "img.jpg").write_bytes(b"mine")
    make_folder(folder, 0, 0, kinds)
    assert (folder / "img.jpg").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="other toys than --seed 1"):
        make_folder(folder, 1, 0, kinds)


def test_shipped_toybox_tells_its_kinds(tmp_path):
    from toybox.stable_diffusion import FOLDER

    assert {"car", "fish"} <= set(trained_kinds(FOLDER))
    with pytest.raises(ValueError, match="which kinds of toys"):
        trained_kinds(tmp_path)


# ----------------------------------------------------------------------------------------------
# learning


@pytest.mark.parametrize("name", ["rank4", "full", "tokens"])
def test_a_kept_stage_1_changes_nothing(name, finished, tmp_path, monkeypatch):
    """Learned behind mifo's stage 1 and from its own: the same to the bit."""
    folders = []
    for work in (tmp_path / "behind", tmp_path / "own"):
        shutil.copytree(finished / "folders", work / "folders")
        if work.name == "behind":
            shutil.copytree(finished / "stage1", work / "stage1")
        steps = Counter(monkeypatch, Trainer, "update")
        config = config_of(work, name)
        learn_folder(work, config, "cpu")
        assert steps.count == (name != "tokens") + 3 * (work.name == "own")
        folders.append(work / "learned" / name / "kind2_000")
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors"))
    assert len(files) == {"rank4": 2 + 1, "full": 2 + 3, "tokens": 2}[name]
    for file in files:
        ours, theirs = (read_lora(folder / file)[0] for folder in folders)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), file


def test_another_attention_loss_has_a_stage_1_of_its_own(finished, work, monkeypatch):
    shutil.copytree(finished / "folders", work / "folders")
    shutil.copytree(finished / "stage1", work / "stage1")
    config = config_of(work, "penalty")
    steps = Counter(monkeypatch, Trainer, "update")
    learn_folder(work, config, "cpu")
    assert steps.count == 3 + 1


def test_class_images_are_shared_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    made = tmp_path / "mifo/.class_images/a.safetensors"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"latents")

    def link(*paths):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    share_class_images(tmp_path, tmp_path / "rank4")
    assert (tmp_path / "rank4/.class_images/a.safetensors").read_bytes() == b"latents"


def test_tokens_start_from_phrases_or_kinds(finished, work):
    shutil.copytree(finished / "folders", work / "folders")
    for words, told_apart in (("phrase", True), ("kind", False)):
        tokens = config_of(work, "mifo", "--words", words).recipe.initializer_tokens
        first, second = (token.split() for token in tokens)
        assert first[-1] == second[-1] and first[-1] in KINDS
        assert (first != second) == told_apart
        assert len(first) == 1 + told_apart


def test_class_images_are_made_once(finished, work, monkeypatch):
    shutil.copytree(finished / "folders", work / "folders")
    made = Counter(monkeypatch, priors, "denoise")
    for name in ("mifo", "rank4"):
        config = config_of(work, name)
        learn_folder(work, config, "cpu")
    assert made.count == 1


@pytest.mark.parametrize(
    ("choice", "used"),
    [
        ("mifo", ["reward", "penalty", "penalty", "penalty", "penalty"]),
        ("reward", ["reward", "reward", "reward", None, None]),
        ("penalty", ["penalty"] * 5),
    ],
)
def test_attention_loss_of_each_step(choice, used, learn_argv, tmp_path, monkeypatch):
    """Three steps of stage 1, the first of them with the reward if it is MIFO; two of stage 2."""
    seen = []
    learning_loss = stages.learning_loss

    def watched(predicted, target, maps, masks, attention_term, *weights):
        seen.append(attention_term)
        return learning_loss(predicted, target, maps, masks, attention_term, *weights)

    monkeypatch.setattr(stages, "learning_loss", watched)
    semantic_learning.main([*learn_argv, "--output_dir", str(tmp_path), "--attention_loss", choice])
    assert seen == used
