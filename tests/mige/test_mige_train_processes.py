"""mige.train on two processes: each computes half of a batch, or keeps half of the weights."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import start_two
from safetensors.torch import load_file
from thin import free_port
from training_data import PLAIN, RECORDS, save_data, usual

from mige.train import main
from mige.training.config import Recipe
from mige.training.memory import empty_model
from mige.training.model import trained_parameters
from mige.training.plan import CHECKPOINT

ROOT = Path(__file__).parents[2]
#: As `accelerate config` writes it.
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""
#: One sample at a time, so that a process has one without pictures while the other sees some. The
#: gradient is not clipped, and the average is far from the weights.
HOW = ("--micro_batch_size", "1", "--max_grad_norm", "1000", "--ema", "0.1")


def launch_fsdp(argv: list[str]) -> subprocess.Popen:
    """With the config file of `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]
    command += ["--main_process_port", str(free_port()), "-m", "mige.train", *argv]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "lora-master")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def outputs(model, tmp_path_factory):
    """Two updates each: by one process, by two that share the batch, and by two that share all."""
    folder = save_data(tmp_path_factory.mktemp("data") / "data", model, [*RECORDS, PLAIN])
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)  # as each process of a launch has: sums are rounded alike
    Path("fsdp.yaml").write_text(FSDP)
    try:
        started = {
            "shared": start_two("mige.train", *usual(model, "shared", *HOW)),
            "split": launch_fsdp(usual(model, "split", *HOW)),
        }
        main(usual(model, "one", *HOW))
        for name, process in started.items():
            out, told = process.communicate()
            assert process.returncode == 0, told
            assert "Warning" not in told, told
            lines = out.splitlines()
            assert lines[-1] == f"{name}/model" and lines.count(lines[-1]) == 1
            assert "seed 5, 2 × cpu in float32" in lines
        yield folder
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def saved(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / CHECKPOINT)


@pytest.fixture
def names(model) -> list[str]:
    """What learns, in the order of the moments and of the average."""
    return list(trained_parameters(empty_model(model, Recipe())))


def check_close(found: dict, wanted: dict, names: list[str]) -> None:
    """Losses and moments; weights where the gradient is more than rounding, which Adam enlarges."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.startswith("curves."):
            ours, theirs = (each[name].nan_to_num(-1) for each in (found, wanted))
            assert torch.allclose(ours, theirs, rtol=1e-5), name
    compared = total = 0
    for index, name in enumerate(names):
        moment = wanted[f"optimizer.{index}.exp_avg"]
        ours = found[f"optimizer.{index}.exp_avg"]
        assert torch.allclose(ours, moment, rtol=1e-3, atol=1e-7), name
        is_clear = moment.abs() > 1e-5
        compared, total = compared + is_clear.sum().item(), total + moment.numel()
        for kind in (f"trained.{name}", f"callbacks.0.{index}"):
            apart = (found[kind] - wanted[kind])[is_clear].abs()
            assert not len(apart) or apart.max() < 2e-5, name
    assert compared > total / 4


def test_two_processes_that_share_the_batch_learn_as_one(outputs, names):
    check_close(saved(outputs / "shared"), saved(outputs / "one"), names)


def test_two_processes_that_share_the_weights_learn_as_one(outputs, names):
    check_close(saved(outputs / "split"), saved(outputs / "one"), names)


@pytest.mark.parametrize("name", ["one", "shared", "split"])
def test_the_result_is_the_average(outputs, name, names):
    kept = saved(outputs / name)
    (file,) = (outputs / name / "model/fusion").glob("*.safetensors")
    found = load_file(file)["projection.weight"]
    weight = "parts.fusion.projection.weight"
    assert torch.equal(found, kept[f"callbacks.0.{names.index(weight)}"])
    assert (found - kept[f"trained.{weight}"]).abs().max() > 1e-5


def test_one_process_goes_on_with_what_two_began(outputs, model):
    losses = {}
    for name in ("one", "split"):
        shutil.copytree(outputs / name, outputs / f"{name}2")
        main(usual(model, f"{name}2", *HOW, "--steps", "3", "--resume"))
        losses[name] = saved(outputs / f"{name}2")["curves.loss"]
        assert len(losses[name]) == 3
    assert torch.allclose(losses["one"], losses["split"], rtol=1e-4)
