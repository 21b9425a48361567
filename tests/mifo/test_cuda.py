"""On a real GPU: both stages and painting, beside the CPU and the golden arrays."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from device_runs import (
    FULL,
    STEPS,
    Golden,
    counted_updates,
    golden_painting,
    largest_difference,
    learn,
    losses_of,
    on,
    paint,
    predicted_noise,
    step_losses,
    stopped_after,
    tensors_of,
)
from thin import load_golden

import semantic_learning
import semantic_synthesis

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
CASES = {"reward": (1, "reward"), "penalty": (1, "penalty"), "finetune": (2, "penalty")}


@pytest.fixture(autouse=True, scope="module")
def whole_float32():
    """Convolutions without TF32, whose products are as coarse as those of fp16."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def argv(thin_argv) -> list[str]:
    return [*thin_argv, *STEPS]


@pytest.fixture(scope="module")
def of_cpu(argv, tmp_path_factory) -> Path:
    return learn(argv, tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def full_argv(argv) -> list[str]:
    made = ["--prior_weight", "1", "--num_class_images", "1"]
    return [*argv, *FULL, *made, "--gradient_checkpointing"]


@pytest.fixture(scope="module")
def full_of_cpu(full_argv, tmp_path_factory) -> Path:
    return learn(full_argv, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module", params=["", "--no_box_control", "--width 256 --height 256"])
def painted(request, of_cpu, tmp_path_factory) -> tuple[list[str], np.ndarray]:
    """Options of painting, and the pictures that the CPU paints by them, in float32."""
    options = [*request.param.split(), "--num_images", "2", "--batch_size", "2"]
    folder = tmp_path_factory.mktemp("painted")
    return options, paint(of_cpu, folder, *on("cpu", "no"), *options)


@pytest.fixture(scope="module", params=["no", "bf16", "fp16"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def learned(argv, precision, tmp_path_factory) -> Path:
    return learn(argv, tmp_path_factory.mktemp("cuda"), *on("cuda", precision))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference, in that of what is wanted."""
    return ((ours.cpu() - theirs).norm() / theirs.norm()).item()


def test_learning_is_near_that_of_the_cpu(precision, learned, of_cpu):
    near = 1e-3 if precision == "no" else 2e-2
    assert losses_of(learned) == pytest.approx(losses_of(of_cpu), rel=near)


def test_full_learning_is_near_that_of_the_cpu(precision, full_argv, full_of_cpu, tmp_path):
    learned = learn(full_argv, tmp_path, *on("cuda", precision))
    near = 1e-3 if precision == "no" else 5e-2
    assert losses_of(learned) == pytest.approx(losses_of(full_of_cpu), rel=near)


def test_the_first_losses_are_those_of_the_cpu(argv, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        with stopped_after(4):
            learn(argv, tmp_path / device, *on(device, "no"), "--train_steps", "9")
        losses.append(step_losses(tmp_path / device))
    assert len(losses[1]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_noise_prediction_is_that_of_the_cpu(small_sd):
    ours, theirs = (predicted_noise(small_sd, device) for device in ("cuda", "cpu"))
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("precision", ["fp16"], indirect=True)
def test_a_resumed_run_equals_one_that_was_not_stopped(precision, argv, learned, tmp_path):
    """To rounding: some of CUDA's sums have no order."""
    with stopped_after(3):
        learn(argv, tmp_path, *on("cuda", precision))
    resumed = learn(argv, tmp_path, *on("cuda", precision), "--resume")
    assert losses_of(resumed) == pytest.approx(losses_of(learned), rel=1e-3)
    assert largest_difference(tensors_of(resumed), tensors_of(learned)) < 0.02


def test_steps_that_overflow_in_fp16_are_made_again(argv, tmp_path, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    with counted_updates() as updates:
        learn(argv, tmp_path, *on("cuda", "fp16"), "--finetune", "none", "--train_steps", "3")
    assert len(updates) == 3


@pytest.mark.parametrize("name", CASES)
def test_a_learning_step_is_that_of_the_golden_arrays(name, tiny_sd):
    golden = load_golden(f"golden_learning_{name}")
    step = Golden(golden, tiny_sd, *CASES[name], device="cuda")
    step.learn()
    assert step.loss.item() == pytest.approx(golden["loss"].item(), rel=1e-3)
    assert relative(step.rows.grad, golden["grad_embedding_rows"]) < 1e-2
    assert relative(step.prediction, golden["noise_prediction"]) < 1e-3


def test_gradient_checkpointing_lowers_the_peak_of_memory(tiny_sd):
    golden, peaks = load_golden("golden_learning_finetune"), []
    for checkpointing in (False, True):
        step = Golden(golden, tiny_sd, *CASES["finetune"], device="cuda")
        if checkpointing:
            step.base.unet.enable_gradient_checkpointing()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.learn()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step
    assert peaks[1] < 0.8 * peaks[0]


def test_guided_latents_are_those_of_the_golden_arrays(tiny_sd):
    golden = load_golden("golden_synthesis")
    steps = golden_painting(golden, tiny_sd, device="cuda")
    for index, computed in enumerate(steps[:15]):
        assert relative(computed.start, golden["latents_after_guidance"][index]) < 1e-2
        assert relative(computed.latents, golden["latents_after_step"][index]) < 1e-2
        assert relative(computed.predicted, golden["noise_prediction"][index]) < 1e-2


def test_painting_is_near_that_of_the_cpu(precision, painted, of_cpu, tmp_path):
    options, theirs = painted
    ours = paint(of_cpu, tmp_path, *on("cuda", precision), *options)
    assert np.abs(ours - theirs).mean() < (0.5 if precision == "no" else 4)
    assert ours.std() > 5


def test_toybox_is_learned_and_painted(tmp_path, capsys):
    """The README's first example, in fewer steps; prints how long it takes."""
    example = Path(__file__).parents[2] / "example"
    learning = f"""--model_path toybox --folder_path {example} --instance toy_car --seed 0
        --train_steps 40 --finetune_steps 20 --num_class_images 4 --learning_rate 1e-3
        --finetune_learning_rate 1e-3 --output_dir {tmp_path} --device cuda --debug""".split()
    words = ["blue car", "purple car", "green car"]
    painting = f"""--models_dir {tmp_path} --model_id toy_car --output_path {tmp_path / "painted"}
        --seed 0 --num_images 2 --batch_size 2 --guidance_scale 3 --step_size 2
        --final_step_size 0.5 --device cuda --debug""".split()
    start = time.perf_counter()
    semantic_learning.main(
        [*learning, "--class_prompt", "a photo of a car", "--initializer_tokens", *words]
    )
    middle = time.perf_counter()
    semantic_synthesis.main([*painting, "--prompt", "a photo of <asset1> and <asset2>"])
    end = time.perf_counter()
    with capsys.disabled():
        name = torch.cuda.get_device_name()
        print(f"\ntoybox on {name}: learned in {middle - start:.1f} s, ", end="")
        print(f"painted in {end - middle:.1f} s")
    assert len(list((tmp_path / "painted" / "toy_car").glob("[0-9]*.png"))) == 2
