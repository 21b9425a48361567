"""Pictures of a learning run: its losses, and where the assets look."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from imagelab.boxes import color_of
from mifo.learning.instance import Instance
from mifo.tokens import asset_token


def learning_curves(
    path: Path | BinaryIO,
    losses: dict[str, list[float]],
    stages: Sequence[tuple[int, int]],
    reward_steps: int,
) -> None:
    """Losses over the steps of both stages, dots and a running mean, as a PNG.

    A loss that no step had (NaN, as with ``--attention_loss none``) is left out.
    """
    losses = {name: values for name, values in losses.items() if np.isfinite(values).any()}
    figure = Figure(figsize=(4.2 * len(losses), 3.2))
    axes = figure.subplots(1, len(losses), squeeze=False)
    for axis, (name, values) in zip(axes[0], losses.items(), strict=True):
        values = np.asarray(values)
        steps = np.flatnonzero(np.isfinite(values))
        finite = values[steps]
        axis.plot(steps, finite, ".", markersize=2, alpha=0.35, color="tab:grey")
        window = max(1, min(50, len(finite) // 4))
        mean = np.convolve(finite, np.ones(window) / window, mode="valid")
        axis.plot(steps[window - 1 :], mean, color="tab:blue")
        if (finite > 0).all():
            axis.set_yscale("log")
            # plain numbers: the errors that mathtext keeps hold our callers' frames, with the model
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        if len(stages) > 1:
            axis.axvline(stages[0][1], color="black", linewidth=0.8)
        if stages[0][0] == 1 and 0 < reward_steps < stages[0][1]:
            axis.axvline(reward_steps, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.suptitle("dotted: reward → penalty; solid: stage 1 → 2", fontsize=8, y=0.995)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def attention_figure(path: Path, instance: Instance, maps: Tensor, scores: Sequence[float]) -> None:
    """One row an asset: its mask over the picture, and its attention over the picture, as a PNG."""
    count = len(instance.masks)
    figure = Figure(figsize=(6, 3 * count + 0.2))
    axes = figure.subplots(count, 2, squeeze=False)
    grey = np.repeat(instance.image.mean(-1, keepdims=True), 3, -1) / 255
    for index, (left, right) in enumerate(axes):
        colour = np.asarray(color_of(index)) / 255
        mask = instance.masks[index][..., None]
        left.imshow(np.where(mask, 0.45 * instance.image / 255 + 0.55 * colour, 0.6 * grey + 0.3))
        left.set_title(f"mask of {asset_token(index)}", fontsize=9)
        right.imshow(instance.image)
        right.imshow(maps[index].numpy(), cmap="inferno", alpha=0.7)
        right.set_title(f"its attention, {scores[index]:.0%} on its own", fontsize=9)
        for axis in (left, right):
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
