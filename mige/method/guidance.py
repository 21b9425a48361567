"""Classifier-free guidance by the text and by the source picture (MIGE, section 3.3).

Branches are what one denoising step asks the transformer for: text or none, source or none. Axes:
g branches, b samples, c channels, h and w latent rows and columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Branch(NamedTuple):
    """Whether a branch sees the text, and whether it sees the source picture."""

    text: bool
    source: bool


def branches(has_source: bool, image_scale: float = 1.0) -> tuple[Branch, ...]:
    """The branches of a step, in the order of :func:`guide`.

    At an image scale of 1 the branch without text and source cancels: it is not run.
    """
    if not has_source:
        return Branch(False, False), Branch(True, False)
    seen = Branch(False, True), Branch(True, True)
    return seen if image_scale == 1 else (Branch(False, False), *seen)


def guide(noise: Tensor, text_scale: float, image_scale: float = 1.0) -> Tensor:
    """One prediction [b, c, h, w] out of the branches' [g, b, c, h, w].

    Two branches: e₀ + s_y (e₁ − e₀). Three: e₀ + s_s (e₁ − e₀) + s_y (e₂ − e₁).
    """
    *first, without, with_text = noise
    guided = text_scale * (with_text - without)
    if not first:
        return without + guided
    return torch.add(first[0] + image_scale * (without - first[0]), guided)
