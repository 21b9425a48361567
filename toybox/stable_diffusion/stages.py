"""The stages of toybox's training, each a recipe: what is fed, what is descended, at which rate.

All use AdamW with betas (0.9, 0.99); the rate rises, stays, and falls as a cosine at the end.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from imagelab.training.loop import Stage, Tensors
from toybox.stable_diffusion.batches import Batches, Pictures
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.graphs import GraphedGradients, autocast
from toybox.stable_diffusion.loss import Loss


def autoencoder_stage(vae, pictures: Pictures, config: TrainConfig) -> Stage:
    """Crops go through the autoencoder: their squared error, and the posterior's divergence."""

    def loss(step: int) -> Tensor:
        crops = pictures.crops(step)
        posterior = vae.encode(crops).latent_dist
        restored = vae.decode(pictures.draw_latents(posterior, step)).sample
        return F.mse_loss(restored, crops) + config.kl_weight * posterior.kl().mean()

    losses = partial(in_mixed_precision, loss, vae.device)
    return make_stage("autoencoder", config.vae_steps, [vae], config.vae_lr, config, losses)


def decoder_stage(vae, pictures: Pictures, config: TrainConfig) -> Stage:
    """The decoder alone restores whole scenes; the latents stay what they are.

    Its group norms average over all that they see, and crops have other means than scenes.
    """

    def loss(step: int) -> Tensor:
        scenes = pictures.scenes(step)
        with torch.no_grad():
            posterior = vae.encode(scenes).latent_dist
        return F.mse_loss(vae.decode(pictures.draw_latents(posterior, step)).sample, scenes)

    modules = [vae.decoder, vae.post_quant_conv]
    losses = partial(in_mixed_precision, loss, vae.device)
    return make_stage("decoder", config.decoder_steps, modules, config.decoder_lr, config, losses)


def unet_stage(
    modules: Sequence[nn.Module], loss: Loss, batches: Batches, config: TrainConfig, graph: bool
) -> Stage:
    """UNet, text encoder and embedder of looks predict noise, and let nouns look at their toys.

    ``graph``: each step is replayed as a CUDA graph.
    """
    device = batches.processes.device
    losses = partial(in_mixed_precision, lambda step: loss(*batches(step)), torch.device(device))
    if graph:
        parameters = [p for module in modules for p in module.parameters()]
        gradients = GraphedGradients(batches, loss, parameters)

        def losses(step: int) -> AbstractContextManager[Tensors]:
            return nullcontext({"loss": gradients(step)})

    return make_stage("unet", config.steps, modules, config.lr, config, losses, graph)


# ----------------------------------------------------------------------------------------------
# what they share


@contextmanager
def in_mixed_precision(
    loss: Callable[[int], Tensor], device: torch.device, step: int
) -> Iterator[Tensors]:
    """The loss of a step, in bfloat16 on CUDA, in float32 elsewhere."""
    with autocast(device):
        value = loss(step)
    yield {"loss": value}


def make_stage(
    name: str,
    steps: int,
    modules: Sequence[nn.Module],
    rate: float,
    config: TrainConfig,
    losses: Callable[[int], AbstractContextManager[Tensors]],
    makes_gradients: bool = False,
) -> Stage:
    """A stage that trains all of some modules."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda,
    )  # fmt: skip

    def state() -> Tensors:
        return {
            f"{index}.{key}": tensor
            for index, module in enumerate(modules)
            for key, tensor in module.state_dict().items()
        }

    def load_state(tensors: Tensors) -> None:
        for index, module in enumerate(modules):
            module.load_state_dict({key: tensors[f"{index}.{key}"] for key in module.state_dict()})

    stage = Stage(
        name, steps, parameters, optimizer, None, losses, state, load_state, makes_gradients
    )
    stage.schedule = LambdaLR(
        optimizer, lambda step: lr_factor(step, stage.steps, config.warmup, config.cooldown)
    )
    return stage


def lr_factor(step: int, steps: int | None, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant, cosine cool-down to 0.01 over the last part of the steps.

    ``steps`` is None while nobody knows their number, which is before the cool-down.
    """
    left = 1.0 if steps is None else (steps - step) / max(1, cooldown * steps)
    fall = 0.01 + 0.99 * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))
    return min(1.0, (step + 1) / max(1, warmup)) * fall
