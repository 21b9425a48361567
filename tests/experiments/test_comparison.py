"""The comparison: statistics worked by hand, its folders, and the command with steps of nothing.

One test runs this file as a script of its own, in two processes.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from thin import contents

import imagelab.figures
import semantic_learning
from experiments import comparison
from experiments.comparison_report import IDENTITY, Comparison, Result, chance, difference, markdown
from experiments.comparison_settings import LONG, SHORT, VARIANTS, Settings
from imagelab.evaluation.report import TILE, Mean
from mifo import evaluation
from mifo.learning import priors
from mifo.learning import run as learning
from mifo.learning.instance import read_instance
from mifo_lora import read_lora
from toybox.scenes.instances import read_looks
from toybox.scenes.scenes import KINDS
from toybox.stable_diffusion.architecture import trained_kinds

ROOT = Path(__file__).parents[2]
TINY = [
    *("--train_steps", "3", "--finetune_steps", "1", "--num_class_images", "1"),
    *("--num_inference_steps", "2", "--guidance_steps", "2", "--guidance_iterations", "1"),
    *("--folders", "2", "--seeds", "1", "--device", "cpu", "--mixed_precision", "no"),
]
ONLY = ["--only", "mifo", "rank4", "no_boxes"]
STEPS = 2 * (3 + 1) + 2 * 1  # two folders: both stages, then stage 2 of rank4 alone


def hurry(patch):
    """Class images take one step, and the figures of learning are empty."""
    patch.setattr(priors, "STEPS", 1)
    for name in ("plot_losses", "plot_attention"):
        patch.setattr(imagelab.figures, name, lambda path, *args: path.touch())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hurry(monkeypatch)


class Counter:
    """Calls of a function are counted; number ``stop`` of them is a Ctrl-C."""

    def __init__(self, monkeypatch, owner, name, stop=None):
        self.count = 0
        function = getattr(owner, name)

        def counted(*args, **more):
            self.count += 1
            if self.count == stop:
                raise KeyboardInterrupt
            return function(*args, **more)

        monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def run(work, *more):
    comparison.main([*TINY, *ONLY, "--work", str(work), *more])


def told(work):
    return json.loads((work / "comparison.json").read_text())


# ----------------------------------------------------------------------------------------------
# attention losses


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
    step_loss = learning.step_loss

    def watched(base, batch, layers, attention_loss, *more):
        seen.append(attention_loss)
        return step_loss(base, batch, layers, attention_loss, *more)

    monkeypatch.setattr(learning, "step_loss", watched)
    semantic_learning.main([*learn_argv, "--output_dir", str(tmp_path), "--attention_loss", choice])
    assert seen == used


# ----------------------------------------------------------------------------------------------
# statistics


def result(*right, instances=2, separation=(1.0,)) -> Result:
    """A picture for each pair (is box 0 right?, is box 1 right?), with a margin of ± 0.25."""
    rows = {True: [0.5, 0.25], False: [0.25, 0.5]}
    more = [0.0] * (instances - 2)
    records = [
        {
            "own": [0, 1],
            "spaces": {
                "toybox": {
                    "similarities": [rows[first] + more, rows[not second] + more],
                    "features": [1.0],
                }
            },
            "iou": [0.5, 0.5],
            "leakage": 0.25,
        }
        for first, second in right
    ]
    return Result(records, list(separation))


RESULTS = {
    "mifo": {
        "a": result((True, True), (True, False), separation=(0.75, 0.5)),  # ¾ right
        "b": result((True, True), instances=3),  # all right
    },
    "none": {
        "a": result((True, False), (False, False)),  # ¼ right
        "b": result((True, False), instances=3),  # ½ right
        "c": result((False, False)),  # of no folder that mifo has
    },
}


def test_summary_of_a_folder():
    assert RESULTS["mifo"]["a"].summary() | {IDENTITY: None, "leakage": None} == {
        IDENTITY: None,
        "toybox: margin": Mean(0.125, pytest.approx(12.706205 * 0.125)),  # ¼ and 0: t · σ / √2
        "IoU with the box": Mean(0.5, 0.0),
        "leakage": None,
        "separation": Mean(0.625, None),
    }
    assert RESULTS["mifo"]["a"].summary()[IDENTITY].mean == 0.75


def test_chance_is_the_mean_over_folders():
    assert chance(RESULTS) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_difference_is_by_folder():
    mean, half = difference(RESULTS["none"], RESULTS["mifo"])
    assert mean == -0.5  # −½ in a, −½ in b
    assert half == 0  # though the accuracies themselves vary
    assert difference(RESULTS["none"], {}) is None


def test_table():
    variants = [VARIANTS["mifo"], VARIANTS["rank4"], VARIANTS["none"]]
    failures = {"rank4, a": "no disk.", "rank4, b": "no disk."}
    lines = markdown(Comparison(Settings(seeds=7), variants, RESULTS, failures)).splitlines()
    head, _, mifo_row, none_row, _, legend, _, *failed = lines
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, mifo_row, none_row)]
    first, second = (dict(zip(cells[0], row, strict=True)) for row in cells[1:])
    # Student's t of one degree of freedom, 12.706, times the deviation over √2: half the difference
    assert first["right instance"] == f"0.875 ± {12.706205 * 0.125:.3f}"
    assert first["separation"] == f"0.812 ± {12.706205 * 0.1875:.3f}"
    assert (first["folders"], second["folders"]) == ("2", "3")
    assert (first["… less mifo's"], second["… less mifo's"]) == ("–", "-0.500 ± 0.000")
    assert "7 pictures" in legend and "0.444" in legend
    assert failed[0] == "rank4, a failed: no disk."
    assert "`rank4`" not in "".join(lines[:4])


def test_nothing_but_failures_is_told():
    text = markdown(Comparison(LONG, [VARIANTS["mifo"]], {}, {"mifo, a": "no disk."}))
    assert text.splitlines()[-1] == "mifo, a failed: no disk."


# ----------------------------------------------------------------------------------------------
# instance folders


def test_folders_of_each_sort(work):
    kinds = ["bear", "cat", "fox", "teapot"]
    names = [comparison.folder_name(index) for index in range(8)]
    assert len(set(names)) == 8
    sorts = []
    for index, name in enumerate(names):
        folder = work / name
        comparison.make_folder(folder, 3, index, kinds)
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
    comparison.make_folder(folder, 0, 0, kinds)
    before = contents(folder)
    (folder / "instance.json").unlink()  # as if it had been stopped
    (folder / "mask1.png").unlink()
    comparison.make_folder(folder, 0, 0, kinds)
    assert contents(folder) == before
    (folder / "img.jpg").write_bytes(b"mine")
    comparison.make_folder(folder, 0, 0, kinds)
    assert (folder / "img.jpg").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="other toys than --seed 1"):
        comparison.make_folder(folder, 1, 0, kinds)


def test_shipped_toybox_tells_its_kinds(tmp_path):
    from toybox.stable_diffusion import FOLDER

    assert {"car", "fish"} <= set(trained_kinds(FOLDER))
    with pytest.raises(ValueError, match="which kinds of toys"):
        trained_kinds(tmp_path)


# ----------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a comparison that nothing disturbed."""
    work = tmp_path_factory.mktemp("finished") / "work"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run(work)
    return work


def test_everything_is_written(finished, capsys):
    facts = told(finished)
    assert list(facts["variants"]) == ["mifo", "rank4", "no_boxes"]
    for row in facts["variants"].values():
        assert list(row["folders"]) == ["kind2_000", "kind3_001"]
        assert np.isfinite(row["all"][IDENTITY]["mean"])
        assert np.sum(row["confusion"]) == 2 + 3
    assert facts["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert facts["failures"] == {}
    assert (finished / "comparison.md").read_text().count("\n| ") == 3
    assert not (finished / "learned" / "no_boxes").exists()  # it paints with mifo's
    with Image.open(finished / "confusion.png") as picture:
        assert picture.width > picture.height


def test_sheet_shows_each_variant(finished):
    with Image.open(finished / "sheet.png") as file:
        sheet = np.asarray(file.convert("RGB"))
    gap = 4
    assert sheet.shape[1] == 4 * (TILE + gap) - gap
    for column, variant in enumerate(("mifo", "rank4", "no_boxes"), 1):
        [path] = (finished / "evaluation" / variant / "kind2_000" / "pictures").iterdir()
        with Image.open(path) as file:
            tile = np.asarray(file.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC))
        left = column * (TILE + gap)
        corner = sheet[:20, left : left + 20]
        assert np.array_equal(corner, tile[:20, :20])


def test_a_finished_comparison_learns_and_paints_nothing(finished, monkeypatch, capsys):
    before = told(finished)
    steps = Counter(monkeypatch, learning._Run, "step")
    pictures = Counter(monkeypatch, evaluation, "paint")
    run(finished)
    assert steps.count == pictures.count == 0
    assert told(finished) == before
    assert "| MIFO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "name", "stop", "left"),
    [
        (learning._Run, "step", 6, STEPS - 4),  # in stage 1 of the second folder
        (evaluation, "paint", 2, STEPS - 8),  # both are learned, one is painted
    ],
)
def test_stopped_and_resumed_is_as_undisturbed(
    owner, name, stop, left, finished, work, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        Counter(patch, owner, name, stop)
        with pytest.raises(SystemExit) as stopped:
            run(work)
        assert stopped.value.code == 130
    steps = Counter(monkeypatch, learning._Run, "step")
    run(work)
    assert steps.count == left
    assert told(work) == told(finished)


def test_a_failing_folder_does_not_stop_the_other(work, finished, monkeypatch, capsys):
    options = comparison.parse_args([*TINY, "--work", str(work)])[1]
    comparison.prepare(work, comparison.chosen(options)[0])
    mask = work / "folders" / "kind2_000" / "mask0.png"
    kept = mask.read_bytes()
    mask.unlink()
    with pytest.raises(SystemExit) as stopped:
        run(work)
    assert stopped.value.code == 2
    facts, whole = told(work), told(finished)
    assert list(facts["failures"]) == [
        f"{name}, kind2_000" for name in ("mifo", "rank4", "no_boxes")
    ]
    assert "mask0.png" in facts["failures"]["mifo, kind2_000"]
    for name, row in facts["variants"].items():
        assert row["folders"] == {"kind3_001": whole["variants"][name]["folders"]["kind3_001"]}
    assert "mifo, kind2_000 failed" in capsys.readouterr().out
    mask.write_bytes(kept)
    run(work)
    assert told(work) == whole


def test_two_processes_share_the_folders(finished, work):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [__file__, *TINY, "--only", "mifo", "--work", str(work)]
    threads = str(torch.get_num_threads())  # as many as here: sums are rounded alike
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, one = told(work), told(finished)
    assert two["variants"] == {"mifo": one["variants"]["mifo"]}
    assert two["chance"] == one["chance"] and two["failures"] == {}
    assert done.stdout.count("| MIFO") == 1  # the first process tells of all


@pytest.mark.parametrize("name", ["rank4", "full", "tokens"])
def test_a_kept_stage_1_changes_nothing(name, finished, tmp_path, monkeypatch):
    """Learned behind mifo's stage 1 and from its own: the same to the bit."""
    settings = comparison.chosen(comparison.parse_args([*TINY])[1])[0]
    folders = []
    for work in (tmp_path / "behind", tmp_path / "own"):
        shutil.copytree(finished / "folders", work / "folders")
        if work.name == "behind":
            shutil.copytree(finished / "stage1", work / "stage1")
        steps = Counter(monkeypatch, learning._Run, "step")
        config = comparison.learning_config(work, settings, VARIANTS[name], "kind2_000")
        comparison.learn_folder(work, config, "cpu")
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
    settings = comparison.chosen(comparison.parse_args([*TINY])[1])[0]
    config = comparison.learning_config(work, settings, VARIANTS["penalty"], "kind2_000")
    steps = Counter(monkeypatch, learning._Run, "step")
    comparison.learn_folder(work, config, "cpu")
    assert steps.count == 3 + 1


def test_class_images_are_shared_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    made = tmp_path / "mifo/.class_images/a.safetensors"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"latents")

    def link(*paths):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    comparison.share_class_images(tmp_path, tmp_path / "rank4")
    assert (tmp_path / "rank4/.class_images/a.safetensors").read_bytes() == b"latents"


def test_tokens_start_from_phrases_or_kinds(finished, work):
    shutil.copytree(finished / "folders", work / "folders")
    for words, told_apart in (("phrase", True), ("kind", False)):
        options = comparison.parse_args([*TINY, "--words", words])[1]
        settings = comparison.chosen(options)[0]
        config = comparison.learning_config(work, settings, VARIANTS["mifo"], "kind2_000")
        first, second = (token.split() for token in config.initializer_tokens)
        assert first[-1] == second[-1] and first[-1] in KINDS
        assert (first != second) == told_apart
        assert len(first) == 1 + told_apart


def test_class_images_are_made_once(finished, work, monkeypatch):
    shutil.copytree(finished / "folders", work / "folders")
    settings = comparison.chosen(comparison.parse_args([*TINY])[1])[0]
    made = Counter(monkeypatch, priors, "denoise")
    for name in ("mifo", "rank4"):
        config = comparison.learning_config(work, settings, VARIANTS[name], "kind2_000")
        comparison.learn_folder(work, config, "cpu")
    assert made.count == 1


# ----------------------------------------------------------------------------------------------
# options


def test_short_form_and_given_options():
    def settings(*argv):
        return comparison.chosen(comparison.parse_args(list(argv))[1])

    assert settings()[0] == LONG
    assert settings("--short")[0] == SHORT
    chosen, variants, work = settings("--short", "--train_steps", "9", "--only", "none", "mifo")
    assert chosen == Settings(**{**vars(SHORT), "train_steps": 9})
    assert [row.name for row in variants] == ["mifo", "none"]
    assert work.name == "comparison_short"
    assert [row.name for row in settings()[1]] == list(VARIANTS)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--folders", "0"], "--folders is 0; give a whole number from 1 on"),
        (["--seeds", "-1"], "--seeds is -1; give a whole number from 1 on"),
        (["--train_steps", "4"], "holds a comparison with other settings (train_steps 3)"),
        (["--seed", "1"], "holds a comparison with other settings (seed 0)"),
        (["--words", "kind"], "holds a comparison with other settings (words phrase)"),
    ],
)
def test_bad_options(more, sentence, finished, fails):
    before = told(finished)
    assert sentence in fails(run, finished, *more).err
    assert told(finished) == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--mixed_precision", "fp32"], "--mixed_precision is 'fp32'; give auto, no, fp16, bf16"),
        (["--train_steps", "-5"], "--train_steps is -5; give a whole number from 0 on"),
    ],
)
def test_bad_settings_are_not_kept(more, sentence, tmp_path, fails):
    assert sentence in fails(run, tmp_path / "work", *more).err
    assert not (tmp_path / "work/settings.json").exists()


if __name__ == "__main__":
    hurry(pytest.MonkeyPatch())
    comparison.main()
