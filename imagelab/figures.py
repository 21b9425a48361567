"""Figures: losses of a training, and where a model's attention lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from imagelab.boxes import color_of

MOST_PANELS = 4  # beside each other
MARKS = {"solid": "-", "dotted": ":", "dashed": "--"}


def plot_losses(
    path: Path | BinaryIO,
    curves: Mapping[str, Sequence[float]],
    marks: Mapping[str, int] | None = None,
) -> None:
    """Losses over the steps, a panel each: dots and a running mean, as a PNG.

    Args:
        curves: one value a step by the loss's name; NaN where a step has none. A loss that no step
            has is left out.
        marks: at most three steps at which something changes, by what that is.
    """
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    marks = dict(zip(MARKS, (marks or {}).items(), strict=False))
    columns = min(len(curves), MOST_PANELS)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels[len(curves) :]:
        panel.remove()
    for panel, (name, values) in zip(panels, curves.items(), strict=False):
        values = np.asarray(values)
        steps = np.flatnonzero(np.isfinite(values))
        finite = values[steps]
        panel.plot(steps, finite, ".", markersize=2, alpha=0.35, color="tab:grey")
        window = max(1, min(50, len(finite) // 4))
        mean = np.convolve(finite, np.ones(window) / window, mode="valid")
        panel.plot(steps[window - 1 :], mean, color="tab:blue")
        if (finite > 0).all():
            panel.set_yscale("log")
            # plain numbers: the errors that mathtext keeps hold our callers' frames, with the model
            panel.yaxis.set_major_formatter(LogFormatter())
            panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        for style, (_, step) in marks.items():
            panel.axvline(step, color="black", linewidth=0.8, linestyle=MARKS[style])
        panel.set(title=name, xlabel="step")
    legend = "; ".join(f"{style}: {what}" for style, (what, _) in marks.items())
    figure.suptitle(legend, fontsize=8, y=0.995)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")


def plot_attention(
    path: Path,
    image: np.ndarray,
    masks: np.ndarray,
    maps: np.ndarray,
    titles: Sequence[tuple[str, str]],
) -> None:
    """One row a mask: the mask over the picture, and an attention map over the picture, as a PNG.

    Args:
        image: uint8 [H, W, 3].
        masks: bool [n, H, W]; maps: float [n, H, W].
        titles: of the two panels of each row.
    """
    figure = Figure(figsize=(6, 3 * len(masks) + 0.2))
    axes = figure.subplots(len(masks), 2, squeeze=False)
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1) / 255
    for index, (left, right) in enumerate(axes):
        colour = np.asarray(color_of(index)) / 255
        mask = masks[index][..., None]
        left.imshow(np.where(mask, 0.45 * image / 255 + 0.55 * colour, 0.6 * grey + 0.3))
        right.imshow(image)
        right.imshow(maps[index], cmap="inferno", alpha=0.7)
        for panel, title in zip((left, right), titles[index], strict=True):
            panel.set_title(title, fontsize=9)
            panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
