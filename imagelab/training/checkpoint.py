"""Checkpoints of an unfinished learning run: one safetensors file, written aside and renamed."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagelab.errors import UserError, memory_errors
from imagelab.io.atomic import written_aside


@dataclass
class Checkpoint:
    """Where a run stands: the name of the stage, the steps done in it, tensors and facts."""

    stage: str
    step: int
    tensors: dict[str, Tensor]
    facts: dict


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, by way of a copy in the CPU's memory; OSError when there is no room."""
    facts = {"stage": checkpoint.stage, "step": checkpoint.step, "facts": checkpoint.facts}
    tensors = _by_themselves(checkpoint.tensors)
    try:
        with written_aside(path) as aside:
            save_file(tensors, aside, {"mifo": json.dumps(facts)})
    except SafetensorError as error:  # what safetensors makes of an OSError, such as a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _by_themselves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and no two of them in one storage, such as bitsandbytes' tables are."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises UserError when there is no readable checkpoint."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["mifo"])
    return Checkpoint(facts["stage"], facts["step"], tensors, facts["facts"])


def read_facts(path: Path) -> dict:
    """The facts of a checkpoint, without its tensors. Raises UserError likewise."""
    with _opened(path) as file:
        return json.loads(file.metadata()["mifo"])["facts"]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with memory_errors(), safe_open(path, framework="pt") as file:
            yield file
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); start anew with "
            "--overwrite, without --resume"
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, ``optimizer.<parameter>.<key>``."""
    return {
        f"optimizer.{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser over the same parameters the state of :func:`pack_optimizer`."""
    parameters = _parameters(optimizer)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)]
            if value.ndim:
                value = value.to(parameter.device)
            elif not value.is_floating_point():  # a count of steps, which was a plain number
                value = value.item()
            optimizer.state[parameter][key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
