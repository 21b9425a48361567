"""What one step of semantic learning sees, and its loss.

Axes: b samples (stage 2: the class sample, then the instance view), c latent channels, k tokens,
n pixels of an attention layer.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import Recorder, attention_layers, decoder_block, layer_grid, processors
from imagelab.errors import UserError
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learning.instance import Instance
from mifo.method.losses import ATTENTION_LOSSES, REGULARISED_TIMESTEPS, reconstruction_loss
from imagelab.prompts import encode_ids
from mifo.tokens import view_prompt


@dataclass
class Batch:
    """What one step learns from.

    Attributes:
        latents, noise: [b, c, h, w], latents scaled; the instance view is the last sample.
        timesteps: int64 [b]; input_ids: int64 [b, k].
        masks: float [m, H, W], the masks of the chosen assets in prompt order, at picture size.
        positions: the token position of each of them in the instance's prompt.
        prior: the first sample is a class image.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor
    masks: Tensor
    positions: Sequence[int]
    prior: bool = False


@dataclass
class StepLoss:
    """The loss of a step and its unweighted terms (attention: layer-major, asset-minor)."""

    total: Tensor
    reconstruction: Tensor
    prior: Tensor | None = None
    attention: list[Tensor] = field(default_factory=list)


def supervised_layers(unet, size: tuple[int, int], stage: int) -> list[str]:
    """Cross-attention layers that a stage supervises, for latents of ``size`` = (rows, columns).

    Stage 1: the first two decoder blocks with attention (``up_blocks.1`` and ``up_blocks.2``);
    stage 2: every cross layer at the resolution of ``up_blocks.1``, encoder's included.
    """
    cross = attention_layers(unet, "cross")
    decoder = decoder_block(unet)
    if stage == 1:
        return [name for name in cross if name.startswith((decoder, "up_blocks.2."))]
    grid = layer_grid(unet, size, decoder)
    return [name for name in cross if layer_grid(unet, size, name) == grid]


def step_loss(
    base: StableDiffusion,
    batch: Batch,
    layers: Sequence[str],
    attention_loss: str | None,
    prior_weight: float = 1.0,
    attention_weight: float = 1.0,
    kept: ExitStack | None = None,
) -> StepLoss:
    """The loss of one batch (method: arXiv 2511.00542, section 3).

    Args:
        layers: names of the supervised cross-attention layers.
        attention_loss: a key of :data:`~mifo.method.losses.ATTENTION_LOSSES`, or None for none.
        attention_weight: factor on the weight that the attention loss has there.
        kept: what holds the recording processors in place until the backward pass is over, in
            which a UNet with gradient checkpointing runs once more. None: until this returns.
    """
    unet, scheduler = base.unet, base.scheduler
    dtype = unet.dtype
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    text = base.text_encoder(batch.input_ids).last_hidden_state
    regularise = attention_loss and batch.timesteps[-1] < REGULARISED_TIMESTEPS
    recorder = Recorder()
    watched = {name: recorder.processor(name) for name in layers} if regularise else {}
    with ExitStack() as own:
        (own if kept is None else kept).enter_context(processors(unet, watched))
        predicted = unet(noisy.to(dtype), batch.timesteps, text.to(dtype)).sample.float()
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    else:
        target = batch.noise
    size = batch.latents.shape[-2:]
    union = batch.masks.amax(dim=0)[None, None]  # 1 1 H W
    union = F.interpolate(union, tuple(size), mode="nearest")
    reconstruction = reconstruction_loss(predicted[-1:], target[-1:], union)
    loss = StepLoss(reconstruction, reconstruction)
    if batch.prior:
        loss.prior = F.mse_loss(predicted[:-1], target[:-1])
        loss.total = loss.total + prior_weight * loss.prior
    if regularise:
        term, weight = ATTENTION_LOSSES[attention_loss]
        for name in layers:
            grid = layer_grid(unet, tuple(size), name)
            goals = F.interpolate(batch.masks[None], grid, mode="bilinear", antialias=False)[0]
            columns = recorder.maps[name][-1, :, list(batch.positions)]  # n m
            for goal, column in zip(goals, columns.unbind(-1), strict=True):
                loss.attention.append(term(column.unflatten(0, grid), goal))
        loss.total = loss.total + attention_weight * weight * torch.stack(loss.attention).sum()
    return loss


# ----------------------------------------------------------------------------------------------
# data


@dataclass(frozen=True)
class View:
    """One draw of union sampling: the assets in prompt order, and whether all is mirrored."""

    assets: tuple[int, ...]
    flip: bool


def sample_view(count: int, generator: torch.Generator) -> View:
    """Draw a view of `count` assets: union sampling, and a mirror image half of the time.

    Three draws from the CPU `generator`, in this order: the subset's size, uniform in 1..count;
    a permutation of all assets, of which the first `size` are taken; the flip.
    """
    if count < 1:
        raise UserError(f"a view of {count} assets cannot be drawn; give at least one mask")
    size = int(torch.randint(1, count + 1, (), generator=generator))
    order = torch.randperm(count, generator=generator).tolist()
    flip = bool(torch.randint(0, 2, (), generator=generator))
    return View(assets=tuple(order[:size]), flip=flip)


class Views:
    """Random views of an instance, ready for a step. The picture is encoded once, and its mirror.

    Every draw comes from one CPU generator, in this order: the view, the timestep, the posterior,
    the noise; in stage 2 then the class sample, its timestep and its noise.
    """

    def __init__(
        self, base: StableDiffusion, instance: Instance, asset_ids: Sequence[int], device: str
    ):
        self.base, self.device, self.asset_ids = base, device, list(asset_ids)
        pixels = torch.from_numpy(instance.image).permute(2, 0, 1).float() / 127.5 - 1  # 3 H W
        with torch.no_grad():  # one by one, to spare memory
            codes = [
                base.vae.encode(way[None].to(base.vae.device)).latent_dist
                for way in (pixels, pixels.flip(-1))
            ]
            moments = [torch.cat([code.mean, code.std]).float().cpu() for code in codes]
        self.moments = torch.stack(moments)  # flip, (mean, deviation), c, h, w
        self.masks = torch.from_numpy(instance.masks.astype(np.float32))  # N H W
        self.scale = base.vae.config.scaling_factor

    def draw(self, generator: torch.Generator, prior: Tensor | None, class_prompt: str) -> Batch:
        """One step's batch; ``prior`` are class latents [i, c, h, w], scaled, or None."""
        view = sample_view(len(self.masks), generator)
        count = self.base.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, count, (1,), generator=generator)
        mean, deviation = self.moments[int(view.flip)]
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        latents = latents[None] * self.scale
        noise = torch.randn(latents.shape, generator=generator)
        prompts = [view_prompt(view.assets)]
        if prior is not None:
            index = int(torch.randint(0, len(prior), (1,), generator=generator))
            class_latents = prior[index : index + 1]
            latents = torch.cat([class_latents, latents])
            timesteps = torch.cat([torch.randint(0, count, (1,), generator=generator), timesteps])
            noise = torch.cat([torch.randn(class_latents.shape, generator=generator), noise])
            prompts = [class_prompt, *prompts]
        ids = torch.stack([encode_ids(self.base.tokenizer, prompt) for prompt in prompts])
        masks = self.masks[list(view.assets)]
        row = ids[-1].tolist()
        return Batch(
            latents=latents.to(self.device),
            noise=noise.to(self.device),
            timesteps=timesteps.to(self.device),
            input_ids=ids.to(self.device),
            masks=(masks.flip(-1) if view.flip else masks).to(self.device),
            positions=[row.index(self.asset_ids[asset]) for asset in view.assets],
            prior=prior is not None,
        )
