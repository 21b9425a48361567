"""What a step of training is fed; every draw depends on the seed and the step alone.

Axes: b batch, l toys (up to three), t tokens, w width of the embeddings, c channels.
"""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagelab.processes import Processes
from toybox.classifier.network import to_tensor
from toybox.scenes.scenes import render
from toybox.stable_diffusion.architecture import ToyboxConfig, build_scheduler
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.data import MAX_TOYS, scene_of
from toybox.stable_diffusion.looks import features


def generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of a step's noise."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


# ----------------------------------------------------------------------------------------------
# the autoencoder's


class Pictures:
    """Rendered scenes, of which the autoencoder sees crops, and its decoder the whole.

    A batch is this process's part, float [b, 3, h, w] in [-1, 1], on its device.
    """

    def __init__(self, config: TrainConfig, shape: ToyboxConfig, processes: Processes):
        self.config, self.size, self.processes = config, shape.resolution, processes

    @cached_property
    def _rendered(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures, uint8 [n, h, w, 3], and where toys are, bool [n, h, w]."""
        config = replace(self.config, seed=self.config.seed + 1)
        drawn = [
            render(scene_of(config, index), self.size)
            for index in tqdm(range(config.vae_scenes), "scenes")
        ]
        pixels = np.stack([np.asarray(picture) for picture, _ in drawn])
        return pixels, np.stack([masks.any(axis=0) for _, masks in drawn])

    def crops(self, step: int) -> Tensor:
        """Crops of random scenes, half of them centred on a toy's pixel."""
        pixels, toys = self._rendered
        crop, room = self.config.vae_crop, self.size - self.config.vae_crop
        rng = np.random.default_rng((self.config.seed, step))
        cut = []
        for i in rng.integers(len(pixels), size=self.config.vae_batch):
            corner = rng.integers(0, room + 1, 2)
            rows, columns = np.nonzero(toys[i])
            if rng.random() < 0.5 and len(rows):
                at = rng.integers(len(rows))
                corner = np.clip([rows[at], columns[at]] - np.array(crop // 2), 0, room)
            y, x = corner
            cut.append(pixels[i, y : y + crop, x : x + crop])
        return self._part(to_tensor(cut))

    def scenes(self, step: int) -> Tensor:
        """Random scenes as they are."""
        pixels, _ = self._rendered
        rng = np.random.default_rng((self.config.seed, step))
        chosen = rng.integers(len(pixels), size=self.config.decoder_batch)
        return self._part(to_tensor(pixels[chosen]))

    def draw_latents(self, posterior, step: int) -> Tensor:
        """A sample [b, c, h, w] of the posterior of this process's part of a batch."""
        mean = posterior.mean
        size = len(mean) * self.processes.count
        noise = torch.randn(size, *mean.shape[1:], generator=generator(self.config.seed, step))
        return mean + posterior.std * self._part(noise)

    def _part(self, batch: Tensor) -> Tensor:
        return self.processes.share(batch).to(self.processes.device)


# ----------------------------------------------------------------------------------------------
# the UNet's


class Batch(NamedTuple):
    """The tensors of a step; their shapes are the same in every step."""

    latents: Tensor  # [b, c, h, w], scaled
    coverage: Tensor  # [b, l, h, w] share of each latent pixel that a toy covers
    ids: Tensor  # [b, t]
    slots: Tensor  # [b, t], 1 + l at the placeholder of toy l, 0 elsewhere
    nouns: Tensor  # [b, l] position of the token that names each toy; 0 for none
    looks: Tensor  # [b, l, features]
    named: Tensor  # [b, l] 1 for the toys whose noun is grounded, 0 for the others
    count: Tensor  # [] how many those are in a process's part, on average; at least 1 in all
    blur: Tensor  # [b, l, w] noise of the placeholders' embeddings
    share: Tensor  # [b, l, 1] its share
    noise: Tensor  # [b, c, h, w]
    timesteps: Tensor  # [b]


class Batches:
    """``batches(step)`` is this process's part of the batch of a step. The data lie on its device.

    Args:
        data: what ``encode_scenes`` returns; ``scale`` multiplies its latents.
        width: of the text encoder's embeddings.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: dict[str, Tensor],
        scale: float,
        tokenizer,
        width: int,
        processes: Processes,
    ):
        self.config, self.processes, self.scale, self.width = config, processes, scale, width
        self.data = {name: tensor.to(processes.device) for name, tensor in data.items()}
        silence = tokenizer("", padding="max_length", return_tensors="pt").input_ids
        self.silence = silence[0].to(processes.device)  # [t]
        self.pad = tokenizer.pad_token_id
        self.timesteps = build_scheduler().config.num_train_timesteps

    def __call__(self, step: int) -> Batch:
        rows, mirrored, chosen, silent = self._choose(step)
        noise = self._draw_noise(step)
        named = self.data["nouns"][rows, chosen] * ~silent[:, None] > 0
        named &= (noise[-1] < self.config.grounding_timesteps)[:, None]
        count = named.sum().clamp_min(1) / self.processes.count
        part = self.processes.share
        rows = part(rows)
        return Batch(
            *self._scenes(rows, part(mirrored)),
            *self._captions(rows, part(chosen), part(silent)),
            part(named).float(),
            count,
            *map(part, noise),
        )

    def _choose(self, step: int) -> tuple[Tensor, ...]:
        """Of the whole batch: scenes, are they mirrored, captions, are these left out."""
        config, size = self.config, self.config.batch
        rng = np.random.default_rng((config.seed, 7, step))
        rows = rng.integers(config.scenes, size=size)
        mirrored = rng.integers(2, size=size) * config.mirrored
        chosen = rng.integers(config.captions, size=size)
        silent = rng.random(size) < config.caption_dropout
        drawn = torch.from_numpy(np.stack([rows, mirrored, chosen, silent]))
        rows, mirrored, chosen, silent = drawn.to(self.processes.device)
        return rows, mirrored > 0, chosen, silent > 0

    def _scenes(self, rows: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.data["latents"][rows + self.config.scenes * mirrored].float() * self.scale
        coverage = self.data["coverage"][rows].float()
        return latents, torch.where(mirrored[:, None, None, None], coverage.flip(-1), coverage)

    def _captions(self, rows: Tensor, chosen: Tensor, silent: Tensor) -> tuple[Tensor, ...]:
        """Tokens, slots, nouns and looks; of those without a caption, the empty text."""
        ids, slots, nouns = (self.data[k][rows, chosen].long() for k in ("ids", "slots", "nouns"))
        more = len(self.silence) - ids.shape[1]
        ids, slots = F.pad(ids, (0, more), value=self.pad), F.pad(slots, (0, more))
        heard = ~silent[:, None]
        ids = torch.where(heard, ids, self.silence)
        looks = features(self.data["kinds"][rows], self.data["looks"][rows])
        return ids, slots * heard, nouns * heard, looks

    def _draw_noise(self, step: int) -> tuple[Tensor, ...]:
        """Of the whole batch: noise and its share in placeholders, noise and timesteps of latents.

        The timesteps are spread evenly, one in each of as many equal ranges as there are scenes.
        """
        size, device = self.config.batch, torch.device(self.processes.device)
        draw = generator(self.config.seed, step, device)
        shape = self.data["latents"].shape[1:]
        noise = torch.randn(size, *shape, generator=draw, device=device)
        strata = torch.arange(size, device=device)
        strata = strata + torch.rand(size, generator=draw, device=device)
        timesteps = (strata * self.timesteps / size).long().clamp(max=self.timesteps - 1)
        blur = torch.randn(size, MAX_TOYS, self.width, generator=draw, device=device)
        share = torch.rand(size, MAX_TOYS, 1, generator=draw, device=device)
        return blur, self.config.look_noise * share, noise, timesteps
