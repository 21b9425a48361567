"""How well what a toy MIGE begins with reads, and what tells of a silent death.

Axes: n tokens, d width of the text.
"""

import torch
from torch import Tensor

from mige.method.encoder import encode_text
from mige.training.model import TrainedModel
from mige.training.samples import Batch
from toybox.mige.heads import ReadingHeads, collapse, measure_readings
from toybox.mige.reading import Readings

#: What held-out triplets should reach, so that training has something to begin with.
LEAST = {"kind": 0.98, "hue": 0.98, "between_pictures": 0.3, "between_queries": 0.1}


def warning_of(name: str, value: float) -> str:
    """What stands behind a measure that is not good enough to begin with."""
    return f", and should be {LEAST[name]} or more" if value < LEAST.get(name, value) else ""


def measure(
    model: TrainedModel, heads: ReadingHeads, readings: Readings, batch: int
) -> dict[str, float]:
    """How well held-out triplets are read, and what tells of a silent death."""
    measured, some = measure_readings(model, heads, readings, batch), readings.some()
    measured |= collapse(model, some.vision, some.latents)
    return measured | {"caption_deviation": caption_deviation(model, some)}


def states_of_tokens(model: TrainedModel, batch: Batch) -> Tensor:
    """T5's states of all tokens that count, [n, d]."""
    embedded = model.embed(batch)
    return encode_text(model.parts["text_encoder"], embedded)[embedded.mask > 0]


@torch.inference_mode()
def caption_deviation(model: TrainedModel, batch: Batch) -> float:
    """The deviation of what the trunk makes of T5's states, between tokens."""
    return _deviation(model.parts["transformer"].caption_projection(states_of_tokens(model, batch)))


@torch.no_grad()
def calibrate(model: TrainedModel, batch: Batch) -> None:
    """Scale the trunk's caption projection so that either of its layers gives the deviation 1.

    Its layers stay as they were drawn otherwise.
    """
    states, layer = states_of_tokens(model, batch), model.parts["transformer"].caption_projection
    layer.linear_1.weight /= _deviation(layer.linear_1(states))
    layer.linear_2.weight /= _deviation(layer(states))


def _deviation(values: Tensor) -> float:
    """Between the rows of [n, d], over all columns."""
    return values.var(0).mean().sqrt().item()
