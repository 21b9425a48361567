"""DDIM with classifier-free guidance over any :class:`~imagelab.models.base.DiffusionModel`.

Axes: b images, c latent channels, h and w latent rows and columns, k tokens, d their width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from imagelab.errors import UserError
from imagelab.models.base import DiffusionModel
from imagelab.training.seeds import generator_for


class Control(Protocol):
    """What a method does in each step of :func:`denoise`."""

    def before_step(self, step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """The latents [b, c, h, w] from which step ``step``, counted from 0, shall start."""
        ...

    def denoising_pass(self) -> AbstractContextManager:
        """Held around the step's prediction, over the samples [unconditional; conditional]."""
        ...


class Step(NamedTuple):
    """What a step of :func:`denoise` computed; each tensor is float32 [b, c, h, w]."""

    number: int
    start: Tensor  # the latents that it started from, after the control
    predicted: Tensor  # the prediction, after classifier-free guidance
    latents: Tensor


def ddim_scheduler(scheduler):
    """DDIM (Song et al., arXiv 2010.02502) with a model's noise schedule and prediction type."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        scheduler.config,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def check_steps(steps: int, scheduler) -> None:
    """Raises UserError for a number of steps that would start far from pure noise.

    DDIM goes in steps of floor(timesteps / steps), from the clean end on: the remainder is left out
    at the noisy end.
    """
    total = scheduler.config.num_train_timesteps
    if steps >= total or total % steps > total / 5:
        raise UserError(
            f"--num_inference_steps is {steps}, which would not start at the noisy end of the "
            f"model's {total} timesteps: give at most {total // 4}, or {total // 3} or {total // 2}"
        )


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal latents float32 [b, *shape]; each image's depend on its own seed alone."""
    return torch.stack([torch.randn(*shape, generator=generator_for(s, "noise")) for s in seeds])


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    latents: Tensor,
    text: Tensor,
    steps: int,
    guidance_scale: float,
    control: Control | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Denoise latents [b, c, h, w], deterministically (eta 0).

    Args:
        text: [2, k, d], states of the negative (or empty) prompt and of the prompt.
        control: a method's part in each step; None for plain sampling.
        on_step: called after each step.

    Raises:
        FloatingPointError: the latents are no longer finite.
    """
    scheduler = ddim_scheduler(model.scheduler)
    scheduler.set_timesteps(steps, device=latents.device)
    text = text.to(latents.device, model.dtype).repeat_interleave(len(latents), dim=0)  # (2 b) k d
    for step, timestep in enumerate(scheduler.timesteps):
        if control:
            latents = control.before_step(step, timestep, latents)
        start = latents
        with control.denoising_pass() if control else nullcontext():
            predicted = model.predict(torch.cat([start, start]), timestep, text)
        unconditional, conditional = predicted.chunk(2)
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, start).prev_sample
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the latents are not finite after step {step}; try --mixed_precision no"
            )
        if on_step:
            on_step(Step(step, start, predicted, latents))
    return latents


def to_picture(pixels: Tensor) -> Image.Image:
    """An RGB picture of decoded pixels [3, H, W], about [-1, 1].

    Raises FloatingPointError for pixels that are not finite.
    """
    if not pixels.isfinite().all():
        raise FloatingPointError("the decoded picture is not finite; try --mixed_precision no")
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
