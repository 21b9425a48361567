"""The sampler: DDIM with box-controlled attention and latent optimisation.

Axes: b images, s subjects, c latent channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imagelab.attention import BoxControl, leave_early
from imagelab.boxes import Box
from imagelab.errors import UserError
from mifo.method.guidance import GuidanceConfig
from mifo.method.losses import box_alpha, box_loss
from mifo.method.regions import Refiner, RegionSet, TokenRoles


@dataclass(frozen=True)
class Guided:
    """What one guidance iteration saw: F and B of both kinds [b, s], loss [b]; of which images."""

    step: int
    images: Tensor
    cross: tuple[Tensor, Tensor]
    self_: tuple[Tensor, Tensor]
    loss: Tensor


def ddim_scheduler(scheduler):
    """The method's sampler over a model's own noise schedule and prediction type."""
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
    """Standard normal latents [b, *shape], image i from a CPU generator of its own seed."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def step_size(step: int, config: GuidanceConfig) -> float:
    """Falls linearly from ``step_size`` at step 0 toward ``final_step_size``."""
    share = step / config.guidance_steps
    return config.step_size + (config.final_step_size - config.step_size) * share


def guide(
    unet,
    control: BoxControl,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    step: int,
    config: GuidanceConfig,
    watch: Callable[[Guided], None] | None = None,
) -> Tensor:
    """Move latents [b, c, h, w] down the box loss; an image stops once its loss is low enough.

    Runs the conditional half alone, ``text`` [1, k, d], and of the UNet only what the loss reads.
    The regions are still the boxes, the same for all images.
    """
    latents = latents.clone()
    active = torch.arange(len(latents), device=latents.device)
    size = step_size(step, config)
    for _ in range(config.guidance_iterations):
        chosen = latents[active].requires_grad_()
        with torch.enable_grad():
            with control.guidance(), leave_early():
                unet(chosen.to(text.dtype), timestep, text.expand(len(active), -1, -1))
            cross, self_ = control.take_masses()
            loss = box_loss(cross, self_, box_alpha(step), config.cross_weight, config.self_weight)
            gradient = scaled_gradient(loss.sum(), chosen, text.dtype)
        cross, self_, loss = _detached(cross), _detached(self_), loss.detach()  # the graph can go
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
    """The gradient of a loss after latents that went through a UNet of this dtype.

    In fp16, which ends at 6e-8, it goes back scaled up, as far as it stays finite.
    """
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    while True:
        (gradient,) = torch.autograd.grad(scale * loss, latents, retain_graph=scale > 1)
        if scale == 1 or gradient.isfinite().all():
            return gradient / scale
        scale /= 4


def _refines(step: int, config: GuidanceConfig) -> bool:
    """Are the regions made anew before this step: at ``guidance_steps``, then every so often?"""
    since = step - config.guidance_steps
    return config.refine_every > 0 and since >= 0 and since % config.refine_every == 0


def _detached(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach(), pair[1].detach()


@torch.no_grad()
def denoise(
    unet,
    scheduler,
    latents: Tensor,
    text: Tensor,
    steps: int,
    guidance_scale: float,
    control: BoxControl | None = None,
    config: GuidanceConfig | None = None,
    on_step: Callable[[int, dict], None] | None = None,
    watch: Callable[[Guided], None] | None = None,
) -> Tensor:
    """Denoise latents [b, c, h, w] in ``steps`` DDIM steps with classifier-free guidance.

    Args:
        text: [2, k, d], the unconditional (or negative) and the conditional prompt's states.
        control: bounds the attention, for this run alone; None draws without boxes.
        on_step: called after each step with its number and a dict of what it computed.
        watch: called after each guidance iteration.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    text = text.to(latents.device, unet.dtype)
    both = text.repeat_interleave(len(latents), dim=0)
    refining = [step for step in range(1, steps) if control and _refines(step, config)]
    for step, timestep in enumerate(scheduler.timesteps):
        if step in refining:
            refined = control.refiner.refine(control.regions.at(*control.refiner.grid))
            control.regions = RegionSet(refined, control.tokens, latents.device)
        if control and step >= max(refining, default=0):
            control.refiner = None  # nobody reads the maps of this step
        if control and step < config.guidance_steps:
            latents = guide(unet, control, latents, timestep, text[1:], step, config, watch)
        guided = latents
        model_input = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        model_input = model_input.to(text.dtype)
        if control:
            with control.denoising():
                predicted = unet(model_input, timestep, both).sample
        else:
            predicted = unet(model_input, timestep, both).sample
        unconditional, conditional = predicted.float().chunk(2)
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the latents are not finite after step {step}; try --mixed_precision no"
            )
        if on_step:
            on_step(step, {"guided": guided, "predicted": predicted, "latents": latents})
    return latents


def box_control(
    unet,
    tokens: TokenRoles,
    boxes: Sequence[Box],
    latents: Tensor,
    seeds: Sequence[int],
) -> BoxControl:
    """The control of a batch of latents [b, c, h, w], with the boxes as its first regions."""
    size = tuple(latents.shape[-2:])
    regions = RegionSet(boxes, tokens, latents.device)
    control = BoxControl(unet, tokens, size, regions)
    control.refiner = Refiner(control.map_grid, boxes, seeds)
    return control
