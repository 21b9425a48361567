"""The error of held-out triplets, at fixed steps of the noise: finer than what pictures show."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mige.data.features import open_features
from mige.data.records import RecordList
from mige.folder import load_parts
from mige.training.model import TrainedModel
from mige.training.probe import undropped
from mige.training.samples import Facts, Samples

TIMESTEPS = (100, 300, 500, 700, 900)
BATCH = 32  # samples


@torch.no_grad()
def held_out_errors(
    model: Path, data: Path, root: Path, features: Path, seed: int, device: str
) -> list[dict]:
    """Of each triplet of a list its task, its place, and the mean error over TIMESTEPS.

    A triplet's noise depends on the seed and its place in the list alone, so that models whose
    lists are as long can be compared one by one.
    """
    parts = load_parts(model, left_out=["vae"])
    records = RecordList(data)
    count = len(records)
    trained = TrainedModel.of_parts(parts).to(device).eval()
    samples = Samples(
        records, np.arange(count), open_features(features, model), root, Facts.of(model), seed,
        count, count, 0, BATCH,
    )  # fmt: skip
    batches = samples[0]
    if isinstance(batches, Exception):
        raise batches
    found: list[dict] = []
    for batch in batches:
        batch = undropped(batch).to(device)
        errors = torch.stack(
            [
                trained(replace(batch, timesteps=torch.full_like(batch.timesteps, step))).mse
                for step in TIMESTEPS
            ]
        ).mean(0)
        for task, error in zip(batch.tasks, errors.tolist(), strict=True):
            found.append({"task": task, "place": len(found), "error": error})
    return found
