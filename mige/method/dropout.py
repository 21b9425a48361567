"""What training leaves out, so that guidance has something to compare with (MIGE, section 3.4).

Axes: b samples, k tokens, d width of the text, c latent channels, h and w rows and columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RATE = 0.05  # of each kind of dropout


class Dropped(NamedTuple):
    """Which samples lose their text, and which their source picture, bool [b] each."""

    text: Tensor
    source: Tensor


def choose_dropped(draws: Tensor) -> Dropped:
    """One draw from 0 to 1 for each sample, [b]: text alone, source alone, both, or nothing.

    Each of the three has a share of 5%.
    """
    text = (draws < RATE) | ((draws >= 2 * RATE) & (draws < 3 * RATE))
    source = (draws >= RATE) & (draws < 3 * RATE)
    return Dropped(text, source)


def drop(
    dropped: Dropped, text: Tensor, null_text: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """Text states [b, k, d] and source latents [b, c, h, w] after dropout.

    Null text [k, d] takes the place of what comes out of the text encoder, so the pictures in an
    instruction go with its words; the masks of the instructions stay.
    """
    text = torch.where(dropped.text[:, None, None], null_text.to(text), text)
    source = torch.where(dropped.source[:, None, None, None], torch.zeros_like(source), source)
    return text, source
