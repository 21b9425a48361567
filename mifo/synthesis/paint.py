"""A scene's pictures: painted in batches, saved with what makes them again."""

import json
from collections.abc import Iterator, Sequence
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


def paint_all(
    scene: Scene, indices: Sequence[int], text: Tensor, is_shown: bool = True
) -> Iterator[tuple[int, Image.Image]]:
    """Pictures ``indices`` of a scene in batches, each with its index as soon as its batch is done.

    Args:
        text: what :func:`prepare` returned.
        is_shown: whether a progress bar is.
    """
    size, steps = scene.config.runtime.batch_size, scene.config.num_inference_steps
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    total = len(batches) * steps
    with tqdm(total=total, desc="synthesis", unit="step", disable=not is_shown) as bar:
        for batch in batches:
            yield from zip(batch, paint(scene, batch, text, bar), strict=True)


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
    text = prepare(scene)
    folder.mkdir(parents=True, exist_ok=True)
    first = processes.agree(next_number(folder))
    mine = processes.share(range(scene.config.picture_count))
    saved: dict[int, Path] = {}
    for index, picture in paint_all(scene, mine, text, processes.is_first):
        saved[index] = save_painting(folder, first + index, picture, describe(scene, index))
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
