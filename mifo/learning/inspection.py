"""What the learned assets attend to: their maps over the instance's picture, and how they part."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import Recorder, layer_grid, processors
from imagelab.models.stable_diffusion import StableDiffusion
from imagelab.prompts import encode_ids
from mifo.learning.views import Views
from mifo.method.layers import supervised_layers
from mifo.tokens import view_prompt

TIMESTEP = 300


@torch.no_grad()
def asset_maps(model: StableDiffusion, views: Views, count: int) -> Tensor:
    """Cross-attention of every asset over the instance's own picture, float [assets, H, W].

    All assets are in one prompt; the picture is noised to timestep 300 with fixed noise; mean over
    heads and the layers at decoder-1's resolution, enlarged to the picture's size.
    """
    latents = views.moments[0, 0][None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([TIMESTEP])
    noisy = model.scheduler.add_noise(latents, noise, timestep).to(views.device)
    prompt = view_prompt(tuple(range(count)))
    layers = supervised_layers(model.unet, views.size, stage=2)
    recorder = Recorder()
    with processors(model.unet, {name: recorder.processor(name) for name in layers}):
        model.predict(noisy, timestep.to(views.device), model.encode_text([prompt]))
    mean = torch.stack(list(recorder.maps.values())).mean(0)[0]  # n k
    row = encode_ids(model.tokenizer, prompt).tolist()
    columns = [row.index(views.asset_ids[asset]) for asset in range(count)]
    grid = layer_grid(model.unet, views.size, layers[0])
    maps = mean[:, columns].T.unflatten(1, grid)[None]  # 1 assets rows columns
    return F.interpolate(maps, views.masks.shape[-2:], mode="bilinear")[0].cpu()


def separation(maps: Tensor, masks: np.ndarray) -> list[float]:
    """Of each asset's mean attention on the instances, the share on its own; 1 is perfect.

    maps: [assets, H, W] ≥ 0; masks: bool [assets, H, W].
    """
    inside = torch.from_numpy(masks).float()
    density = torch.einsum("ahw,mhw->am", maps, inside) / inside.sum((1, 2)).clamp_min(1)
    return (density.diagonal() / density.sum(1).clamp_min(1e-12)).tolist()
