"""A scene's pictures: painted in batches, saved with what makes them again."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imagelab.io.pictures import next_number, save_picture, save_sheet
from imagelab.models.base import DiffusionModel
from imagelab.processes import Processes
from imagelab.sampling import denoise, initial_noise, to_picture
from mifo.learned import merge_lora, portable
from mifo.method.control import BoxControl
from mifo.method.sampling import BoxSampling
from mifo.synthesis.scene import Scene


@torch.no_grad()
def prepare(scene: Scene) -> Tensor:
    """Move the scene's model to its device, its LoRA merged; states [2, k, d] of both prompts."""
    base, config = scene.base, scene.config
    merge_lora(base)  # a merged LoRA costs no time in a step
    base.unet.to(scene.device, scene.dtype)
    base.text_encoder.to(scene.device)
    base.vae.to(scene.device)
    return base.encode_text([config.negative_prompt, config.prompt]).to(scene.dtype)


def paint(scene: Scene, indices: Sequence[int], text: Tensor, bar=None) -> list[Image.Image]:
    """Pictures ``indices`` of a scene, as one batch; picture i has the seed ``seed + i``.

    Args:
        text: what :func:`prepare` returned.
        bar: a progress bar, moved on by one a step.
    """
    config, base = scene.config, scene.base
    seeds = [config.seed + index for index in indices]
    noise = initial_noise((base.latent_channels, *scene.size), seeds).to(scene.device)
    steps, boxed = config.num_inference_steps, None
    if scene.tokens is not None:
        control = BoxControl(base.unet, scene.tokens, scene.boxes, scene.size, seeds)
        boxed = BoxSampling(base, control, text[1:], steps, config.guidance)

    def on_step(_) -> None:
        if bar is not None:
            bar.update(1)

    return decode(base, denoise(base, noise, text, steps, config.guidance_scale, boxed, on_step))


@torch.no_grad()
def decode(base: DiffusionModel, latents: Tensor) -> list[Image.Image]:
    """Latents [b, c, h, w] as RGB pictures, decoded one by one to save memory."""
    return [to_picture(base.decode(sample[None])[0]) for sample in latents]


def synthesise(scene: Scene, folder: Path, processes: Processes) -> list[Path]:
    """Paint all pictures of a scene into a folder; the paths of the PNGs, then the sheet's.

    Each PNG carries its settings in its text and in a JSON beside it. Numbers go on from those in
    the folder, and no file is ever replaced. Processes share the pictures; the first one returns
    all paths, the others none.
    """
    config = scene.config
    text = prepare(scene)
    folder.mkdir(parents=True, exist_ok=True)
    first = processes.agree(next_number(folder))
    size = config.runtime.batch_size
    mine = processes.share(range(config.num_images or size))
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    saved: dict[int, Path] = {}
    total = len(batches) * config.num_inference_steps
    with tqdm(total=total, desc="synthesis", unit="step", disable=not processes.is_first) as bar:
        for indices in batches:
            for index, picture in zip(indices, paint(scene, indices, text, bar), strict=True):
                facts = describe(scene, index)
                saved[index] = save_painting(folder, first + index, picture, facts)
    everyone = {i: path for part in processes.gather(saved) for i, path in part.items()}
    if not processes.is_first:
        return []
    paths = [everyone[index] for index in sorted(everyone)]
    return [*paths, save_sheet(paths, scene.boxes, scene.names)]


def describe(scene: Scene, index: int) -> dict:
    """The facts, for JSON, that make picture ``index`` again."""
    settings = scene.config.settings()
    return {
        "settings": settings | {"seed": scene.config.seed + index, "num_images": 1},
        "origins": scene.origins,
        "subjects": list(scene.names),
        "boxes": [list(box) for box in scene.boxes],
        "subject_token_indices": [list(s) for s in scene.tokens.subjects] if scene.tokens else [],
        "base_model": {"source": scene.base.source, "sha256": scene.base.digest},
        "device": scene.device,
        "precision": str(scene.dtype).removeprefix("torch."),
    }


def save_painting(folder: Path, number: int, picture: Image.Image, facts: dict) -> Path:
    """Save a numbered picture with its facts, which the PNG carries without the user's folders."""
    words = {"mifo": json.dumps(portable(facts)), "prompt": facts["settings"]["prompt"]}
    return save_picture(folder, number, picture, facts, words)
