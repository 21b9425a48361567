"""Class images for prior preservation: made once by the base model, kept as latents.

They are made at the release's guidance, 7.5, with whatever model: the number that a model may bring
in its ``mifo_config.json`` is for what is painted.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.images import read_image
from imagelab.io.tensors import read_tensors, write_tensors
from imagelab.models.base import DiffusionModel
from imagelab.sampling import denoise, initial_noise
from imagelab.training.seeds import seed_for

log = logging.getLogger(__name__)
STEPS, GUIDANCE_SCALE = 25, 7.5
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def class_latents(
    model: DiffusionModel,
    prompt: str,
    count: int,
    size: tuple[int, int],
    seed: int,
    batch: int,
    cache: Path,
    after_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Scaled latents [count, c, *size] of pictures of ``prompt``, made by the base model.

    Each picture has a seed of its own. They are read from ``cache`` where the same model, prompt,
    seed, size and settings left them; a larger cached set serves a smaller count. ``after_batch``
    is called once a batch is in the cache, and may raise to stop.
    """
    key = [
        model.digest,
        model.configs,
        prompt,
        seed,
        list(size),
        STEPS,
        GUIDANCE_SCALE,
        str(model.dtype),
        "labelled",
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache / f"{name}.safetensors"
    found = _read_cache(path)
    done = 0 if found is None else len(found)
    if done >= count:
        log.info("class images: %d from %s", count, path)
        return found[:count]
    with torch.no_grad():
        text = model.encode_text(["", prompt])
    made = [] if found is None else [found]
    with tqdm(total=count, initial=done, desc="class images", unit="image") as progress:
        for start in range(done, count, batch):
            indices = range(start, min(start + batch, count))
            seeds = [seed_for(seed, "class image", index) for index in indices]
            noise = initial_noise((model.latent_channels, *size), seeds).to(model.device)
            made.append(denoise(model, noise, text, STEPS, GUIDANCE_SCALE).float().cpu())
            progress.update(len(seeds))
            _write_cache(path, torch.cat(made), prompt)
            if after_batch:
                after_batch()
    return torch.cat(made)


def _read_cache(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    tensors, _ = read_tensors(path, f"delete {path}")
    if "latents" not in tensors:
        raise UserError(f"{path} holds no class images; delete {path}")
    return tensors["latents"]


def _write_cache(path: Path, latents: Tensor, prompt: str) -> None:
    """Keep a set, unless another process has kept more of the same in the meantime."""
    kept = _read_cache(path)
    if kept is None or len(kept) < len(latents):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"latents": latents}, {"prompt": prompt})


def find_class_images(folder: str) -> list[Path]:
    """The user's own pictures of the class; a UserError when there are none, or one is broken."""
    path = Path(folder)
    found = sorted(p for p in path.glob("*") if p.suffix.lower() in PICTURES)
    if not found:
        raise UserError(
            f"--class_images: {folder} holds no pictures; give a folder of {', '.join(PICTURES)} "
            "files, or leave the option out to have them made"
        )
    for file in found:
        read_image(file)
    return found


@torch.no_grad()
def encode_class_images(
    model: DiffusionModel,
    paths: list[Path],
    size: tuple[int, int],
    after_picture: Callable[[], None] | None = None,
) -> Tensor:
    """Scaled latents [i, c, *size] of pictures, each fitted to the size by a central crop.

    ``after_picture`` is called once each is encoded, and may raise to stop.
    """
    latents = []
    width, height = (side * model.vae_factor for side in reversed(size))
    for path in tqdm(paths, "class images", unit="image"):
        picture = ImageOps.fit(read_image(path), (width, height))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # h w 3 -> 1 3 h w
        latents.append(model.encode(pixels.float() / 127.5 - 1).mean.cpu())
        if after_picture:
            after_picture()
    return torch.cat(latents)
