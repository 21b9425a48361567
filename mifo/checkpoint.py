"""Checkpoints of an unfinished learning run: one safetensors file, written aside and renamed."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mifo_lora import save_lora as save_tensors


@dataclass
class Checkpoint:
    """Where a run stands: ``stage`` and the steps done in it, tensors by name, and facts."""

    stage: int
    step: int
    tensors: dict[str, Tensor]
    facts: dict


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    facts = {"stage": checkpoint.stage, "step": checkpoint.step, "facts": checkpoint.facts}
    save_tensors(path, checkpoint.tensors, {"mifo": json.dumps(facts)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError when there is no readable checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["mifo"])
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); start anew with "
            "--overwrite, without --resume"
        ) from error
    return Checkpoint(facts["stage"], facts["step"], tensors, facts["facts"])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, ``optimizer.<parameter>.<key>``."""
    return {
        f"optimizer.{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser over the same parameters the state of :func:`pack_optimizer`."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}
    )
