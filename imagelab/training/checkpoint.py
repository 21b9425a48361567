"""Checkpoints of an unfinished run: one safetensors file, which appears when it is whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import parse_json, read_metadata, read_tensors, write_tensors
from imagelab.training.sharding import split_as

ADVICE = "start anew with --overwrite, without --resume"
#: What a checkpoint says of itself; a run may ask for more facts, see `imagelab.io.tensors.misfit`.
FORM = {"stage": str, "step": int, "facts": {"schedule": dict, "scaler": dict, "curves": [str]}}


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
    write_tensors(path, checkpoint.tensors, {"checkpoint": json.dumps(facts)})


def read_checkpoint(path: Path, form: Mapping | None = None, advice: str = ADVICE) -> Checkpoint:
    """Raises UserError, which ends with ``advice``, when there is no readable checkpoint.

    ``form``: of the run's own facts.
    """
    tensors, metadata = read_tensors(path, advice, finite=False)  # curves have NaN
    found = _parse(path, metadata, form, advice)
    _check_curves(path, found["facts"]["curves"], tensors, advice)
    return Checkpoint(found["stage"], found["step"], tensors, found["facts"])


def read_facts(path: Path, form: Mapping | None = None) -> dict:
    """The facts of a checkpoint, without its tensors. Raises UserError likewise."""
    return _parse(path, read_metadata(path, ADVICE), form, ADVICE)["facts"]


def read_curves(path: Path) -> dict[str, list[float]]:
    """The losses of every step by name, without the other tensors. Raises UserError likewise."""
    tensors, metadata = read_tensors(path, ADVICE, finite=False, prefix="curves.")
    names = _parse(path, metadata, None, ADVICE)["facts"]["curves"]
    _check_curves(path, names, tensors, ADVICE)
    return {name: tensors[f"curves.{name}"].tolist() for name in names}


def _parse(path: Path, metadata: Mapping[str, str], form: Mapping | None, advice: str) -> dict:
    form = FORM | {"facts": FORM["facts"] | (form or {})}
    return parse_json(metadata.get("checkpoint", ""), form, str(path), advice)


def _check_curves(path: Path, names: list[str], tensors: dict[str, Tensor], advice: str) -> None:
    if missing := [name for name in names if f"curves.{name}" not in tensors]:
        raise UserError(f"{path} has no curve {shorten(missing[0])!r}; {advice}")


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, ``optimizer.<parameter>.<key>``."""
    return {
        f"optimizer.{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser over the same parameters the state of :func:`pack_optimizer`.

    A count of steps stays on the CPU, unless the optimiser is one that counts on the device.
    """
    parameters = _parameters(optimizer)
    counts_there = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)]
            if value.ndim:
                value = split_as(value.to(parameter.device), parameter)
            elif counts_there and value.is_floating_point():
                value = value.to(parameter.device)
            elif not value.is_floating_point():  # a count of steps, which was a plain number
                value = value.item()
            optimizer.state[parameter][key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
