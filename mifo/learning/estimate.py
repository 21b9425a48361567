"""About how much memory and time a run takes."""

import time

import torch

from mifo.learning.plan import Plan
from mifo.learning.priors import STEPS

#: Values kept for the backward pass, for each layer, channel and pixel of the UNet. It fits the
#: peaks in benchmarks/results.
KEPT = 40


def estimate_bytes(plan: Plan) -> int:
    """About how much memory a run takes on its device: weights, and what gradients need.

    Gradient checkpointing is taken to need an eighth of the :data:`KEPT` values.
    """
    recipe, model, unet = plan.config.recipe, plan.model, plan.model.unet.config
    unet_size, text_size = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (model.unet, model.text_encoder)
    )
    bytes_each = torch.finfo(plan.dtype).bits // 8
    if recipe.finetune == "full":  # weights, gradients and two moments, these of 4 or of 1 byte
        weights = (16 if recipe.optimizer == "adamw" else 10) * (unet_size + text_size)
    else:
        weights = bytes_each * unet_size + 4 * text_size
    height, width = plan.instance.image.shape[:2]
    pixels = height * width // model.vae_factor**2
    values = sum(
        channels * (pixels // 4**level) for level, channels in enumerate(unet.block_out_channels)
    )
    layers = 2 * unet.layers_per_block + 1  # of a level, downward and upward
    kept = bytes_each * KEPT * layers * values * (1 + recipe.needs_class_images)
    return weights + kept // (8 if plan.config.runtime.gradient_checkpointing else 1)


def estimate_seconds(plan: Plan) -> float:
    """About how long a run takes, from one timed pass of its UNet; a backward pass counts twice."""
    recipe, model = plan.config.recipe, plan.model
    height, width = (side // model.vae_factor for side in plan.instance.image.shape[:2])
    model.unet.to(plan.device, plan.dtype)
    latents = torch.zeros(1, model.latent_channels, height, width)
    text = torch.zeros(1, model.tokenizer.model_max_length, model.text_encoder.config.hidden_size)
    timestep = torch.zeros(1, device=plan.device)
    with torch.no_grad():
        for _ in range(2):  # the first pass also warms up
            start = time.perf_counter()
            model.predict(latents, timestep, text).cpu()
            seconds = time.perf_counter() - start
    passes = 3 * sum(recipe.steps.values())
    if recipe.needs_class_images:
        passes += 3 * recipe.finetune_steps
        passes += 0 if plan.class_images else 2 * STEPS * recipe.num_class_images
    return passes * seconds
