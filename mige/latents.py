"""Latents of pictures, and the sizes of these.

Axes: c latent channels, h and w latent rows and columns.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """An autoencoder's posterior over unscaled latents, float32 [c, h, w] each."""

    mean: Tensor
    deviation: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw, on the posterior's device, from noise of the CPU."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.deviation * noise.to(self.mean)


@dataclass(frozen=True)
class Size:
    """A picture's width and height, in pixels."""

    width: int
    height: int
