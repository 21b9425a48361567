"""What a toybox model is measured by: its autoencoder, what it draws, where its words look.

Axes: b batch, n pixels of a map, t tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagelab.attention import Recorder, attention_layers, pixel_grids, processors
from imagelab.models.loading import quiet_libraries
from imagelab.models.sources import check_folder
from toybox.classifier.network import (
    SCENE,
    Classifier,
    Reading,
    hue_names,
    to_input,
    to_tensor,
)
from toybox.scenes.scenes import caption, draw_scene, render
from toybox.scenes.toys import KINDS, Look
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.data import scene_of

STEPS, GUIDANCE, NOISED_TO, BATCH = 25, 5.0, 300, 32


class Prompt(NamedTuple):
    """A caption that names every toy's hue, and the toys."""

    text: str
    looks: tuple[Look, ...]


def draw_prompts(seed: int, images: int, toys: int, kinds: Sequence[str] = KINDS) -> list[Prompt]:
    """Captions of invented scenes of ``toys`` toys of different kinds."""
    prompts = []
    rng = np.random.default_rng((seed, 999, toys))
    while len(prompts) < images:
        scene = draw_scene(rng, toys, kinds)
        looks = tuple(placed.look for placed in scene.toys)
        text = caption(scene, rng).text
        coloured = all(look.colour in text.split() for look in looks)
        if coloured and len({look.kind for look in looks}) == toys:
            prompts.append(Prompt(text, looks))
    return prompts


def load_pipeline(folder: Path):
    """Plain diffusers' pipeline, in float32 on the CPU."""
    quiet_libraries()
    check_folder(folder)
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


def sample(pipeline, prompts: list[Prompt], seed: int, name: str) -> list[Image.Image]:
    """A picture for each prompt; picture i starts from the noise of ``seed + i``."""
    pictures = []
    for start in tqdm(range(0, len(prompts), BATCH), name):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
        made = pipeline(texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=draws)
        pictures += made.images
    return pictures


# ----------------------------------------------------------------------------------------------
# what a picture shows


def judge_one(seen: Reading, prompts: list[Prompt]) -> dict[str, list[bool]]:
    """Is the kind that covers most, and is the toys' hue, the one asked for?"""
    kinds, named = seen.kind().tolist(), hue_names(seen.hue)
    looks = [prompt.looks[0] for prompt in prompts]
    return {
        "kind": [KINDS[k] == look.kind for k, look in zip(kinds, looks, strict=True)],
        "hue": [name == look.colour for name, look in zip(named, looks, strict=True)],
    }


def judge_two(seen: Reading, prompts: list[Prompt]) -> dict[str, list[bool]]:
    """Are both kinds there, and is each of its own hue?"""
    present = seen.present(2)
    kinds = [
        found == {look.kind for look in prompt.looks}
        for found, prompt in zip(present, prompts, strict=True)
    ]
    hues = []
    for row, right, prompt in zip(seen.hues, kinds, prompts, strict=True):
        named = hue_names(row[[KINDS.index(look.kind) for look in prompt.looks]])
        hues.append(right and named == [look.colour for look in prompt.looks])
    return {"kinds": kinds, "hues": hues}


def shares(judged: dict[str, list[bool]]) -> dict[str, float]:
    return {key: sum(right) / len(right) for key, right in judged.items()}


def shares_by_kind(right: list[bool], prompts: list[Prompt]) -> dict[str, float]:
    """Share of right pictures of each kind asked for."""
    groups = defaultdict(list)
    for one, prompt in zip(right, prompts, strict=True):
        groups[prompt.looks[0].kind].append(one)
    return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}


def judge_renders(
    pipeline, classifier: Classifier, size: int, seed: int, images: int, kinds: Sequence[str]
) -> dict[str, float]:
    """The classifier's right answers on rendered scenes that went through the autoencoder."""
    result = {}
    for toys, judge in ((1, judge_one), (2, judge_two)):
        rng = np.random.default_rng((seed, 999, 10 + toys))
        prompts, pictures = [], []
        while len(prompts) < images:
            scene = draw_scene(rng, toys, kinds)
            prompt = Prompt("", tuple(placed.look for placed in scene.toys))
            if len({look.kind for look in prompt.looks}) == toys:
                prompts.append(prompt)
                pictures.append(render(scene, size)[0])
        restored = []
        for start in range(0, images, BATCH):
            pixels = to_tensor(pictures[start : start + BATCH]).to(pipeline.device)
            with torch.inference_mode():
                latents = pipeline.vae.encode(pixels).latent_dist.mean
                decoded = pipeline.vae.decode(latents).sample
            restored += pipeline.image_processor.postprocess(decoded, output_type="pil")
        result |= shares(judge(classifier.read(to_input(restored, SCENE)), prompts))
    return result


# ----------------------------------------------------------------------------------------------
# grounding


def auc(scores: Tensor, inside: Tensor) -> float:
    """Probability that a pixel inside scores higher than one outside (ties count half).

    ``scores`` and ``inside`` (bool) are [n].
    """
    within, without = scores[inside], scores[~inside].sort().values
    below = torch.searchsorted(without, within, right=False)
    not_above = torch.searchsorted(without, within, right=True)
    return ((below + not_above) / (2 * len(without))).mean().item()


def word_maps(pipeline, pictures: list[Image.Image], texts: list[str], seed: int) -> Tensor:
    """Cross-attention at decoder-1 of noised pictures, [b, t, h, w] at the pictures' size.

    Mean over layers and heads; timestep 300.
    """
    unet, scheduler, device = pipeline.unet, pipeline.scheduler, pipeline.device
    recorder = Recorder()
    watched = [name for name in attention_layers(unet, "cross") if name.startswith("up_blocks.1.")]
    pixels = to_tensor(pictures).to(device)
    with torch.inference_mode(), processors(unet, {n: recorder.processor(n) for n in watched}):
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        steps = torch.full((len(pictures),), NOISED_TO, device=device)
        noisy = scheduler.add_noise(latents, noise.to(device), steps)
        ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        unet(noisy, steps, pipeline.text_encoder(ids.to(device)).last_hidden_state)
    maps = torch.stack([recorder.maps[name] for name in watched]).mean(0)  # [b, n, t]
    grid = pixel_grids(unet, latents.shape[-2:])[maps.shape[1]]
    maps = maps.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, pixels.shape[-2:], mode="bilinear").cpu()


def noun_token(tokenizer, text: str, word: int) -> int:
    """Position of the last token of a text's word."""
    return len(tokenizer(" ".join(text.split()[: word + 1])).input_ids) - 2  # the end token


def grounding(
    pipeline, size: int, seed: int, scenes: int, kinds: Sequence[str]
) -> dict[str, float]:
    """Mean AUC of each named toy's map against its mask; look-alikes of one kind apart."""
    rng = np.random.default_rng((seed, 999, 20))
    found = {"auc": [], "auc_alike": []}
    for start in tqdm(range(0, scenes, BATCH), "grounding"):
        drawn = [draw_scene(rng, None, kinds) for _ in range(min(BATCH, scenes - start))]
        worded = [caption(scene, rng) for scene in drawn]
        pictures, masks = zip(*(render(scene, size) for scene in drawn), strict=True)
        texts = [one.text for one in worded]
        maps = word_maps(pipeline, list(pictures), texts, seed + start)
        for scene, one, mask, rows in zip(drawn, worded, masks, maps, strict=True):
            shown = [placed.look.kind for placed in scene.toys]
            for toy, word in zip(one.toys, one.nouns, strict=True):
                token = noun_token(pipeline.tokenizer, one.text, word)
                key = "auc" if shown.count(shown[toy]) == 1 else "auc_alike"
                inside = torch.from_numpy(mask[toy]).flatten()
                found[key].append(auc(rows[token].flatten(), inside))
    return {key: float(np.mean(values)) for key, values in found.items() if values}


def psnr(vae, config: TrainConfig, shape: ToyboxConfig, count: int = 128) -> float:
    """Mean PSNR in dB of held-out scenes through the autoencoder (8-bit range)."""
    held_out = replace(config, seed=config.seed + 999)
    scenes = [scene_of(held_out, index) for index in range(count)]
    images = to_tensor([render(scene, shape.resolution)[0] for scene in scenes]).to(vae.device)
    with torch.inference_mode():
        restored = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = ((restored - images) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())
