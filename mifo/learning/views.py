"""Random views of an instance: what each step of learning sees.

Axes: c latent channels, h and w latent rows and columns, H and W pixels, k tokens, b samples (stage
2: the class sample, then the instance view), m chosen assets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imagelab.models.stable_diffusion import StableDiffusion
from imagelab.prompts import encode_ids
from imagelab.training.seeds import generator_for
from mifo.learning.instance import Instance
from mifo.tokens import view_prompt


@dataclass(frozen=True)
class View:
    """One draw of union sampling: the assets in prompt order, and whether all is mirrored."""

    assets: tuple[int, ...]
    flip: bool


def sample_view(count: int, generator: torch.Generator) -> View:
    """Draw a view of ``count`` assets: union sampling, and a mirror image half of the time.

    Three draws from the CPU ``generator``, in this order: the subset's size, uniform in 1..count;
    a permutation of all assets, of which the first ``size`` are taken; the flip.
    """
    size = int(torch.randint(1, count + 1, (), generator=generator))
    order = torch.randperm(count, generator=generator).tolist()
    flip = bool(torch.randint(0, 2, (), generator=generator))
    return View(assets=tuple(order[:size]), flip=flip)


@dataclass
class Batch:
    """What one step learns from.

    Attributes:
        latents, noise: [b, c, h, w], latents scaled; the instance view is the last sample.
        timesteps: int64 [b]; input_ids: int64 [b, k].
        masks: float [m, H, W], the masks of the chosen assets in prompt order, at picture size.
        positions: the token position of each of them in the instance's prompt.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor
    masks: Tensor
    positions: Sequence[int]


class Views:
    """Draws the batches of a run. The picture is encoded once, and its mirror image.

    Every draw has a seed of its own, labelled by what is drawn, the stage and the step.

    Attributes:
        moments: [flip, (mean, deviation), c, h, w] of the scaled latents, on the CPU.
        masks: float [assets, H, W], on the CPU.
    """

    def __init__(
        self,
        model: StableDiffusion,
        instance: Instance,
        asset_ids: Sequence[int],
        device: str,
        seed: int,
    ):
        self.model, self.device, self.seed = model, device, seed
        self.asset_ids = list(asset_ids)
        pixels = torch.from_numpy(instance.image).permute(2, 0, 1).float() / 127.5 - 1  # 3 H W
        with torch.no_grad():  # one by one, to spare memory
            codes = [model.encode(way[None]) for way in (pixels, pixels.flip(-1))]
        self.moments = torch.stack([torch.cat([*code]) for code in codes]).cpu()
        self.masks = torch.from_numpy(instance.masks.astype(np.float32))

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return tuple(self.moments.shape[-2:])

    def draw(
        self, stage: int, step: int, prior: Tensor | None = None, class_prompt: str = ""
    ) -> Batch:
        """The batch of a step.

        Args:
            prior: scaled class latents [i, c, h, w], of which one joins the view; or None.
            class_prompt: what these show.
        """

        def stream(what: str) -> torch.Generator:
            return generator_for(self.seed, what, stage, step)

        view = sample_view(len(self.masks), stream("view"))
        timesteps = self.model.scheduler.config.num_train_timesteps
        mean, deviation = self.moments[int(view.flip)]
        latents = mean + deviation * torch.randn(mean.shape, generator=stream("posterior"))
        samples = [(latents, view_prompt(view.assets), "")]
        if prior is not None:
            index = int(torch.randint(0, len(prior), (), generator=stream("class image")))
            samples.insert(0, (prior[index], class_prompt, "class "))
        latents = torch.stack([latents for latents, _, _ in samples])
        noise = [
            torch.randn(mean.shape, generator=stream(f"{label}noise")) for _, _, label in samples
        ]
        drawn = [
            torch.randint(0, timesteps, (), generator=stream(f"{label}timestep"))
            for _, _, label in samples
        ]
        ids = torch.stack([encode_ids(self.model.tokenizer, text) for _, text, _ in samples])
        masks = self.masks[list(view.assets)]
        row = ids[-1].tolist()
        return Batch(
            latents=latents.to(self.device),
            noise=torch.stack(noise).to(self.device),
            timesteps=torch.stack(drawn).to(self.device),
            input_ids=ids.to(self.device),
            masks=(masks.flip(-1) if view.flip else masks).to(self.device),
            positions=[row.index(self.asset_ids[asset]) for asset in view.assets],
        )
