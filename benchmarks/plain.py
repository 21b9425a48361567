"""The method in the plain order of work: the numbers of :mod:`mifo`, with nothing saved.

It is there to be compared with, in what it computes (tests/benchmarks/test_plain_path.py) and in
what it costs (benchmarks/run.py). Everything runs in float32, and

- both halves of the classifier-free batch go through the whole UNet, in guidance too;
- every layer builds its mask anew, n² entries, and materialises its attention matrix;
- all weights require gradients, also those that never change (:func:`require_gradients`);
- the picture goes through the VAE at every step of learning (:class:`FreshMoments`).

Axes: b images, h heads, n query pixels, m keys (pixels or tokens), s subjects, d channels a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import attention_layers, layer_grid, pixel_grids, processors
from imagelab.boxes import Box
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learning.views import Batch
from mifo.method.guidance import GuidanceConfig
from mifo.method.layers import decoder_block
from mifo.method.losses import (
    ATTENTION_LOSSES,
    REGULARISED_TIMESTEPS,
    box_alpha,
    box_loss,
    box_mass,
)
from mifo.method.regions import Refiner, RegionSet, TokenRoles
from mifo.method.sampling import step_size


def require_gradients(base: StableDiffusion) -> None:
    """All weights of the UNet and the text encoder, trained or not."""
    base.unet.requires_grad_(True)
    base.text_encoder.requires_grad_(True)


def attention(attn, pixels: Tensor, context: Tensor | None, hidden: Tensor | None):
    """Output [b, n, c] and probabilities [b, h, n, m] of a layer; hidden is bool [b or 1, n, m]."""
    context = pixels if context is None else context
    query, key, value = (
        projected.unflatten(-1, (attn.heads, -1))  # b n (h d) -> b n h d
        for projected in (attn.to_q(pixels), attn.to_k(context), attn.to_v(context))
    )
    logits = attn.scale * torch.einsum("bnhd,bmhd->bhnm", query, key)
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    out = torch.einsum("bhnm,bmhd->bnhd", probabilities, value).flatten(2)
    return attn.to_out[0](out), probabilities


@contextmanager
def plain_layers(
    unet, read: Sequence[str], hidden: Callable[[int, bool], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within, all attention is plain; yields the probabilities of the layers ``read``, by name.

    ``hidden(n, crosswise)`` makes the mask of a layer of n pixels.
    """
    maps = {}

    def processor(name: str):
        def process(attn, hidden_states, encoder_hidden_states=None, **_):
            crosswise = encoder_hidden_states is not None
            mask = hidden(hidden_states.shape[1], crosswise) if hidden else None
            out, probabilities = attention(attn, hidden_states, encoder_hidden_states, mask)
            if name in read:
                maps[name] = probabilities
            return out

        return process

    with processors(unet, {name: processor(name) for name in attention_layers(unet)}):
        yield maps


# ----------------------------------------------------------------------------------------------
# synthesis


@dataclass
class Control:
    """What bounds the attention: regions (boxes, or bool [b, s, rows, columns]) of subjects."""

    unet: torch.nn.Module
    tokens: TokenRoles
    source: Sequence[Box] | Tensor
    size: tuple[int, int]  # rows, columns of the latents

    def masks(self, images: int, guidance: bool, device) -> Callable[[int, bool], Tensor]:
        """Makes masks for [unconditional; conditional], each time from the regions up."""

        def hidden(pixels: int, crosswise: bool) -> Tensor:
            grid = pixel_grids(self.unet, self.size)[pixels]
            regions = RegionSet(self.source, self.tokens, device)
            if crosswise:
                mask = regions.cross_mask(*grid, guidance).expand(images, -1, -1)
                return torch.cat([torch.zeros_like(mask), mask])
            return regions.self_mask(*grid).expand(images, -1, -1).repeat(2, 1, 1)

        return hidden

    def layers(self, *prefixes: str) -> list[str]:
        return [name for name in attention_layers(self.unet) if name.startswith(prefixes)]


def guide(
    control: Control,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    step: int,
    config: GuidanceConfig,
) -> Tensor:
    """:func:`mifo.method.sampling.guide`, with ``text`` [2, k, d] for both halves."""
    active = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    both = text.repeat_interleave(len(latents), dim=0)
    read = control.layers("mid_block.", decoder_block(control.unet))
    hidden = control.masks(len(latents), True, latents.device)
    for _ in range(config.guidance_iterations):
        latents = latents.detach().requires_grad_()
        with torch.enable_grad(), plain_layers(control.unet, read, hidden) as maps:
            control.unet(torch.cat([latents, latents]), timestep, both)
            cross, self_ = (_masses(control, maps, kind) for kind in ("attn2", "attn1"))
            loss = box_loss(cross, self_, box_alpha(step), config.cross_weight, config.self_weight)
            (gradient,) = torch.autograd.grad(loss[active].sum(), latents)
        latents = latents.detach() - step_size(step, config) * gradient
        active &= loss.detach() / len(control.tokens.subjects) >= config.loss_threshold
        if not active.any():
            break
    return latents


def _masses(control: Control, maps: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """F and B [b, s] of the conditional half, means over the read layers of a kind."""
    masses = []
    for name in [name for name in maps if name.endswith(kind)]:
        probabilities = maps[name].chunk(2)[1]
        grid = layer_grid(control.unet, control.size, name)
        regions = RegionSet(control.source, control.tokens, probabilities.device).at(*grid)
        context = regions
        if kind == "attn2":
            context = torch.zeros(1, len(control.tokens.subjects), control.tokens.length)
            for subject, positions in enumerate(control.tokens.subjects):
                context[0, subject, [*positions, control.tokens.end]] = 1
            context = context.to(probabilities.device)
        masses.append(box_mass(probabilities, regions, context))
    foreground, background = zip(*masses, strict=True)
    return torch.stack(foreground).mean(0), torch.stack(background).mean(0)


@torch.no_grad()
def denoise(
    scheduler,
    latents: Tensor,
    text: Tensor,
    steps: int,
    guidance_scale: float,
    control: Control,
    config: GuidanceConfig,
    seeds: Sequence[int],
) -> Tensor:
    """Denoising with :class:`mifo.method.sampling.BoxSampling`.

    ``control`` starts with boxes and is left refined.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    both = text.repeat_interleave(len(latents), dim=0)
    decoder = decoder_block(control.unet)
    grid = layer_grid(control.unet, control.size, decoder)
    refiner = Refiner(grid, control.source, seeds)
    for step, timestep in enumerate(scheduler.timesteps):
        since = step - config.guidance_steps
        if step and since >= 0 and config.refine_every and since % config.refine_every == 0:
            current = RegionSet(control.source, control.tokens).at(*grid)
            control.source = refiner.refine(current, step)
        if step < config.guidance_steps:
            latents = guide(control, latents, timestep, text, step, config)
        hidden = control.masks(len(latents), False, latents.device)
        with plain_layers(control.unet, control.layers(decoder), hidden) as maps:
            predicted = control.unet(torch.cat([latents, latents]), timestep, both).sample
        for name, probabilities in maps.items():
            mean = probabilities.chunk(2)[1].mean(dim=1)
            if name.endswith("attn2"):
                refiner.add("cross", mean[..., list(control.tokens.leading)])
            else:
                refiner.add("self", mean)
        unconditional, conditional = predicted.chunk(2)
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


# ----------------------------------------------------------------------------------------------
# learning


class FreshMoments:
    """In the place of ``Views.moments``: encodes the picture, or its mirror, when it is asked."""

    def __init__(self, base: StableDiffusion, image: np.ndarray):
        self.vae = base.vae
        self.pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1  # 1 3 H W

    @torch.no_grad()
    def __getitem__(self, flip: int) -> tuple[Tensor, Tensor]:
        pixels = self.pixels.flip(-1) if flip else self.pixels
        posterior = self.vae.encode(pixels.to(self.vae.device)).latent_dist
        scale = self.vae.config.scaling_factor
        return scale * posterior.mean[0].cpu(), scale * posterior.std[0].cpu()


def learning_loss(
    base: StableDiffusion,
    batch: Batch,
    layers: Sequence[str],
    attention_loss: str,
    prior_weight: float = 1.0,
) -> Tensor:
    """The total of a step's loss, of a model that predicts the noise."""
    noisy = base.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    text = base.text_encoder(batch.input_ids).last_hidden_state
    with plain_layers(base.unet, layers) as maps:
        predicted = base.unet(noisy, batch.timesteps, text).sample
    size = tuple(batch.latents.shape[-2:])
    union = F.interpolate(batch.masks.amax(dim=0)[None, None], size, mode="nearest")
    total = ((predicted[-1:] - batch.noise[-1:]) * union).square().mean()
    if len(batch.latents) > 1:
        total = total + prior_weight * (predicted[:-1] - batch.noise[:-1]).square().mean()
    if batch.timesteps[-1] < REGULARISED_TIMESTEPS:
        term, weight = ATTENTION_LOSSES[attention_loss]
        for name, probabilities in maps.items():
            grid = layer_grid(base.unet, size, name)
            goals = F.interpolate(batch.masks[None], grid, mode="bilinear", antialias=False)[0]
            mean = probabilities[-1].mean(dim=0)  # n m
            for goal, position in zip(goals, batch.positions, strict=True):
                total = total + weight * term(mean[:, position].unflatten(0, grid), goal)
    return total
