"""What toybox is trained on: scenes by their number, and their latents."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagelab.io.atomic import written_aside
from toybox.classifier.classifier import to_tensor
from toybox.scenes.scenes import Scene, draw_scene, render
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import TrainConfig

MAX_TOYS = 3


def scene_of(config: TrainConfig, index: int) -> Scene:
    """Training scene ``index``."""
    rng = np.random.default_rng((config.seed, index))
    return draw_scene(rng, kinds=config.kinds, odds=config.count_odds)


def encode_scenes(vae, config: TrainConfig, shape: ToyboxConfig, path: Path) -> dict[str, Tensor]:
    """Latents (posterior means, unscaled) [i, c, h, w] and toy coverage [i, toys, h, w], cached."""
    if path.exists():
        data = torch.load(path, weights_only=True)
        if data["latents"].shape[0] == config.scenes:
            return data
    size, latent = shape.resolution, shape.latent_size
    latents, coverage = [], []
    for start in tqdm(range(0, config.scenes, 64), "latents"):
        drawn = [
            render(scene_of(config, index), size)
            for index in range(start, min(start + 64, config.scenes))
        ]
        with torch.inference_mode():
            pixels = to_tensor([picture for picture, _ in drawn]).to(vae.device)
            means = vae.encode(pixels).latent_dist.mean
        latents.append(means.half().cpu())
        inside = torch.zeros(len(drawn), MAX_TOYS, size, size)
        for row, (_, masks) in zip(inside, drawn, strict=True):
            row[: len(masks)] = torch.from_numpy(masks)
        coverage.append(F.adaptive_avg_pool2d(inside, latent).half())
    data = {"latents": torch.cat(latents), "coverage": torch.cat(coverage)}
    with written_aside(path) as aside:
        torch.save(data, aside)
    return data
