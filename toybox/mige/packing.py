"""A trained toy MIGE as it ships: in half precision, with a record of its training."""

from pathlib import Path

import torch
from torch import nn

from imagelab.io.tensors import read_json
from imagelab.training.checkpoint import read_curves, read_facts
from mige.pipeline import MigePipeline
from mige.training.plan import CHECKPOINT, MODEL
from toybox.mige.architecture import save
from toybox.mige.folders import RECORD, TRAINING

ADVICE = "give a model that toybox.mige.begin or toybox.mige.train wrote"
LAST = 500  # updates, over which losses are told


def pack(run: Path, begun: Path, output: Path, overwrite: bool = False) -> None:
    """Write the model of a finished training in half precision; it is read in float32 again.

    The autoencoder's file stays toybox's own.

    Args:
        begun: folder of the model that training began with, and of its record.
        overwrite: take the place of a model that is there.

    Raises:
        UserError: the training is not finished, something else is at ``output``, or another
            process writes there.
    """
    pipeline = MigePipeline.from_pretrained(run / MODEL)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.float16)
    former = begun / TRAINING  # of a model that was trained before
    records = {
        RECORD: read_json(begun / RECORD, {}, ADVICE),
        TRAINING: record_of(run / CHECKPOINT)
        | {"began_from": read_json(former, {}, ADVICE) if former.is_file() else None},
    }
    save(pipeline, output, records, overwrite)


def record_of(checkpoint: Path) -> dict:
    """What a training was told, how long it was, and its losses at the end."""
    curves = read_curves(checkpoint)
    return {
        "settings": read_facts(checkpoint, {"settings": dict})["settings"],
        "steps": len(curves["loss"]),
        "last": {name: mean_of(values[-LAST:]) for name, values in curves.items()},
    }


def mean_of(values: list[float]) -> float | None:
    """The mean of those that are numbers."""
    known = [value for value in values if value == value]
    return round(sum(known) / len(known), 5) if known else None
