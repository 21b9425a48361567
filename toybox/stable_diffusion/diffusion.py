"""Training the UNet and its text encoder: batches, the loss, and the run.

Axes: b batch, l toys (up to three), t tokens, n pixels of a map, w width of the embeddings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import Recorder, attention_layers, processors
from imagelab.processes import Processes
from toybox.stable_diffusion import architecture as toybox_model
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.data import MAX_TOYS
from toybox.stable_diffusion.graphs import GraphedGradients
from toybox.stable_diffusion.looks import (
    LookEmbedder,
    encode_text,
    features,
    placeholder_embeddings,
)
from toybox.stable_diffusion.loop import Budget, Trainer


def generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def begin_from(module: torch.nn.Module, start: Path | None, part: str) -> torch.nn.Module:
    """Give a module the weights of the same part of a saved pipeline, if one is given."""
    if start is not None:
        module.load_state_dict(type(module).from_pretrained(start / part).float().state_dict())
    return module


# ----------------------------------------------------------------------------------------------
# the loss


def grounding_loss(maps: list[Tensor], coverage: Tensor, nouns: Tensor, named: Tensor) -> Tensor:
    """How far each noun's attention is from lying on its toy, and from reigning there.

    −log s + max(0, log ½ − log a), mean over layers and nouns: s is the share of the noun's
    attention that falls on its toy, a its mean over the toy's pixels. Without the second term
    every pixel leaves nearly all of its attention to the start token.

    Args:
        maps: each layer's [b, n, t] cross-attention, n = h·w pixels in row order.
        coverage: [b, l, h, w] share of each latent pixel that a toy covers.
        nouns: [b, l] position of the token that names each toy.
        named: [b, l] 1 for the toys that count, 0 for the others.
    """
    inside = coverage.flatten(2).transpose(1, 2)  # [b, n, l]
    loss = 0.0
    for attention in maps:
        columns = attention.gather(2, nouns[:, None].expand(-1, attention.shape[1], -1))
        on_toy = (columns * inside).sum(1)  # [b, l]
        share = on_toy / columns.sum(1).clamp_min(1e-8)
        mean = on_toy / inside.sum(1).clamp_min(1e-8)
        far = -share.clamp_min(1e-4).log() - (2 * mean).clamp(1e-4, 1).log()
        loss = loss + (named * far).sum() / named.sum().clamp_min(1)
    return loss / len(maps)


def timestep_weights(snr: Tensor, most: float) -> Tensor:
    """Weight of each timestep's squared error of the noise, 1 on average, [timesteps].

    Min-SNR (Hang et al. 2023, arXiv 2303.09556) for the signal-to-noise ratios above ``most``, and
    1/√SNR (Yu et al. 2023, arXiv 2310.08442) for those below 1: the noisiest steps, where a caption
    decides what is drawn and where, would have no part in the loss otherwise.
    """
    weights = snr.clamp(max=most) / snr / snr.clamp(max=1).sqrt()
    return weights / weights.mean()


class Batch(NamedTuple):
    """The tensors of a step; their shapes are the same in every step."""

    latents: Tensor  # [b, c, h, w], scaled
    coverage: Tensor  # [b, l, h, w] share of each latent pixel that a toy covers
    ids: Tensor  # [b, t]
    slots: Tensor  # [b, t], 1 + l at the placeholder of toy l, 0 elsewhere
    nouns: Tensor  # [b, l] position of the token that names each toy; 0 for none
    looks: Tensor  # [b, l, features]
    blur: Tensor  # [b, l, w] noise of the placeholders' embeddings
    share: Tensor  # [b, l, 1] its share
    noise: Tensor  # [b, c, h, w]
    timesteps: Tensor  # [b]


class Loss:
    """The loss of a batch: of the noise, and of the nouns' attention at decoder-1.

    While it is used the UNet must run inside of :meth:`watching`.
    """

    def __init__(self, config: TrainConfig, unet, text_encoder, embedder, compiled: bool = False):
        self.config, self.unet = config, unet
        self.text_encoder, self.embedder = text_encoder, embedder
        alphas = toybox_model.build_scheduler().alphas_cumprod.to(unet.device)
        self.signal, self.spread = alphas.sqrt(), (1 - alphas).sqrt()
        self.weights = timestep_weights(alphas / (1 - alphas), config.min_snr)
        self.recorder = Recorder()
        layers = attention_layers(unet, "cross")
        self.watched = [name for name in layers if name.startswith("up_blocks.1.")]
        self.predict = torch.compile(unet, dynamic=False) if compiled else unet

    def watching(self):
        """Context manager: the UNet's decoder-1 keeps its attention."""
        processes = {name: self.recorder.processor(name) for name in self.watched}
        return processors(self.unet, processes)

    def __call__(self, *tensors: Tensor) -> Tensor:
        batch = Batch(*tensors)
        steps = batch.timesteps
        noisy = (
            self.signal[steps, None, None, None] * batch.latents
            + self.spread[steps, None, None, None] * batch.noise
        )
        table = self.text_encoder.get_input_embeddings().weight
        placeholders = placeholder_embeddings(
            self.embedder(batch.looks), batch.blur, batch.share, table
        )
        hidden = encode_text(self.text_encoder, batch.ids, batch.slots, placeholders)
        predicted = self.predict(noisy, steps, hidden).sample
        error = (predicted - batch.noise).square().mean((1, 2, 3))
        loss = (self.weights[steps] * error).mean()
        # Taken out of the recorder: what it keeps would hold on to the graph of this step.
        maps = [self.recorder.maps.pop(name) for name in self.watched]
        named = (batch.nouns > 0) & (steps < self.config.grounding_timesteps)[:, None]
        ground = grounding_loss(maps, batch.coverage, batch.nouns, named.float())
        return loss + self.config.grounding_weight * ground


# ----------------------------------------------------------------------------------------------
# batches


class Batches:
    """``batches(index)`` is this process's part of the batch of a step.

    Every draw depends on the seed and the step alone. The data lie on the device.
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
        self.timesteps = toybox_model.build_scheduler().config.num_train_timesteps

    def __call__(self, index: int) -> Batch:
        index += self.config.skip
        config, size, device = self.config, self.config.batch, self.processes.device
        rng = np.random.default_rng((config.seed, 7, index))
        rows = rng.integers(config.scenes, size=size)
        mirrored = rng.integers(2, size=size) * config.mirrored
        ones = rng.integers(config.captions, size=size)
        silent = rng.random(size) < config.caption_dropout
        drawn = torch.from_numpy(self.processes.share(np.stack([rows, mirrored, ones, silent], 1)))
        rows, mirrored, ones, silent = drawn.to(device).unbind(1)
        return Batch(*self._scenes(rows, mirrored), *self._told(rows, ones, silent > 0),
                     *self._noise(index))  # fmt: skip

    def _scenes(self, rows: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.data["latents"][rows + self.config.scenes * mirrored].float() * self.scale
        coverage = self.data["coverage"][rows].float()
        turned = mirrored[:, None, None, None] > 0
        return latents, torch.where(turned, coverage.flip(-1), coverage)

    def _told(self, rows: Tensor, ones: Tensor, silent: Tensor) -> tuple[Tensor, ...]:
        """Tokens, slots, nouns and looks; of those without a caption, the empty text."""
        ids, slots, nouns = (self.data[k][rows, ones].long() for k in ("ids", "slots", "nouns"))
        more = len(self.silence) - ids.shape[1]
        ids, slots = F.pad(ids, (0, more), value=self.pad), F.pad(slots, (0, more))
        heard = ~silent[:, None]
        ids = torch.where(heard, ids, self.silence)
        looks = features(self.data["kinds"][rows], self.data["looks"][rows])
        return ids, slots * heard, nouns * heard, looks

    def _noise(self, index: int) -> tuple[Tensor, ...]:
        """Noise and shares of the placeholders, noise and timesteps of the latents."""
        size, device = self.config.batch, torch.device(self.processes.device)
        draw = generator(self.config.seed, index, device)
        shape = self.data["latents"].shape[1:]
        noise = torch.randn(size, *shape, generator=draw, device=device)
        strata = torch.arange(size, device=device)
        strata = strata + torch.rand(size, generator=draw, device=device)
        timesteps = (strata * self.timesteps / size).long().clamp(max=self.timesteps - 1)
        blur = torch.randn(size, MAX_TOYS, self.width, generator=draw, device=device)
        share = torch.rand(size, MAX_TOYS, 1, generator=draw, device=device)
        share = self.config.look_noise * share
        return tuple(self.processes.share(part) for part in (blur, share, noise, timesteps))


# ----------------------------------------------------------------------------------------------
# the run


@dataclass(frozen=True)
class Pace:
    """How the UNet's training runs; none of it changes what is learned.

    Attributes:
        until: when to be done, as time.monotonic() tells it; the steps are chosen to fit. None:
            as many as the configuration says.
        graph: replay each step as a CUDA graph.
        compiled: compile the UNet, which takes a minute or two at first.
    """

    until: float | None = None
    graph: bool = False
    compiled: bool = False


PLAIN = Pace()


class Trained(NamedTuple):
    """What :func:`train_unet` gives: the modules in evaluation mode, and how they came about."""

    unet: object
    text_encoder: object
    embedder: LookEmbedder
    trainer: Trainer


def train_unet(
    config: TrainConfig,
    shape: ToyboxConfig,
    folder: Path,
    data: dict[str, Tensor],
    scale: float,
    tokenizer,
    report=None,
    start: dict[str, Path] | None = None,
    processes: Processes | None = None,
    pace: Pace = PLAIN,
) -> Trained:
    """Train the UNet, the text encoder and the embedder of looks.

    Args:
        data: what ``encode_scenes`` gives; ``scale`` multiplies its latents.
        report: called with the UNet, the text encoder and the number of steps, now and then.
        start: pipeline folders whose "unet" and "text_encoder" to begin from.
    """
    processes, start = processes or Processes("cpu"), start or {}
    device = processes.device
    torch.manual_seed(config.seed + 1)
    unet = toybox_model.build_unet(shape)
    unet = begin_from(unet, start.get("unet"), "unet").to(device)
    text_encoder = toybox_model.build_text_encoder(shape, tokenizer)
    text_encoder = begin_from(text_encoder, start.get("text_encoder"), "text_encoder").to(device)
    embedder = LookEmbedder(shape.text_width).to(device)
    modules = [unet, text_encoder, embedder]
    trainer = Trainer("unet", folder, modules, config, config.lr, processes, config.batch)
    loss = Loss(config, unet, text_encoder, embedder, pace.compiled)
    batches = Batches(config, data, scale, tokenizer, shape.text_width, processes)
    graphed = GraphedGradients(batches, loss, trainer.parameters) if pace.graph else None
    steps = config.steps if pace.until is None else Budget(folder / "steps.json", pace.until)

    def show(done: int) -> None:
        with trainer.ema.shown():
            report(unet, text_encoder, done)

    with loss.watching():
        trainer.run(
            steps, lambda index: loss(*batches(index)), report=report and show,
            report_every=config.sample_steps, graphed=graphed,
        )  # fmt: skip
    trainer.ema.swap()
    return Trained(unet.eval(), text_encoder.eval(), embedder.eval(), trainer)
