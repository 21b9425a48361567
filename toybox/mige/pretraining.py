"""What toybox's MIGE learns before its training, so that its pictures and words mean something.

Trained from nothing by the diffusion loss alone, the parts that read die in silence: whatever they
are given, they come to say the same. The full MIGE starts from a BLIP-2 and a T5, which have
learned to read; this stands for them.

1. The vision encoder learns which toy is where, and of what hue. Then it is frozen, but for its
   norm, as the full one is.
2. Its norm, the Q-Former, the fusion, T5 and the trunk's patch embedding learn together to answer
   heads that read T5's states: `toybox.mige.heads`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from imagelab.errors import UserError
from imagelab.figures import plot_losses
from imagelab.io.atomic import folder_lock, written_aside
from imagelab.processes import Processes
from imagelab.training.callbacks import SharedGradients
from imagelab.training.checkpoint import read_checkpoint
from imagelab.training.loop import Stage, Tensors, Trainer
from imagelab.training.seeds import seed_for
from mige.method.loss import Diffusion
from mige.pipeline import MigePipeline
from mige.training.model import TrainedModel
from toybox.mige.architecture import (
    ToyMigeConfig,
    build_parts,
    build_pipeline,
    build_tokenizer,
    load_vae,
    new_parameters,
    save,
)
from toybox.mige.config import BeginConfig
from toybox.mige.folders import CURVES, RECORD, note
from toybox.mige.heads import (
    ReadingHeads,
    ViewHeads,
    cells_of,
    measure_views,
    reading_losses,
    view_losses,
)
from toybox.mige.measures import calibrate, measure, warning_of
from toybox.mige.reading import Readings, Remembered, draw_readings, look, read_states
from toybox.mige.views import draw_moves, render_views, varied
from toybox.stable_diffusion.stages import lr_factor

log = logging.getLogger("toybox")

SAVE_EVERY = 60  # seconds
READ_EVERY = 20  # steps between two looks at the losses on a GPU
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Pretraining:
    """One pre-training: what it learns, where, and how it is carried out.

    Attributes:
        work: folder of the checkpoints, and of what was rendered.
    """

    config: BeginConfig
    work: Path
    processes: Processes = field(default_factory=lambda: Processes("cpu"))
    shape: ToyMigeConfig = ToyMigeConfig()

    @cached_property
    def vae(self):
        return load_vae().to(self.processes.device)

    @cached_property
    def tokenizer(self):
        return build_tokenizer()

    def rows(self, label: str, step: int, count: int) -> Tensor:
        """This process's part of a step's batch, out of ``count``."""
        rng = np.random.default_rng(seed_for(self.config.seed, label, step))
        rows = torch.from_numpy(rng.integers(count, size=self.config.batch))
        return self.processes.share(rows)

    def views(self, split: str, count: int) -> dict[str, Tensor]:
        path, side = self.work / f"views_{split}_{count}.safetensors", self.shape.vision_side
        with self.processes.first_alone():
            return render_views(self.config.seed, split, count, side, path, self.config.workers)

    def readings(self, split: str, count: int) -> Readings:
        path, side = self.work / f"triplets_{split}_{count}.safetensors", self.shape.vision_side
        with self.processes.first_alone():
            data = draw_readings(
                self.vae, self.config.seed, split, count, side, path, self.config.workers
            )
        return Readings(data, self.tokenizer, self.processes.device)


@dataclass(frozen=True)
class Begun:
    """What was learned: the parts, the heads, curves, and how well held-out triplets are read."""

    parts: dict
    heads: dict[str, nn.Module]
    curves: dict[str, list[float]]
    measured: dict[str, float]


def pretrain(run: Pretraining) -> Begun:
    """Both stages, or what their checkpoints leave to do.

    Raises:
        Interrupted: Ctrl-C; the step was finished and saved.
        FloatingPointError: a loss was not finite; the last checkpoint stands.
    """
    device = run.processes.device
    parts = build_parts(run.shape, run.vae, run.tokenizer, run.config.seed)
    process = Diffusion.of(parts["scheduler"])
    model = reading_model(parts, run.tokenizer, process).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(run.config.seed, "heads"))
        views = ViewHeads(run.shape.vision_width)
        readings = ReadingHeads(run.shape.text_width, run.shape.queries)
    heads = {"views": views.to(device), "readings": readings.to(device)}
    curves = run_stage(run, vision_stage(run, model, heads["views"]))
    encoder = model.parts["vision_encoder"].eval()
    held_out = run.views("test", run.config.held_out)
    measured = measure_views(encoder, heads["views"], held_out, run.config.batch)
    readings = {
        split: observed(run, encoder, heads["views"], split, count)
        for split, count in (("train", run.config.triplets), ("test", run.config.held_out))
    }
    stage = stack_stage(run, model, heads["readings"], readings["train"])
    curves |= run_stage(run, stage)
    model.eval().requires_grad_(False)
    calibrate(model, pictured(readings["train"]).some())
    measured |= measure(model, heads["readings"], pictured(readings["test"]), run.config.batch)
    return Begun(parts, heads, curves, measured)


def observed(run: Pretraining, encoder, heads: ViewHeads, split: str, count: int) -> Readings:
    """Triplets, with what the vision encoder makes of their pictures, which is computed once."""
    readings = run.readings(split, count)
    readings.seen = look(encoder, readings.data["pixels"])
    readings.cells = cells_of(encoder, heads, readings.seen, run.shape.queries)
    return readings


def pictured(readings: Readings) -> Readings:
    """The same triplets, whose pictures the vision encoder has to look at."""
    return replace(readings, seen=None)


def reading_model(parts: Mapping, tokenizer, process: Diffusion) -> TrainedModel:
    """The parts as training calls them."""
    return TrainedModel(parts, process, end=tokenizer.eos_token_id, round_timesteps=False)


# ----------------------------------------------------------------------------------------------
# stages


def vision_stage(run: Pretraining, model: TrainedModel, heads: ViewHeads) -> Stage:
    """Views, mirrored and shifted: the vision encoder tells what each patch shows."""
    config, encoder = run.config, model.parts["vision_encoder"]
    patch, device = encoder.config.patch_size, run.processes.device
    views = run.views("train", config.views)

    def losses(step: int) -> Tensors:
        rows = run.rows("views", step, config.views)
        rng = np.random.default_rng(seed_for(config.seed, "moves", step))
        moves = run.processes.share(draw_moves(rng, config.batch))
        batch = varied(views, rows, patch, moves)
        batch = type(batch)(*(each.to(device) for each in batch))
        return view_losses(*heads(encoder, batch.pictures), batch)

    modules = {"vision_encoder": encoder, "heads": heads}
    return make_stage("vision", config.vision_steps, modules, config.vision_rate, config, losses)


def stack_stage(
    run: Pretraining, model: TrainedModel, heads: ReadingHeads, readings: Readings
) -> Stage:
    """Triplets are read as in training; what learns is all but the vision encoder and the trunk.

    Args:
        readings: with what the vision encoder has seen.
    """
    config, parts = run.config, model.parts
    encoder = parts["vision_encoder"].eval()
    reader = reading_model(
        {**parts, "vision_encoder": Remembered(encoder)}, run.tokenizer, model.process
    )

    def losses(step: int) -> Tensors:
        batch, truth = readings.read(run.rows("triplets", step, len(readings)).tolist())
        return reading_losses(heads(read_states(reader, batch)), truth)

    model.requires_grad_(False)
    modules = {
        "vision_norm": encoder.post_layernorm,
        "qformer": parts["qformer"],
        "fusion": parts["fusion"],
        "text_encoder": parts["text_encoder"],
        "patches": parts["transformer"].pos_embed.proj,
        "heads": heads,
    }
    return make_stage("stack", config.stack_steps, modules, config.stack_rate, config, losses)


def make_stage(
    name: str,
    steps: int,
    modules: Mapping[str, nn.Module],
    rate: float,
    config: BeginConfig,
    losses: Callable[[int], Tensors],
) -> Stage:
    """A stage that trains all of some modules, each tensor once."""
    named = dict(nn.ModuleDict(modules).named_parameters())
    for module in modules.values():
        module.train().requires_grad_(True)
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    factor = partial(lr_factor, steps=steps, warmup=config.warmup, cooldown=config.cooldown)

    @contextmanager
    def made(step: int) -> Iterator[Tensors]:
        yield {f"{name} {key}" if key != "loss" else key: v for key, v in losses(step).items()}

    def load_state(tensors: Tensors) -> None:
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(tensors[key])

    return Stage(
        name, steps, parameters, optimizer, LambdaLR(optimizer, factor), made,
        state=lambda: {key: p.detach() for key, p in named.items()},
        load_state=load_state,
    )  # fmt: skip


def run_stage(run: Pretraining, stage: Stage) -> dict[str, list[float]]:
    """Run a stage, or what its checkpoint leaves to do; its curves."""
    path = run.work / f"{stage.name}.safetensors"
    trainer = Trainer(
        path, {},
        max_grad_norm=MAX_GRAD_NORM,
        device=run.processes.device,
        checkpoint_seconds=SAVE_EVERY,
        read_every=READ_EVERY if stage.parameters[0].is_cuda else 1,
        callbacks=[SharedGradients(run.processes)],
        is_writer=run.processes.is_first,
    )  # fmt: skip
    saved = read_checkpoint(path) if path.is_file() else None
    trainer.run({stage.name: lambda _: stage}, saved)
    curves = {key: values for key, values in trainer.curves.items() if key != "loss"}
    return {f"{stage.name} loss": trainer.curves["loss"], **curves}


def begin(
    config: BeginConfig, output: Path, work: Path, processes: Processes, overwrite: bool = False
) -> dict:
    """Learn, and write the model; what its record says.

    Args:
        overwrite: take the place of a model that is there.

    Raises:
        UserError: the batch does not divide by the processes, something else is at ``output``, or
            another process writes one of the folders.
    """
    if config.batch % processes.count:
        raise UserError(
            f"--batch {config.batch} cannot be shared over {processes.count} processes; give a "
            f"multiple of {processes.count}"
        )
    run = Pretraining(config, work, processes, ToyMigeConfig())
    with folder_lock(work, "--work") if processes.is_first else nullcontext():
        if processes.is_first:
            note(config, work)
        processes.gather(None)  # nobody works before that
        begun = pretrain(run)
        if processes.is_first:
            with written_aside(work / CURVES) as aside:
                plot_losses(aside, begun.curves)
    record = {
        "shape": asdict(run.shape),
        "settings": config.settings(),
        "parameters": new_parameters(begun.parts),
        "held_out": {name: round(value, 4) for name, value in begun.measured.items()},
    }
    if processes.is_first:
        for name, value in record["held_out"].items():
            log.info("%s: %.3f%s", name, value, warning_of(name, value))
        save(pipeline_of(run, begun), output, {RECORD: record}, overwrite)
    return record


def pipeline_of(run: Pretraining, begun: Begun) -> MigePipeline:
    """The pipeline of all parts, on the CPU."""
    parts = {
        name: part.to("cpu") if isinstance(part, nn.Module) else part
        for name, part in begun.parts.items()
    }
    return build_pipeline(parts, run.vae.to("cpu"), run.tokenizer, run.shape.slots)
