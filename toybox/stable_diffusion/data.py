"""What toybox is trained on: scenes by their number, their latents and their captions.

Axes: i scenes, v captions of a scene, l toys (up to :data:`MAX_TOYS`), t tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.tensors import read_tensors, write_tensors
from toybox.scenes.scenes import Caption, Scene, caption, draw_scene, render
from toybox.scenes.toys import KINDS
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.looks import with_free_looks

MAX_TOYS = 3
MAX_TOKENS = 32  # of a caption, with the start and the end token
CHUNK = 64  # scenes that are rendered and encoded together


def scene_of(config: TrainConfig, index: int) -> Scene:
    """Training scene ``index``."""
    rng = np.random.default_rng((config.seed, index))
    kinds, shares = config.kinds, config.shares
    scene = draw_scene(rng, kinds=kinds, odds=config.count_odds, shares=shares)
    if config.free_looks and rng.random() < config.free_looks:
        scene = with_free_looks(scene, rng, kinds, shares)
    return scene


def draw_caption(
    config: TrainConfig, scene: Scene, rng: np.random.Generator
) -> tuple[Caption, set[int]]:
    """A caption of a scene, and the toys that it names by placeholders."""
    draw, learned = rng.random(), set()
    if draw < config.placeholders:
        learned = set(range(len(scene.toys)))
    elif draw < config.placeholders + config.mixed:
        learned = {toy for toy in range(len(scene.toys)) if rng.random() < 0.5}
    return caption(scene, rng, config.bare_captions, learned, config.near_hue), learned


class Words:
    """From captions to tokens, with a vocabulary in which every word is one token."""

    def __init__(self, tokenizer):
        self.ids: Mapping[str, int] = tokenizer.get_vocab()
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id

    def encode(self, worded: Caption, learned: set[int]) -> tuple[list[int], list[int], list[int]]:
        """Tokens [t] of a caption, slots [t] and the position [l] of the token of each toy's noun.

        Slots are 1 + l at the placeholder of toy l, 0 elsewhere; a placeholder's own token is a
        padding one, since its embedding is put in its place.
        """
        words = worded.text.split()
        nouns = [0] * MAX_TOYS
        slots = [0] * (len(words) + 2)
        for toy, word in zip(worded.toys, worded.nouns, strict=True):
            nouns[toy] = 1 + word
            if toy in learned:
                slots[1 + word] = 1 + toy
        tokens = [self.start, *map(self._id, words), self.end]
        return tokens, slots, nouns

    def _id(self, word: str) -> int:
        if word.startswith("<asset"):
            return self.pad
        try:
            return self.ids[word + "</w>"]
        except KeyError:
            raise UserError(
                f"the vocabulary has no single token for {word!r}; begin from a folder whose "
                "vocabulary knows the words of all captions"
            ) from None


class RenderedScenes(Dataset):
    """Chunks of rendered scenes and what captions say of them, as NumPy arrays by name."""

    def __init__(self, config: TrainConfig, shape: ToyboxConfig, words: Words):
        self.config, self.words = config, words
        self.size, self.latent = shape.resolution, shape.latent_size

    def __len__(self) -> int:
        return -(-self.config.scenes // CHUNK)

    def __getitem__(self, chunk: int) -> dict[str, np.ndarray]:
        start = chunk * CHUNK
        indices = range(start, min(start + CHUNK, self.config.scenes))
        scenes = [scene_of(self.config, index) for index in indices]
        return self._pictures(scenes) | self._looks(scenes) | self._captions(scenes, indices)

    def _pictures(self, scenes: list[Scene]) -> dict[str, np.ndarray]:
        """Toys are recoloured at the pictures' size: it takes a quarter of the time or less."""
        pictures = np.zeros((len(scenes), self.size, self.size, 3), np.uint8)
        coverage = np.zeros((len(scenes), MAX_TOYS, self.latent, self.latent), np.float16)
        cell = self.size // self.latent
        for row, scene in enumerate(scenes):
            pictures[row], masks = render(scene, self.size, sprites=self.size)
            cells = masks.reshape(len(masks), self.latent, cell, self.latent, cell)
            coverage[row, : len(masks)] = cells.mean((2, 4))
        return {"pictures": pictures, "coverage": coverage}

    def _looks(self, scenes: list[Scene]) -> dict[str, np.ndarray]:
        kinds = np.zeros((len(scenes), MAX_TOYS), np.uint8)
        numbers = np.ones((len(scenes), MAX_TOYS, 3), np.float32)
        for row, scene in enumerate(scenes):
            for toy, placed in enumerate(scene.toys):
                look = placed.look
                kinds[row, toy] = KINDS.index(look.kind)
                numbers[row, toy] = look.hue, look.saturation, look.value
        return {"kinds": kinds, "looks": numbers}

    def _captions(self, scenes: list[Scene], indices: range) -> dict[str, np.ndarray]:
        several = (len(scenes), self.config.captions)
        ids = np.full((*several, MAX_TOKENS), self.words.pad, np.int16)
        slots = np.zeros((*several, MAX_TOKENS), np.int8)
        nouns = np.zeros((*several, MAX_TOYS), np.int8)
        for row, (scene, index) in enumerate(zip(scenes, indices, strict=True)):
            rng = np.random.default_rng((self.config.seed, index, 1))
            for one in range(self.config.captions):
                tokens, placed, named = self.words.encode(*draw_caption(self.config, scene, rng))
                ids[row, one, : len(tokens)] = tokens
                slots[row, one, : len(placed)] = placed
                nouns[row, one] = named
        return {"ids": ids, "slots": slots, "nouns": nouns}


def encode_scenes(
    vae, config: TrainConfig, shape: ToyboxConfig, path: Path, tokenizer, workers: int = 0
) -> dict[str, Tensor]:
    """What the UNet learns from, cached in a file.

    Args:
        vae: the trained autoencoder, on the device that is to encode.
        workers: processes that render; 0: this one. The result is the same.

    Returns:
        ``latents``: [i, c, h, w] posterior means, unscaled; with ``config.mirrored``, those of the
        mirrored pictures follow, [2·i, ...].
        ``coverage``: [i, l, h, w] share of each latent pixel that a toy covers.
        ``kinds``: [i, l] indices in KINDS; ``looks``: [i, l, 3] hue in degrees and gains of
        saturation and value.
        ``ids``, ``slots``: [i, v, t], ``nouns``: [i, v, l]; see :meth:`Words.encode`.
    """
    if path.exists():
        data, _ = read_tensors(path, "remove it", finite=False)
        if len(data["coverage"]) == config.scenes:
            return data
    rendered = DataLoader(
        RenderedScenes(config, shape, Words(tokenizer)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    latents, parts = [[], []], {}
    for chunk in tqdm(rendered, "scenes", unit=" scenes", unit_scale=CHUNK):
        pixels = torch.from_numpy(chunk.pop("pictures")).to(vae.device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        latents[0].append(_means(vae, pixels))
        if config.mirrored:
            latents[1].append(_means(vae, pixels.flip(-1)))
        for name, array in chunk.items():
            parts.setdefault(name, []).append(torch.from_numpy(array))
    data = {name: torch.cat(several) for name, several in parts.items()}
    data["latents"] = torch.cat(latents[0] + latents[1])
    write_tensors(path, data)
    return data


def _as_it_is(chunk):
    """Keep NumPy arrays: as tensors they would go through shared memory, which may be small."""
    return chunk


@torch.inference_mode()
def _means(vae, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.mean.half().cpu().contiguous()  # as files keep it
