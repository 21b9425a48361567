"""The comparison's command, with steps of nothing: resumed, shared, with what fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hurried
import pytest
import torch
from hurried import STEPS, TINY, Counter, findings, rows_by_key, run
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments import tasks
from experiments.comparison import command
from experiments.comparison.settings import LOSSES as ALL_LOSSES
from experiments.comparison.settings import TOKENS, Settings
from imagelab.training.loop import Trainer
from toybox.stable_diffusion import FOLDER

ROOT = Path(__file__).parents[2]
WAYS = ("toybox-random-mifo", "toybox-random-none")
FIRST = ["--folders", "1"]
TASKS_OF_TWO, TASKS_OF_THREE = 2 + 2, 2 + 3  # boxed, unboxed, and each asset alone


def test_everything_is_written(finished):
    rows = list(rows_by_key(finished).values())
    names = [(row["folder"], row["way"], row["task"]) for row in rows]
    alone = [f"alone {asset}" for asset in range(3)]
    assert names == [
        (folder, way, task)
        for folder, count in (("kind2_000", 2), ("kind3_001", 3))
        for way in WAYS
        for task in ("boxed", "unboxed", *alone[:count])
    ]
    for row in rows:
        assert (row["base"], row["tokens"]) == ("toybox", "random")
        assert row["loss"] == row["way"].rpartition("-")[2]
        count = 2 if row["folder"] == "kind2_000" else 3
        assert row["seed"] == 1000 * (count - 2)  # of the folder's number
        own = [int(row["task"][-1])] if row["task"][-1].isdigit() else list(range(count))
        assert row["assets"] == own
        boxes = count if row["task"] == "boxed" else 0
        assert len(row["boxes"]) == boxes
        assert [len(picture) for picture in row["judged"]] == [boxes] * bool(boxes)
        assert [len(picture) for picture in row["there"]] == [count]
        assert len(row["separation"]) == count
        pictures = [finished / "pictures" / row["way"] / row["folder"] / p for p in row["pictures"]]
        assert [path.is_file() for path in pictures] == [True]
    assert (finished / "comparison.md").read_text().count("\n| toybox | random |") == 2
    with Image.open(finished / "sheet_toybox_random.jpg") as sheet:
        assert sheet.width == 3 * (144 + 4) - 4  # photo, mifo, none


def test_variants_share_the_class_images(finished):
    learned = finished / "learned"
    caches = [sorted((learned / way / ".class_images").glob("*.safetensors")) for way in WAYS]
    assert [len(cache) for cache in caches] == [2, 2]  # one set a folder
    for one, other in zip(*caches, strict=True):
        assert one.samefile(other)


def test_a_finished_comparison_learns_and_paints_nothing(finished, monkeypatch, capsys):
    before, rows = findings(finished), (finished / "rows.jsonl").read_bytes()
    steps = Counter(monkeypatch, Trainer, "update")
    pictures = Counter(monkeypatch, tasks, "paint")
    run(finished)
    assert steps.count == pictures.count == 0
    assert findings(finished) == before
    assert (finished / "rows.jsonl").read_bytes() == rows
    assert (finished / "comparison.md").read_text() in capsys.readouterr().out


def test_stopped_and_resumed_is_as_undisturbed(
    finished, work, tmp_path, monkeypatch, capsys, interruptible
):
    """Stopped in stage 1, then, with one loss more, while its second picture is painted."""

    def stopped(*more):
        with pytest.raises(SystemExit) as stop:
            run(work, *FIRST, *more)
        assert stop.value.code == 130
        assert "stopped; the very same command goes on from here" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        Counter(patch, Trainer, "update", stop=2)
        stopped("--losses", "mifo")
    assert not rows_by_key(work)
    with monkeypatch.context() as patch:
        steps = Counter(patch, Trainer, "update")
        Counter(patch, tasks, "paint", stop=TASKS_OF_TWO + 2)
        stopped()
        assert steps.count == STEPS - 2 + STEPS
    assert len(rows_by_key(work)) == TASKS_OF_TWO + 1
    steps = Counter(monkeypatch, Trainer, "update")
    pictures = Counter(monkeypatch, tasks, "paint")
    run(work, *FIRST)
    assert (steps.count, pictures.count) == (0, TASKS_OF_TWO - 1)

    whole = rows_by_key(finished)
    assert rows_by_key(work) == {k: r for k, r in whole.items() if r["folder"] == "kind2_000"}
    shutil.copytree(finished, tmp_path / "undisturbed")
    run(tmp_path / "undisturbed", *FIRST)
    assert findings(work) == findings(tmp_path / "undisturbed")
    for path in (work / "pictures").rglob("*.png"):
        same = finished / path.relative_to(work)
        assert path.read_bytes() == same.read_bytes()


def test_two_processes_share_the_work_though_one_fails(finished, work, capsys, fails):
    """The second process's folder cannot be learned; later it can."""
    shutil.copytree(finished / "folders", work / "folders")
    mask = work / "folders/kind3_001/mask0.png"
    mask.rename(work / "mask0.png")
    options = [*TINY, "--losses", "mifo", "--work", str(work)]
    threads = str(torch.get_num_threads())  # as many as here: sums are rounded alike
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, hurried.__file__, *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    whole = {k: r for k, r in rows_by_key(finished).items() if r["loss"] == "mifo"}
    assert rows_by_key(work) == {k: r for k, r in whole.items() if r["folder"] == "kind2_000"}
    [told] = [line for line in done.stdout.splitlines() if line.startswith("toybox-random-mifo, ")]
    assert told.startswith("toybox-random-mifo, kind3_001 failed: ") and "mask0.png" in told
    assert told in (work / "comparison.md").read_text()
    assert done.stdout.count("| toybox | random |") == 1  # the first process tells of all
    assert "[1/1] toybox-random-mifo, kind3_001: " in done.stdout

    (work / "mask0.png").rename(mask)
    command.main(options)
    assert rows_by_key(work) == whole
    assert "failed" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def other_base(tmp_path_factory) -> Path:
    """A toybox that paints otherwise."""
    folder = tmp_path_factory.mktemp("bases") / "other"
    shutil.copytree(FOLDER, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"] *= 1.5
    save_file(weights, path)
    return folder


def test_another_base_goes_into_the_same_comparison(copied, finished, other_base, monkeypatch):
    shutil.copy(finished / "rows.jsonl", copied)
    shutil.copytree(finished / "pictures", copied / "pictures")
    steps = Counter(monkeypatch, Trainer, "update")
    run(copied, *FIRST, "--losses", "mifo", "--bases", "toybox", str(other_base))
    assert steps.count == STEPS
    before, rows = rows_by_key(finished), rows_by_key(copied)
    new = [row for key, row in rows.items() if key not in before]
    assert [row["base"] for row in new] == ["other"] * TASKS_OF_TWO
    assert {row["way"] for row in new} == {"other-random-mifo"}
    assert (copied / "sheet_other_random.jpg").is_file()
    lines = (copied / "comparison.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| toybox", "| other"]


# ----------------------------------------------------------------------------------------------
# options


def chosen(*argv):
    return command.chosen(command.parse_args(list(argv))[1])


def test_settings_and_variants_from_options():
    settings, variants = chosen()
    assert settings == Settings()
    assert len(variants) == len(TOKENS) * len(ALL_LOSSES)
    options = "--train_steps 9 --learning_rate 0.25 --losses none mifo none --bases a/x b/y"
    settings, variants = chosen(*options.split())
    assert settings == Settings(train_steps=9, learning_rate=0.25)
    assert [variant.name for variant in variants] == [
        *("x-random-none", "x-random-mifo", "x-kind-none", "x-kind-mifo"),
        *("y-random-none", "y-random-mifo", "y-kind-none", "y-kind-mifo"),
    ]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--folders 0", "--folders is 0; give a whole number from 1 to 100000"),
        ("--first -1", "--first is -1; give a whole number from 0 to 1000000"),
        ("--pictures 0", "--pictures is 0; give a whole number from 1 to 100000"),
        ("--alone 0", "--alone is 0; give a whole number from 1 to 100000"),
        ("--num_inference_steps 0", "--num_inference_steps is 0; give a whole number from 1 to"),
        ("--guidance_scale nan", "--guidance_scale is nan; give a number from 0 to 1000000"),
        ("--seed -1", "the seed is -1; give a whole number from 0 to"),
        ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
        ("--bases a/x b/x", "--bases has two models of one name; rename the folder of one"),
        ("--losses some", "invalid choice: 'some'"),
        ("--train_steps 4", "holds a comparison with other settings (train_steps 3)"),
        ("--seed 1 --weight 2", "holds a comparison with other settings (seed 0, weight 1.0)"),
        ("--bases nowhere", "there is no model at nowhere"),
    ],
)
def test_bad_options(more, sentence, finished, fails):
    before = findings(finished)
    assert sentence in fails(run, finished, *more.split()).err
    assert findings(finished) == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--mixed_precision", "fp32"], "--mixed_precision is 'fp32'; give auto, no, fp16, bf16"),
        (["--train_steps", "-5"], "--train_steps is -5; give a whole number from 0 to"),
        (["--num_inference_steps", "600"], "--num_inference_steps is 600, which would not start"),
        (["--seed", str(2**63 - 1)], "the seed is 9223372036854776807; give a whole number"),
    ],
)
def test_bad_settings_are_not_kept(more, sentence, work, fails):
    """Nor is anything learned before they are told."""
    assert sentence in fails(run, work, *more).err
    assert not work.exists()
