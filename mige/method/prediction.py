"""What the transformer is asked in a denoising step.

Axes: b samples, c latent channels, h and w latent rows and columns, k tokens, d width of the text.
"""

import torch
from torch import Tensor


def predict(
    transformer,
    latents: Tensor,
    source: Tensor,
    timesteps: Tensor,
    text: Tensor,
    mask: Tensor,
    round_timesteps: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a model predicts, usually the noise in latents, and how the variance is interpolated.

    Both are float32 [b, c, h, w]; see :mod:`mige.method.schedule`.

    Args:
        latents: noisy, [b, c, h, w]; source: latents of the source picture, or zeros.
        timesteps: [b], floats.
        text: [b, k, d]; mask: [b, k], 1 for each token that counts.
        round_timesteps: take them in bfloat16's steps, as the released weights were trained.
    """
    if round_timesteps:
        timesteps = timesteps.bfloat16()
    output = transformer(
        torch.cat([latents, source], dim=1).to(transformer.dtype),
        encoder_hidden_states=text.to(transformer.dtype),
        timestep=timesteps,
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    noise, variance = output.float().chunk(2, dim=1)
    return noise, variance
