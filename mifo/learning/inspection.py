"""What the learned assets attend to: their maps over the instance's picture, and how they part."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import Recorder, pixel_grids, processors
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learning.objective import Views, supervised_layers
from imagelab.prompts import encode_ids
from mifo.tokens import view_prompt

TIMESTEP = 300


@torch.no_grad()
def asset_maps(base: StableDiffusion, views: Views, count: int) -> Tensor:
    """Cross-attention of every asset over the instance's own picture, float [assets, H, W].

    All assets are in one prompt; the picture is noised to timestep 300 with fixed noise; mean over
    heads and the layers at decoder-1's resolution, enlarged to the picture's size.
    """
    unet, device = base.unet, views.device
    latents = (views.moments[0, 0] * views.scale)[None].to(device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    timestep = torch.tensor([TIMESTEP], device=device)
    noisy = base.scheduler.add_noise(latents, noise, timestep)
    ids = encode_ids(base.tokenizer, view_prompt(tuple(range(count))))
    text = base.text_encoder(ids[None].to(device)).last_hidden_state
    layers = supervised_layers(unet, tuple(latents.shape[-2:]), stage=2)
    recorder = Recorder()
    with processors(unet, {name: recorder.processor(name) for name in layers}):
        unet(noisy.to(unet.dtype), timestep, text.to(unet.dtype))
    mean = torch.stack(list(recorder.maps.values())).mean(0)[0]  # n k
    row = ids.tolist()
    columns = [row.index(views.asset_ids[asset]) for asset in range(count)]
    grid = pixel_grids(unet, tuple(latents.shape[-2:]))[len(mean)]
    maps = mean[:, columns].T.unflatten(-1, grid)[None]
    return F.interpolate(maps, views.masks.shape[-2:], mode="bilinear")[0].cpu()


def separation(maps: Tensor, masks: np.ndarray) -> list[float]:
    """Of each asset's mean attention on the instances, the share on its own; 1 is perfect.

    maps: [assets, H, W] ≥ 0; masks: bool [assets, H, W].
    """
    inside = torch.from_numpy(masks).float()
    density = torch.einsum("ahw,mhw->am", maps, inside) / inside.sum((1, 2)).clamp_min(1)
    return (density.diagonal() / density.sum(1).clamp_min(1e-12)).tolist()
