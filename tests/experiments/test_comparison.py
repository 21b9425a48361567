"""The comparison's command, with steps of nothing: resumed, shared, with what fails."""

import os
import subprocess
import sys
from pathlib import Path

import hurried
import numpy as np
import pytest
import torch
from hurried import TINY, Counter, facts_of, run, settings_of
from PIL import Image

from experiments.comparison import command
from experiments.comparison.folders import prepare
from experiments.comparison.report import IDENTITY
from experiments.comparison.settings import LONG, SHORT, VARIANTS, Settings
from imagelab.evaluation.report import TILE
from imagelab.training.loop import Trainer
from mifo import evaluation

ROOT = Path(__file__).parents[2]
STEPS = 2 * (3 + 1) + 2 * 1  # two folders: both stages, then stage 2 of rank4 alone


def test_everything_is_written(finished, capsys):
    facts = facts_of(finished)
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
    before = facts_of(finished)
    steps = Counter(monkeypatch, Trainer, "update")
    pictures = Counter(monkeypatch, evaluation, "paint")
    run(finished)
    assert steps.count == pictures.count == 0
    assert facts_of(finished) == before
    assert "| MIFO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "name", "stop", "left"),
    [
        (Trainer, "update", 6, STEPS - 4),  # in stage 1 of the second folder
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
    steps = Counter(monkeypatch, Trainer, "update")
    run(work)
    assert steps.count == left
    assert facts_of(work) == facts_of(finished)


def test_a_failing_folder_does_not_stop_the_other(work, finished, monkeypatch, capsys):
    prepare(work, settings_of())
    mask = work / "folders" / "kind2_000" / "mask0.png"
    kept = mask.read_bytes()
    mask.unlink()
    with pytest.raises(SystemExit) as stopped:
        run(work)
    assert stopped.value.code == 2
    facts, whole = facts_of(work), facts_of(finished)
    assert list(facts["failures"]) == [
        f"{name}, kind2_000" for name in ("mifo", "rank4", "no_boxes")
    ]
    assert "mask0.png" in facts["failures"]["mifo, kind2_000"]
    for name, row in facts["variants"].items():
        assert row["folders"] == {"kind3_001": whole["variants"][name]["folders"]["kind3_001"]}
    assert "mifo, kind2_000 failed" in capsys.readouterr().out
    mask.write_bytes(kept)
    run(work)
    assert facts_of(work) == whole


def test_two_processes_share_the_folders(finished, work):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv += [hurried.__file__, *TINY, "--only", "mifo", "--work", str(work)]
    threads = str(torch.get_num_threads())  # as many as here: sums are rounded alike
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, one = facts_of(work), facts_of(finished)
    assert two["variants"] == {"mifo": one["variants"]["mifo"]}
    assert two["chance"] == one["chance"] and two["failures"] == {}
    assert done.stdout.count("| MIFO") == 1  # the first process tells of all


# ----------------------------------------------------------------------------------------------
# options


def test_short_form_and_given_options():
    def settings(*argv):
        return command.chosen(command.parse_args(list(argv))[1])

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
    before = facts_of(finished)
    assert sentence in fails(run, finished, *more).err
    assert facts_of(finished) == before


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
