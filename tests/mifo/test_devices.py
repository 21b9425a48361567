"""The real commands on a pretend GPU: what is left on the wrong device there, fails here."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from device_runs import (
    FULL,
    STEPS,
    counted_updates,
    largest_difference,
    learn,
    losses_of,
    on,
    paint,
    stopped_after,
    tensors_of,
)
from PIL import Image
from pretend_device import pretend

import semantic_export

KINDS = ("cuda", "mps")
TWO = ["--num_images", "2", "--batch_size", "2"]


@pytest.fixture(scope="module")
def argv(thin_argv) -> list[str]:
    return [*thin_argv, *STEPS]


@pytest.fixture(scope="module")
def of_cpu(argv, tmp_path_factory) -> Path:
    """What a run on the CPU learns, in float32."""
    return learn(argv, tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["no", "bf16", "fp16"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def learned(kind, precision, argv, tmp_path_factory) -> Path:
    with pretend(kind):
        return learn(argv, tmp_path_factory.mktemp("learned"), *on(kind, precision))


@pytest.fixture(scope="module")
def class_images(tmp_path_factory) -> list[str]:
    """The options for a picture of the class, the user's own."""
    folder = tmp_path_factory.mktemp("chairs")
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / "chair.png")
    return ["--prior_weight", "1", "--class_images", str(folder)]


@pytest.fixture(scope="module")
def full_argv(argv, class_images) -> list[str]:
    """Learning by which everything moves: with a prior, and layers that run twice."""
    return [*argv, *FULL, *class_images, "--gradient_checkpointing"]


@pytest.fixture(scope="module")
def full_of_cpu(full_argv, tmp_path_factory) -> Path:
    return learn(full_argv, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def pictures(of_cpu, tmp_path_factory) -> np.ndarray:
    """What the CPU paints with :func:`of_cpu`, in float32."""
    return paint(of_cpu, tmp_path_factory.mktemp("painted"), *on("cpu", "no"), *TWO)


def assert_same(ours: Path, theirs: Path, precision: str) -> None:
    """What was learned is the same, to rounding, or in half precision at least the losses are."""
    near = {"no": 1e-6, "bf16": 1e-2, "fp16": 1e-2}[precision]
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=near)
    if precision == "no":  # AdamW makes as large a step of a gradient that is all rounding
        assert largest_difference(tensors_of(ours), tensors_of(theirs)) < 1e-4


# ----------------------------------------------------------------------------------------------
# learning


def test_learning_is_that_of_the_cpu(precision, learned, of_cpu):
    assert_same(learned, of_cpu, precision)


def test_full_learning_is_that_of_the_cpu(precision, full_argv, full_of_cpu, tmp_path):
    with pretend("cuda"):
        learned = learn(full_argv, tmp_path, *on("cuda", precision))
    assert_same(learned, full_of_cpu, precision)


def test_full_learning_on_mps_with_class_images_of_its_own(argv, tmp_path):
    made = ["--prior_weight", "1", "--num_class_images", "1", "--train_steps", "0"]
    with pretend("mps"):
        learned = learn(argv, tmp_path, *on("mps", "bf16"), *FULL, *made)
    assert np.isfinite(list(losses_of(learned).values())).all()


@pytest.mark.parametrize("kind, precision", [("cuda", "fp16")], indirect=True)
def test_gradient_checkpointing_changes_nothing(argv, learned, kind, precision, tmp_path):
    with pretend(kind):
        again = learn(argv, tmp_path, *on(kind, precision), "--gradient_checkpointing")
    assert largest_difference(tensors_of(again), tensors_of(learned)) == 0


@pytest.mark.parametrize("kind, precision", [("cuda", "fp16"), ("mps", "no")], indirect=True)
def test_a_resumed_run_equals_one_that_was_not_stopped(argv, learned, kind, precision, tmp_path):
    with pretend(kind):
        with stopped_after(3):  # the first update of stage 2
            learn(argv, tmp_path, *on(kind, precision))
        resumed = learn(argv, tmp_path, *on(kind, precision), "--resume")
    assert largest_difference(tensors_of(resumed), tensors_of(learned)) == 0


def test_a_run_that_was_stopped_on_one_device_goes_on_upon_another(argv, of_cpu, tmp_path):
    with pretend("cuda"), stopped_after(3):
        learn(argv, tmp_path, *on("cuda", "no"))
    assert_same(learn(argv, tmp_path, *on("cpu", "no"), "--resume"), of_cpu, "no")


def test_a_dry_run_times_a_pass_on_the_device(kind, argv, tmp_path, capsys):
    with pretend(kind):
        learn(argv, tmp_path, *on(kind, "bf16"), "--dry_run")
    assert f"on {kind} in bfloat16" in capsys.readouterr().out


def test_steps_that_overflow_in_fp16_are_made_again(argv, tmp_path, monkeypatch):
    """There are as many updates as steps were asked for."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    with pretend("cuda"), counted_updates() as updates:
        learn(argv, tmp_path, *on("cuda", "fp16"), "--finetune", "none", "--train_steps", "3")
    assert len(updates) == 3


# ----------------------------------------------------------------------------------------------
# painting


def test_painting_is_that_of_the_cpu(kind, precision, of_cpu, pictures, tmp_path):
    with pretend(kind):
        theirs = paint(of_cpu, tmp_path, *on(kind, precision), *TWO)
    difference = np.abs(theirs - pictures)
    assert difference.max() <= 1 if precision == "no" else difference.mean() < 2
    assert pictures.std() > 5


@pytest.mark.parametrize(
    "kind, options",
    [("cuda", "--width 256 --height 256"), ("mps", "--no_box_control")],
    ids=["in groups of pixels", "without boxes"],
)
def test_painting_otherwise_is_that_of_the_cpu(kind, options, of_cpu, tmp_path):
    ours = paint(of_cpu, tmp_path / "cpu", *on("cpu", "no"), *options.split())
    with pretend(kind):
        theirs = paint(of_cpu, tmp_path / kind, *on(kind, "no"), *options.split())
    assert np.abs(theirs - ours).max() <= 1


@pytest.mark.parametrize("kind, precision", [("cuda", "fp16")], indirect=True)
def test_what_was_learned_on_a_device_is_exported(learned, tmp_path):
    """On the CPU, which compares the exports with what was learned."""
    options = f"--models_dir {learned.parent} --model_id toys --output_path {tmp_path}"
    semantic_export.main([*options.split(), "--format", "kohya", "embeddings", "--debug"])
    assert (tmp_path / "toys" / "toys.safetensors").is_file()
