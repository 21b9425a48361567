"""What a method asks of a base model, be its denoiser a UNet or a transformer.

Axes: b samples, c latent channels, h and w latent rows and columns, H and W pixels, k tokens, d
width of the text states.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """An autoencoder's posterior over the scaled latents of pictures, float32 [b, c, h, w] each."""

    mean: Tensor
    deviation: Tensor


class DiffusionModel(Protocol):
    """A latent diffusion model that is conditioned on text.

    Attributes:
        source, digest: where it came from (a path, a hub id or an embedded model's name), and the
            sha256 of its weights.
        configs: sha256 of what its configs say and its weights do not, such as the noise schedule.
        scheduler: diffusers' scheduler with the noise schedule and the prediction type.
        device, dtype: of the denoiser; latents and text states may be on any device.
        latent_channels: c.
        resolution: the side, in pixels, of the pictures that it was trained for.
        multiple: what a picture's sides must be divisible by, in pixels.
        vae_factor: pixels a latent, along each side.
    """

    source: str
    digest: str
    scheduler: object

    @property
    def configs(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def resolution(self) -> int: ...

    @property
    def multiple(self) -> int: ...

    @property
    def vae_factor(self) -> int: ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """States [b, k, d] of prompts; a UserError when one is too long."""
        ...

    def encode(self, pixels: Tensor) -> Posterior:
        """The posterior of pictures [b, 3, H, W] in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures float32 [b, 3, H, W], about [-1, 1], of scaled latents [b, c, h, w]."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The denoiser's prediction, float32 [b, c, h, w].

        Args:
            latents: noisy, [b, c, h, w]; timesteps: a scalar or [b]; text: [b, k, d].
        """
        ...
