"""Semantic synthesis: each denoising step with bounded attention and guided latents.

Axes: b images, s subjects, c latent channels, h and w latent rows and columns, k tokens, d their
width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from imagelab.attention import leave_early
from imagelab.models.base import DiffusionModel
from mifo.method.control import BoxControl, Masses
from mifo.method.guidance import GuidanceConfig
from mifo.method.losses import box_alpha, box_loss


@dataclass(frozen=True)
class Guided:
    """One guidance iteration: F and B of both kinds [b, s] and the loss [b] of ``images``."""

    step: int
    images: Tensor  # int64 [b], those that it moved
    cross: Masses
    self_: Masses
    loss: Tensor


def step_size(step: int, config: GuidanceConfig) -> float:
    """Falls linearly from ``step_size`` at step 0 toward ``final_step_size``, both scaled."""
    share = step / config.guidance_steps
    size = config.step_size + (config.final_step_size - config.step_size) * share
    return size if config.step_scale is None else size * config.step_scale


def refines(step: int, config: GuidanceConfig) -> bool:
    """Whether the regions are refined before this step, which needs some step before it."""
    since = step - config.guidance_steps
    return config.refine_every > 0 and step > 0 and since >= 0 and since % config.refine_every == 0


def guide(
    model: DiffusionModel,
    control: BoxControl,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    step: int,
    config: GuidanceConfig,
    watch: Callable[[Guided], None] | None = None,
) -> Tensor:
    """Latent optimisation before a denoising step (arXiv 2511.00542, section 4).

    Up to ``guidance_iterations`` times: a pass, its box loss L, latents -= step_size · ∂L/∂latents.
    An image stops once its loss, divided by the number of subjects, is below ``loss_threshold``.
    The pass is the conditional half alone, and ends after the last layer that the loss reads. The
    regions are still the boxes, the same for all images.

    Args:
        latents: [b, c, h, w]; they are left as they are.
        text: [1, k, d], states of the prompt.
        watch: called after each iteration.

    Raises:
        FloatingPointError: the gradient is not finite.
    """
    latents = latents.clone()
    active = torch.arange(len(latents), device=latents.device)
    size = step_size(step, config)
    for _ in range(config.guidance_iterations):
        chosen = latents[active].requires_grad_()
        with torch.enable_grad():
            with control.guidance_pass(), leave_early():
                model.predict(chosen, timestep, text.expand(len(active), -1, -1))
            cross, self_ = control.pop_masses()
            loss = box_loss(cross, self_, box_alpha(step), config.cross_weight, config.self_weight)
            gradient = scaled_gradient(loss.sum(), chosen, model.dtype)
        cross, self_, loss = _detach(cross), _detach(self_), loss.detach()  # frees the graph
        if not gradient.isfinite().all():
            raise FloatingPointError(
                f"the box loss has no finite gradient at step {step}; "
                "try --mixed_precision no or a smaller --step_size"
            )
        latents[active] = chosen.detach() - size * gradient
        if watch:
            watch(Guided(step, active, cross, self_, loss))
        active = active[loss / len(control.tokens.subjects) >= config.loss_threshold]
        if not len(active):
            break
    return latents


def scaled_gradient(loss: Tensor, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """∂loss/∂latents, where the latents went through a model of this dtype.

    In fp16, whose smallest number is 6e-8, the backward pass runs on the loss times a power of
    two: 2**14, or less where that overflows.
    """
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    while True:
        (gradient,) = torch.autograd.grad(scale * loss, latents, retain_graph=scale > 1)
        if scale == 1 or gradient.isfinite().all():
            return gradient / scale
        scale /= 4


def _detach(masses: Masses) -> Masses:
    return masses[0].detach(), masses[1].detach()


class BoxSampling:
    """MIFO's :class:`~imagelab.sampling.Control`: refined regions, guidance, bounded attention.

    Args:
        control: of the batch that is sampled.
        text: [1, k, d], states of the prompt.
        steps: how many denoising steps there are.
        watch: called after each guidance iteration.
    """

    def __init__(
        self,
        model: DiffusionModel,
        control: BoxControl,
        text: Tensor,
        steps: int,
        config: GuidanceConfig,
        watch: Callable[[Guided], None] | None = None,
    ):
        self.model, self.control, self.config, self.watch = model, control, config, watch
        self.text = text.to(model.device, model.dtype)
        self.refining_steps = [step for step in range(steps) if refines(step, config)]

    def before_step(self, step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """Refine the regions where it is time to, then guide the latents [b, c, h, w]."""
        if step in self.refining_steps:
            self.control.refine(step)
        self.control.recording = step < max(self.refining_steps, default=0)
        if step >= self.config.guidance_steps:
            return latents
        return guide(
            self.model, self.control, latents, timestep, self.text, step, self.config, self.watch
        )

    def denoising_pass(self) -> AbstractContextManager:
        """Bounds attention, and records it where a later step refines regions."""
        return self.control.denoising_pass()
