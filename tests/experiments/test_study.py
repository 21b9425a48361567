"""A study: what a row's key depends on, rows written once, failures told; painting by tasks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hurried import Counter, job_of, rows_by_key
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments import judge, study, tasks
from experiments.study import Job, rows_of, run_study
from experiments.tasks import Task, TaskPainter
from imagelab.processes import Processes
from imagelab.training.loop import Trainer
from mifo.learned import read_manifest
from mifo.learning.config import LearningConfig
from toybox.classifier.network import load_classifier
from toybox.scenes.scenes import Placement, Scene, render
from toybox.scenes.toys import Look
from toybox.stable_diffusion import FOLDER

WAY = "toybox-random-mifo"
CONFIG = LearningConfig.from_settings(
    instance="a", folder_path="f", output_dir="o", model_path="toybox", seed=3
)
TASK = Task("boxed", (0, 1), True, 2, 7)
JOB = Job("way", CONFIG, (Look("fox", 100), Look("fox", 130)), (TASK,), {}, {"guidance_steps": 3})


def study_in(work, *jobs):
    return run_study(jobs, work, Processes("cpu"))


# ----------------------------------------------------------------------------------------------
# keys


def with_settings(**settings) -> Job:
    return replace(JOB, config=CONFIG.with_settings(**settings))


def test_moving_the_folders_keeps_the_key():
    moved = with_settings(folder_path="g", output_dir="p", device="cuda", checkpoint_steps=7)
    assert moved.key(TASK) == JOB.key(TASK)
    assert replace(JOB, about={"any": 1}, tasks=()).key(TASK) == JOB.key(TASK)
    assert len(JOB.key(TASK)) == 16


def test_everything_that_a_row_depends_on_is_in_its_key(monkeypatch):
    others = [
        with_settings(instance="b"),
        with_settings(seed=4),
        with_settings(train_steps=601),
        with_settings(finetune_steps=401),
        with_settings(attention_loss="none"),
        with_settings(attention_weight=0.5),
        with_settings(initialize_from_class=True),
        with_settings(initializer_tokens=("fox",)),
        replace(JOB, way="other"),
        replace(JOB, painting={"guidance_steps": 4}),
        replace(JOB, painting={}),
        replace(JOB, looks=(Look("fox", 100), Look("fox", 131))),
        replace(JOB, looks=JOB.looks[::-1]),
    ]
    keys = [JOB.key(TASK), *(job.key(TASK) for job in others)]
    task = {"name": "b", "assets": (1, 0), "has_boxes": False, "images": 3, "seed": 8}
    keys += [JOB.key(replace(TASK, **{name: value})) for name, value in task.items()]
    for what, value in (("VERSION", 2), ("FILLED", 0.2), ("classifier_digest", lambda: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(judge, what, value)
            keys.append(JOB.key(TASK))
    assert len(set(keys)) == len(keys) == 1 + 13 + 5 + 3


def test_another_base_or_other_numbers_of_its_own_change_the_key(tmp_path):
    """A copy elsewhere does not."""
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    keys = {"copy": with_settings(model_path=str(copy)).key(TASK)}
    changes = {"numbers": _other_numbers, "noise": _other_noise, "weights": _other_weights}
    for name, spoil in changes.items():
        other = shutil.copytree(FOLDER, tmp_path / name)
        spoil(other)
        keys[name] = with_settings(model_path=str(other)).key(TASK)
    assert keys.pop("copy") == JOB.key(TASK)
    assert len({JOB.key(TASK), *keys.values()}) == 4


def _other_numbers(folder: Path) -> None:
    (folder / "mifo_config.json").write_text('{"guidance_scale": 4}')


def _other_noise(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))


def _other_weights(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + 1}, path)


# ----------------------------------------------------------------------------------------------
# running


def test_only_missing_rows_are_painted(copied, finished, monkeypatch):
    whole = rows_by_key(finished)
    job = job_of(copied, "kind2_000")
    keys = [job.key(task) for task in job.tasks]
    assert keys == [
        key for key, row in whole.items() if row["folder"] + row["way"] == "kind2_000" + WAY
    ]
    shutil.copytree(finished / "pictures", copied / "pictures")
    lines = (finished / "rows.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if keys[1] not in line and "kind3" not in line]
    (copied / "rows.jsonl").write_text("".join(kept))
    painted = Counter(monkeypatch, TaskPainter, "run")
    steps = Counter(monkeypatch, Trainer, "update")
    assert rows_of([job], copied) == [whole[key] for key in keys if key != keys[1]]
    assert study_in(copied, job) == {}
    assert (painted.count, steps.count) == (1, 0)
    assert (copied / "rows.jsonl").read_text().startswith("".join(kept))
    assert rows_by_key(copied) == {k: r for k, r in whole.items() if r["folder"] == "kind2_000"}
    assert rows_of([job], copied) == [whole[key] for key in keys]  # in the order of the tasks
    assert study_in(copied, job) == {}
    assert painted.count == 1


def test_a_task_is_painted_anew_where_a_picture_was_removed(copied, finished, monkeypatch):
    shutil.copytree(finished / "pictures", copied / "pictures")
    shutil.copy(finished / "rows.jsonl", copied)
    job = job_of(copied, "kind2_000")
    rows = rows_of([job], copied)
    removed = copied / "pictures" / WAY / "kind2_000" / rows[0]["pictures"][0]
    before = removed.read_bytes()
    removed.unlink()
    assert rows_of([job], copied) == rows[1:]
    painted = Counter(monkeypatch, TaskPainter, "run")
    assert study_in(copied, job) == {}
    assert painted.count == 1
    assert removed.read_bytes() == before
    assert rows_of([job], copied) == rows
    assert study_in(copied, job) == {}
    assert painted.count == 1


def test_pictures_of_other_settings_stay(copied):
    """Of each row the pictures that it was judged on."""
    task = Task("alone 0", (0,), False, 1, 9)
    usual = replace(job_of(copied, "kind2_000"), tasks=(task,))
    longer = replace(usual, painting={**usual.painting, "num_inference_steps": 3})
    folder = copied / "pictures" / WAY / "kind2_000"
    assert study_in(copied, usual) == {}
    [path] = folder.rglob("*.png")
    before = path.read_bytes()
    assert study_in(copied, longer) == {}
    assert path.read_bytes() == before
    assert len(list(folder.rglob("*.png"))) == 2
    [row] = rows_of([usual], copied)
    assert folder / row["pictures"][0] == path
    [other] = rows_of([longer], copied)
    assert (folder / other["pictures"][0]).read_bytes() != before


def test_a_failing_job_is_told_and_the_rest_runs(copied, finished, capsys):
    bad, good = job_of(copied, "kind2_000", "penalty"), job_of(copied, "kind3_001")
    (copied / "folders/kind2_000/mask0.png").unlink()
    failures = study_in(copied, bad, good)
    assert list(failures) == ["toybox-random-penalty, kind2_000"]
    assert "mask0.png" in failures[bad.name]
    whole = rows_by_key(finished).values()
    assert list(rows_by_key(copied).values()) == [
        row for row in whole if (row["way"], row["folder"]) == (WAY, "kind3_001")
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"[1/2] {bad.name}: {failures[bad.name]}"
    assert second.startswith(f"[2/2] {WAY}, kind3_001: ") and second.endswith(" s")
    assert rows_of([bad, good], copied) == rows_of([good], copied)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
        (RuntimeError("CUDA out of memory"), "there is not enough memory"),
        (OSError(28, "No space left on device"), "the disk is full"),
    ],
)
def test_failures_in_a_sentence(error, told, work, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(study, "learn_folder", fail)
    [(name, sentence)] = study_in(work, JOB).items()
    assert name == "way, a" and sentence.startswith(told)


def test_faults_of_the_program_end_the_study(work, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(study, "learn_folder", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        study_in(work, JOB)


def test_a_folder_that_was_learned_otherwise_is_not_painted(copied):
    job = job_of(copied, "kind2_000", "mifo", "--finetune_steps", "2")
    failures = study_in(copied, job)
    assert "--finetune_steps 1" in failures[job.name]
    with Image.open(copied / "folders/kind2_000/img.jpg") as photo:
        photo.transpose(Image.Transpose.ROTATE_180).save(copied / "folders/kind2_000/img.jpg")
    job = job_of(copied, "kind2_000")
    assert "from another photo" in study_in(copied, job)[job.name]
    assert not rows_by_key(copied)


def test_a_job_s_painting_and_about_reach_the_rows(copied, monkeypatch):
    """Picture files and rows are of the way; what it says of itself goes into each row."""
    configs, paint = [], tasks.paint

    def watched(scene, indices, text):
        configs.append(scene.config)
        return paint(scene, indices, text)

    monkeypatch.setattr(tasks, "paint", watched)
    painting = {"num_inference_steps": 2, "guidance_scale": 1.5, "negative_prompt": "a fox"}
    task = Task("alone 1", (1,), False, 1, 9)
    about = {"tokens": "random", "number": 7}
    job = replace(job_of(copied, "kind2_000"), painting=painting, about=about, tasks=(task,))
    assert study_in(copied, job) == {}
    [config] = configs
    assert painting.items() <= config.settings().items()
    assert not config.box_control and config.seed == 9
    [row] = rows_of([job], copied)
    assert list(row)[:5] == ["key", "way", "tokens", "number", "folder"]
    assert (row["key"], row["number"], row["folder"]) == (job.key(task), 7, "kind2_000")
    assert (copied / "pictures" / WAY / "kind2_000" / row["pictures"][0]).is_file()
    manifest = read_manifest(copied / "learned" / WAY / "kind2_000")
    assert row["separation"] == manifest["separation"]


# ----------------------------------------------------------------------------------------------
# tasks


@pytest.fixture
def painter(finished):
    job = job_of(finished, "kind2_000")
    folder = finished / "learned" / WAY / "kind2_000"
    return TaskPainter(folder, job.looks, load_classifier(), "cpu", {"num_inference_steps": 1})


def drawn(looks, places) -> Image.Image:
    """The toys in the middle of places, as large as they are wide, on grey."""
    toys = tuple(
        Placement(look, (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, box.x1 - box.x0)
        for look, box in zip(looks, places, strict=True)
    )
    return render(Scene(toys, None, (180, 180, 180), 0), 128)[0]


def test_a_row_says_what_the_pictures_show(painter, tmp_path, monkeypatch):
    """In place of the model: both toys as the boxes ask for, then exchanged, then one alone."""
    first, second = painter.looks
    scenes = []

    def paint(scene, indices, text):
        scenes.append(scene)
        boxes = scene.boxes
        pictures = [
            drawn((second, first), boxes),
            drawn((first, second), boxes),
            drawn((second,), boxes[:1]),
        ]
        return [pictures[index] for index in indices]

    monkeypatch.setattr(tasks, "paint", paint)
    row = painter.run(Task("exchanged", (1, 0), True, 3, 11), tmp_path / "exchanged")
    assert row["prompt"] == "a photo of <asset1> and <asset0>"
    assert (row["task"], row["assets"], row["seed"]) == ("exchanged", [1, 0], 11)
    right = [[each["is_right"] for each in picture] for picture in row["judged"]]
    assert right == [[True, True], [False, False], [True, False]]
    assert {each["kind"] for picture in row["judged"][:2] for each in picture} == {first.kind}
    assert row["there"] == [[True, True], [True, True], [False, True]]
    [scene] = scenes
    assert row["boxes"] == [[round(side, 4) for side in box] for box in scene.boxes]
    assert [(round(box.x0, 3), round(box.x1, 3)) for box in scene.boxes] == [
        (0.05, 0.45),
        (0.55, 0.95),
    ]
    config = scene.config
    assert (config.seed, config.num_images, config.num_inference_steps) == (11, 3, 1)
    assert row["pictures"] == ["exchanged/00.png", "exchanged/01.png", "exchanged/02.png"]
    with Image.open(tmp_path / row["pictures"][1]) as file:
        np.testing.assert_array_equal(file, drawn((first, second), scene.boxes))


def test_pictures_are_painted_in_batches(painter, tmp_path, monkeypatch):
    batches, models = [], []

    def paint(scene, indices, text):
        batches.append(list(indices))
        models.append(scene.base)
        assert scene.tokens is None and not scene.boxes  # no box control
        return [Image.new("RGB", (16, 16), (index,) * 3) for index in indices]

    monkeypatch.setattr(tasks, "paint", paint)
    row = painter.run(Task("alone 1", (1,), False, 9, 5), tmp_path / "alone 1")
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert row["prompt"] == "a photo of <asset1>"
    assert row["boxes"] == row["judged"] == []
    for index, path in enumerate(row["pictures"]):
        with Image.open(tmp_path / path) as file:
            assert file.getpixel((3, 3)) == (index,) * 3
    painter.run(Task("alone 0", (0,), False, 1, 5), tmp_path / "alone 0")
    assert models[-1] is models[0]  # it is loaded once


def test_the_next_picture_has_the_next_seed(painter, tmp_path):
    painter.run(Task("two", (0,), False, 2, 5), tmp_path / "two")
    painter.run(Task("one", (0,), False, 1, 6), tmp_path / "one")
    with Image.open(tmp_path / "two/01.png") as ours, Image.open(tmp_path / "one/00.png") as theirs:
        apart = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    with Image.open(tmp_path / "two/00.png") as other, Image.open(tmp_path / "one/00.png") as one:
        far = np.abs(np.asarray(other, int) - np.asarray(one, int))
    assert apart.max() <= 1 < far.max()
