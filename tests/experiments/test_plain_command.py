"""The README's plain commands over seeds: jobs, tables, the command with steps of nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hurried import EXAMPLES, LEARNING, Counter, findings, rows_by_key, run_plain
from PIL import Image
from test_tables import T1, T2, found, row

from experiments import plain, tasks
from experiments.plain import folder_sheet, make_jobs, tables, write_findings
from experiments.study import Job
from imagelab.training.loop import Trainer
from mifo.learned import read_manifest
from mifo.learning.config import LearningConfig
from toybox.scenes.instances import EXAMPLES as SHIPPED
from toybox.scenes.toys import Look

PAINTINGS = 2 + 3  # two and three boxes, and each of three cars alone

# ----------------------------------------------------------------------------------------------
# jobs


def test_jobs_are_the_plain_command_over_seeds(monkeypatch):
    monkeypatch.setattr(plain, "PICTURES", 4)
    monkeypatch.setattr(plain, "ALONE", 2)
    jobs = make_jobs(EXAMPLES, Path("work"), 2)
    names = sorted(SHIPPED)
    assert [job.name for job in jobs] == [f"seed{s}, {name}" for s in (0, 1) for name in names]
    for job in jobs:
        seed, name = int(job.way[-1]), job.config.instance
        assert job.config == LearningConfig(
            instance=name, folder_path=str(EXAMPLES), model_path="toybox", seed=seed,
            output_dir=f"work/learned/seed{seed}",
        )  # fmt: skip
        assert job.looks == SHIPPED[name].looks
        assert job.about == {"learning_seed": seed} and not job.painting
    fish, cars = jobs[5 + names.index("fish")], jobs[5 + names.index("toy_car")]
    assert [(t.name, t.assets, t.has_boxes, t.images, t.seed) for t in fish.tasks] == [
        ("two", (0, 1), True, 4, 1000),
        ("alone 0", (0,), False, 2, 1000),
        ("alone 1", (1,), False, 2, 1000),
    ]
    assert [(t.name, t.assets) for t in cars.tasks] == [
        ("two", (0, 1)),
        ("three", (0, 1, 2)),
        ("alone 0", (0,)),
        ("alone 1", (1,)),
        ("alone 2", (2,)),
    ]
    [tuned] = make_jobs(EXAMPLES, Path("work"), 1, settings={"train_steps": 9})[:1]
    assert tuned.config.recipe.train_steps == 9


def test_another_precision_is_a_way_of_its_own():
    """Nothing that was learned or painted in one of them counts for another."""
    [usual, half] = (make_jobs(EXAMPLES, Path("work"), 1, p)[0] for p in ("auto", "bf16"))
    assert (usual.way, half.way) == ("seed0", "seed0-bf16")
    assert half.config.runtime.mixed_precision == "bf16"
    assert half.config.output_dir == "work/learned/seed0-bf16"
    assert half.painting == {"mixed_precision": "bf16"}
    assert half.about == {"learning_seed": 0}
    keys = {job.key(task) for job in (usual, half) for task in usual.tasks}
    assert len(keys) == 2 * len(usual.tasks)


# ----------------------------------------------------------------------------------------------
# tables


def boxed(seed, folder, task, *pictures, **more):
    about = {"way": f"seed{seed}", "learning_seed": seed, "folder": folder, "task": task}
    assets = (0, 1, 2)[: len(pictures[0])]
    separation = [0.5, 1.0] if seed else [1.0, 1.0]
    return row(*pictures, assets=assets, separation=separation, **about, **more)


def alone(seed, folder, asset, *there):
    about = {"way": f"seed{seed}", "learning_seed": seed, "folder": folder}
    separation = [0.5, 1.0] if seed else [1.0, 1.0]
    names = {"task": f"alone {asset}", "assets": (asset,), "boxes": []}
    return found(*there, separation=separation, **about, **names)


ROWS = [
    boxed(0, "x", "two", "rr", "rh"),  # 3 of 4, 4 kinds
    alone(0, "x", 0, "x.", "xx"),
    alone(0, "x", 1, ".x", ".."),
    boxed(1, "x", "two", "rk", "hh"),  # 1 of 4, 3 kinds
    alone(1, "x", 0, "..", "x."),
    boxed(0, "y", "two", "rr", "rr"),  # 4 of 4
    boxed(0, "y", "three", "rkk", "rrr"),  # 4 of 6, 4 kinds
    boxed(1, "y", "three", "hhr", "rrr"),  # 4 of 6, 6 kinds
    alone(0, "y", 2, "..x", "xxx"),
]
KINDS = {"x": ["fox", "cat"], "y": ["fox", "cat", "bear"]}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_tables():
    boxes, means, alone_table = tables(ROWS, KINDS).split("\n\n")
    head, _, *lines = boxes.splitlines()
    assert cells(head)[:5] == [
        "folder", "two boxes: right", "kind right", "three boxes: right", "kind right"
    ]  # fmt: skip
    apart = [f"0.875 ± {T1 * 0.125:.3f}"] * 2  # 1 of seed 0, 3/4 of seed 1
    assert [cells(line) for line in lines[:2]] == [
        ["x", "4 of 8", "7 of 8", "–", "–", apart[0]],
        ["y", "4 of 4", "4 of 4", "8 of 12", "10 of 12", apart[1]],
    ]
    assert cells(lines[2])[:5] == ["all", "8 of 12", "11 of 12", "8 of 12", "10 of 12"]
    half = 3.182446 * (0.0625 / 3) ** 0.5 / 2  # t of three degrees of freedom, of 1, 3/4, 1, 3/4
    assert cells(lines[2])[5] == f"0.875 ± {half:.3f}"
    # two boxes: 3/4, 1/4 and 1 of the three learnings; their deviation is √(7/48)
    two = f"0.667 ± {T2 * (7 / 48) ** 0.5 / 3**0.5:.3f}"
    assert means.splitlines() == [
        f"Right boxes of two, over learnings: {two}",
        "Right boxes of three, over learnings: 0.667 ± 0.000",
    ]
    head, _, *lines = alone_table.splitlines()
    assert cells(head)[1:] == ["one asset, no boxes: it is there", "another one is there"]
    assert [cells(line) for line in lines] == [
        ["x", "4 of 6", "1 of 6"],
        ["y", "2 of 2", "1 of 2"],
        ["all", "6 of 8", "2 of 8"],
    ]


@pytest.fixture
def painted(tmp_path):
    """Rows of two learnings of one folder, the second of them first, whose boxes have a colour."""
    rows = []
    for seed, colour in ((1, "blue"), (0, "green")):
        place = tmp_path / f"pictures/seed{seed}/x/two"
        place.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (48, 48), colour).save(place / f"{index:02d}.png")
        pictures = ("rr", "hh") if seed else ("rr", "rr")
        boxes = [[0.0, 0.0, 0.25, 0.25], [0.75, 0.75, 1.0, 1.0]]
        names = ["two/00.png", "two/01.png"]
        rows.append(boxed(seed, "x", "two", *pictures, boxes=boxes, pictures=names))
    return tmp_path, rows


def test_sheet_has_a_line_for_each_learning(painted):
    work, rows = painted
    drawn = np.asarray(folder_sheet(rows, work)).astype(int)
    assert drawn.shape[1] == 2 * (96 + 4) - 4
    tall = (drawn.shape[0] + 4) // 2
    for line, colour in enumerate(((0, 128, 0), (0, 0, 255))):  # in the order of the seeds
        for column in range(2):
            assert tuple(drawn[48 + line * tall, 48 + 100 * column]) == colour
    is_red = (drawn[..., 0] > 200) & (drawn[..., 1] < 100)
    below = slice(tall + 96, None)  # the captions of the second line
    assert is_red[below, 100:].any() and not is_red[below, :96].any()
    assert not is_red[:tall].any()


def test_what_is_written(painted):
    work, rows = painted
    config = LearningConfig(instance="x", model_path="toybox", seed=0)
    task = tasks.Task("two", (0, 1), True, 2)
    looks = (Look("fox", 100), Look("cat", 100))
    jobs = [Job(f"seed{seed}", config, looks, (task,)) for seed in (0, 1)]
    with (work / "rows.jsonl").open("w") as file:
        for job, each in zip(jobs, rows[::-1], strict=True):
            file.write(json.dumps({"key": job.key(task)} | each) + "\n")
    text = write_findings(jobs, work, {"seed2, x": "no disk."})
    assert text.splitlines()[-1] == "seed2, x failed: no disk."
    assert "| x | 6 of 8 | 8 of 8 | – | – |" in text  # hue alone is wrong
    assert (work / "plain.md").read_text() == text + "\n"
    assert [path.name for path in work.glob("*.jpg")] == ["x.jpg"]


# ----------------------------------------------------------------------------------------------
# the command


def test_everything_is_written(plain_finished):
    rows = list(rows_by_key(plain_finished).values())
    names = ["two", "three", "alone 0", "alone 1", "alone 2"]
    assert [each["task"] for each in rows] == names
    for each in rows:
        assert (each["way"], each["folder"], each["learning_seed"]) == ("seed0-no", "toy_car", 0)
    manifest = read_manifest(plain_finished / "learned/seed0-no/toy_car")
    settings = manifest["settings"]
    assert {name: settings[name] for name in LEARNING} == LEARNING
    assert settings["mixed_precision"] == "no"
    assert manifest["base_model"]["source"] == "toybox"
    assert settings["attention_loss"] == "mifo" and not settings["initialize_from_class"]
    assert "| toy_car | " in (plain_finished / "plain.md").read_text()
    with Image.open(plain_finished / "toy_car.jpg") as sheet:
        assert sheet.width == 2 * 100 - 4  # a picture of two boxes and one of three


def test_a_finished_one_only_writes_its_findings(plain_finished, monkeypatch, capsys):
    before = findings(plain_finished)
    steps = Counter(monkeypatch, Trainer, "update")
    pictures = Counter(monkeypatch, tasks, "paint")
    run_plain(plain_finished)
    assert steps.count == pictures.count == 0
    assert findings(plain_finished) == before
    assert before["plain.md"].decode() in capsys.readouterr().out


def test_stopped_and_resumed_is_as_undisturbed(
    plain_finished, work, monkeypatch, capsys, interruptible
):
    """Stopped in stage 1, then while the third row is painted."""
    shutil.copytree(plain_finished / "folders", work / "folders")
    for owner, name, stop, done in ((Trainer, "update", 2, 0), (tasks, "paint", 3, 2)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            Counter(patch, owner, name, stop)
            run_plain(work)
        assert stopped.value.code == 130
        assert "stopped; the very same command goes on from here" in capsys.readouterr().err
        assert len(rows_by_key(work)) == done
    steps = Counter(monkeypatch, Trainer, "update")
    pictures = Counter(monkeypatch, tasks, "paint")
    run_plain(work)
    assert (steps.count, pictures.count) == (0, PAINTINGS - 2)
    assert rows_by_key(work) == rows_by_key(plain_finished)
    assert findings(work) == findings(plain_finished)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--seeds", "0"], "--seeds is 0; give a whole number from 1 on"),
        (["--folder_path", "nowhere"], "there is no folder nowhere"),
        (["--folder_path", "."], ". holds no instance folder; give another --folder_path"),
        (["--device", "tpu"], "tpu"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
    ],
)
def test_bad_options(more, sentence, plain_finished, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert sentence in fails(run_plain, plain_finished, *more).err


def test_a_failing_folder_is_told_and_the_rest_is_painted(plain_finished, tmp_path, fails):
    work = tmp_path / "work"
    shutil.copytree(plain_finished, work)
    shutil.copytree(EXAMPLES / "fish", work / "folders/fish")
    (work / "folders/fish/mask1.png").write_bytes(b"no picture")
    told = fails(run_plain, work).out
    [last] = [line for line in told.splitlines() if " failed: " in line]
    assert last.startswith("seed0-no, fish failed: ") and "mask1.png" in last
    assert "| fish | – | – |" in told and "| toy_car | " in told
    assert not (work / "fish.jpg").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_folders_of_another_number_of_toys_are_refused(count, tmp_path, monkeypatch):
    from experiments import plain

    monkeypatch.setattr(plain, "list_instances", lambda folder: ["things"])
    monkeypatch.setattr(plain, "read_looks", lambda folder: [Look("fox", 100)] * count)
    with pytest.raises(ValueError, match=f"things has {count} toys; give folders of 2 or 3"):
        plain.make_jobs(tmp_path, tmp_path / "work", 1)
