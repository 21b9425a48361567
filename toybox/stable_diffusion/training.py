"""Runs the stages of toybox's training one after the other, each with a checkpoint of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imagelab.processes import Processes
from imagelab.training.callbacks import Ema, Report, SharedGradients, Stopwatch, TimeBudget
from imagelab.training.checkpoint import read_checkpoint
from imagelab.training.loop import Callback, Stage, Trainer
from toybox.stable_diffusion.architecture import (
    ToyboxConfig,
    build_text_encoder,
    build_unet,
    build_vae,
)
from toybox.stable_diffusion.batches import Batches, Pictures
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.looks import LookEmbedder
from toybox.stable_diffusion.loss import Loss
from toybox.stable_diffusion.stages import autoencoder_stage, decoder_stage, unet_stage

READ_EVERY = 50  # steps between two looks at the losses on a GPU
SAVE_EVERY = 120  # seconds
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Run:
    """One training: what it learns, where, and how it is carried out.

    Attributes:
        work: folder of the checkpoints.
        start: pipeline folders from which the parts "vae", "unet" and "text_encoder" begin.
        until: when the UNet is to be done, on the clock of time.monotonic(); its steps follow
            from that. None: as many as the configuration says.
        graph: replay each of the UNet's steps as a CUDA graph.
        compiled: compile the UNet, which takes a minute or two at first.
    """

    config: TrainConfig
    shape: ToyboxConfig
    work: Path
    processes: Processes = field(default_factory=lambda: Processes("cpu"))
    start: dict[str, Path] = field(default_factory=dict)
    until: float | None = None
    graph: bool = False
    compiled: bool = False


class Course(NamedTuple):
    """How a stage went: the loss of every step, and the seconds that they took."""

    losses: list[float]
    seconds: float


class Trained(NamedTuple):
    """The modules that are trained together, in evaluation mode."""

    unet: nn.Module
    text_encoder: nn.Module
    embedder: LookEmbedder
    course: Course


def train_vae(run: Run, pictures: Pictures):
    """The trained autoencoder, frozen, and its course."""
    torch.manual_seed(run.config.seed)
    vae = begin_from(build_vae(run.shape), run.start.get("vae"), "vae").to(run.processes.device)
    course = run_stage(run, autoencoder_stage(vae, pictures, run.config))
    return vae.eval().requires_grad_(False), course


def train_decoder(run: Run, vae, pictures: Pictures) -> Course:
    """Teach the decoder of a trained autoencoder more."""
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    course = run_stage(run, decoder_stage(vae, pictures, run.config))
    vae.requires_grad_(False)
    return course


def train_unet(
    run: Run,
    data: dict[str, Tensor],
    scale: float,
    tokenizer,
    report: Callable[[nn.Module, nn.Module, int], None] | None = None,
) -> Trained:
    """Train the UNet, the text encoder and the embedder of looks.

    Args:
        data: what ``encode_scenes`` returns; ``scale`` multiplies its latents.
        report: called with the UNet, the text encoder and the number of steps, every
            ``sample_steps`` of them.
    """
    config, device = run.config, run.processes.device
    torch.manual_seed(config.seed + 1)
    unet = begin_from(build_unet(run.shape), run.start.get("unet"), "unet").to(device)
    text_encoder = build_text_encoder(run.shape, tokenizer)
    text_encoder = begin_from(text_encoder, run.start.get("text_encoder"), "text_encoder")
    text_encoder = text_encoder.to(device)
    embedder = LookEmbedder(run.shape.text_width).to(device)
    modules = [unet, text_encoder, embedder]
    loss = Loss(config, *modules, compiled=run.compiled)
    batches = Batches(config, data, scale, tokenizer, run.shape.text_width, run.processes)
    stage = unet_stage(modules, loss, batches, config, run.graph)
    ema = Ema(stage.parameters, config.ema)
    more: list[Callback] = []
    if run.until is not None:
        more.append(TimeBudget(run.work / "steps.json", run.until, run.processes))
    if report:

        def act(done: int) -> None:
            with ema.shown():
                report(unet, text_encoder, done)

        more.append(Report(config.sample_steps, act))
    with loss.watching():
        course = run_stage(run, stage, ema, more)
    return Trained(*(module.eval() for module in modules), course)


def run_stage(
    run: Run, stage: Stage, ema: Ema | None = None, more: Sequence[Callback] = ()
) -> Course:
    """Run a stage, or what its checkpoint leaves to do; the average of its weights stays.

    Raises:
        Interrupted: Ctrl-C; the step was finished and saved.
        FloatingPointError: a loss was not finite; the last checkpoint stands.
    """
    path = run.work / f"{stage.name}.safetensors"
    ema, stopwatch = ema or Ema(stage.parameters, run.config.ema), Stopwatch()
    trainer = Trainer(
        path, {},
        max_grad_norm=MAX_GRAD_NORM,
        device=run.processes.device,
        checkpoint_seconds=SAVE_EVERY,
        read_every=READ_EVERY if stage.parameters[0].is_cuda else 1,
        callbacks=[ema, stopwatch, SharedGradients(run.processes), *more],
        is_writer=run.processes.is_first,
    )  # fmt: skip
    saved = read_checkpoint(path) if path.is_file() else None
    trainer.run({stage.name: lambda _: stage}, saved)
    ema.swap()
    return Course(trainer.curves.get("loss", []), stopwatch.seconds)


def begin_from(module: nn.Module, start: Path | None, part: str) -> nn.Module:
    """Give a module the weights of the same part of a saved pipeline, if one is given."""
    if start is not None:
        module.load_state_dict(type(module).from_pretrained(start / part).float().state_dict())
    return module
