"""Class images for prior preservation: made once by the base model, kept as latents."""

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
from imagelab.models.stable_diffusion import StableDiffusion
from imagelab.prompts import encode_ids
from imagelab.sampling import denoise, initial_noise
from mifo_lora import LoraError
from mifo_lora import read_lora as read_tensors
from mifo_lora import save_lora as save_tensors

log = logging.getLogger(__name__)
STEPS, GUIDANCE_SCALE = 25, 7.5
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def class_latents(
    base: StableDiffusion,
    prompt: str,
    count: int,
    size: tuple[int, int],
    seed: int,
    batch: int,
    cache: Path,
    after_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Scaled latents [count, c, *size] of pictures of ``prompt``, made by the base model.

    Picture i starts from noise of seed + i. They are read from ``cache`` where the same model,
    prompt, seed, size and settings left them; a larger cached set serves a smaller count.
    ``after_batch`` is called once a batch is in the cache, and may raise to stop.
    """
    key = [base.digest, prompt, seed, list(size), STEPS, GUIDANCE_SCALE, str(base.unet.dtype)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache / f"{name}.safetensors"
    found = _read_cache(path)
    done = 0 if found is None else len(found)
    if done >= count:
        log.info("class images: %d from %s", count, path)
        return found[:count]
    device, dtype = base.unet.device, base.unet.dtype
    ids = torch.stack([encode_ids(base.tokenizer, text) for text in ("", prompt)])
    with torch.no_grad():
        text = base.text_encoder(ids.to(device)).last_hidden_state.to(dtype)
    channels = base.unet.config.in_channels
    made = [] if found is None else [found]
    with tqdm(total=count, initial=done, desc="class images", unit="image") as progress:
        for start in range(done, count, batch):
            seeds = range(seed + start, seed + min(start + batch, count))
            noise = initial_noise((channels, *size), seeds).to(device)
            made.append(denoise(base, noise, text, STEPS, GUIDANCE_SCALE).float().cpu())
            progress.update(len(seeds))
            _write_cache(path, torch.cat(made), prompt)
            if after_batch:
                after_batch()
    return torch.cat(made)


def _read_cache(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        return read_tensors(path)[0]["latents"]
    except (LoraError, KeyError) as error:
        raise UserError(f"the kept class images cannot be read; delete {path}") from error


def _write_cache(path: Path, latents: Tensor, prompt: str) -> None:
    """Keep a set, unless another process has kept more of the same in the meantime."""
    kept = _read_cache(path)
    if kept is None or len(kept) < len(latents):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"latents": latents}, {"prompt": prompt})


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
def encode_class_images(base: StableDiffusion, paths: list[Path], size: tuple[int, int]) -> Tensor:
    """Scaled latents [i, c, *size] of pictures, each fitted to the size by a central crop."""
    latents = []
    pixels = (size[1] * base.vae_factor, size[0] * base.vae_factor)
    for path in tqdm(paths, "class images", unit="image"):
        picture = ImageOps.fit(read_image(path), pixels)
        tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
        tensor = (tensor.float() / 127.5 - 1).to(base.vae.device)
        latents.append(base.vae.encode(tensor).latent_dist.mean.float().cpu())
    return torch.cat(latents) * base.vae.config.scaling_factor
