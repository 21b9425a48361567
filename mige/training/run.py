"""A training: checked whole before it begins, then carried out, and gone on with.

The output folder holds

    checkpoint.safetensors   weights that learn, moments, curves: what --resume goes on from
    curves.png               losses, by task
    samples/                 what the model painted on the way
    model/                   the trained model, once training is done
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagelab.errors import UserError, memory_errors
from imagelab.figures import plot_losses
from imagelab.io.atomic import folder_lock, sweep, written_aside
from imagelab.io.folders import check_writable
from imagelab.models.device import choose_precision
from imagelab.processes import Processes
from imagelab.training.callbacks import Ema, Report, SharedGradients
from imagelab.training.checkpoint import Checkpoint, read_checkpoint, read_facts
from imagelab.training.loop import Callback, Stage, Tensors, Trainer
from imagelab.training.seeds import check_seed
from imagelab.training.sharding import shard, split_as
from mige.data.features import Features, open_features
from mige.data.records import Limits, RecordList, check_records
from mige.folder import find_folder, load_parts, model_digest
from mige.method.loss import Diffusion
from mige.method.wording import TASKS
from mige.training.config import (
    ADAM_BETAS,
    ADAM_EPS,
    FREE_SETTINGS,
    TrainingConfig,
    check_settings,
)
from mige.training.model import (
    TrainedModel,
    blocks,
    checkpointed,
    choose_trained,
    learned_whole,
    trained_parameters,
)
from mige.training.result import write_model
from mige.training.samples import Facts, Reader, Samples, dropout_seed
from mige.training.sheets import SamplePainter

log = logging.getLogger(__name__)

CHECKPOINT, CURVES, SAMPLES, MODEL = "checkpoint.safetensors", "curves.png", "samples", "model"
READ_EVERY = 20  # steps between two looks at the losses on a GPU


@dataclass(frozen=True)
class Plan:
    """What is to be trained, on what, and where; all of it checked.

    Attributes:
        folder: of the model that is begun with; ``digest``: of its weights and settings.
        which: records to train on, by their position in the list.
    """

    config: TrainingConfig
    processes: Processes
    dtype: torch.dtype
    folder: Path
    digest: str
    records: RecordList
    which: np.ndarray
    features: Features

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def device(self) -> str:
        return self.processes.device

    @property
    def share(self) -> int:
        """Samples of a process in a step."""
        return self.config.recipe.batch_size // self.processes.count

    @property
    def steps(self) -> int:
        """Updates in all."""
        recipe = self.config.recipe
        return recipe.steps or max(1, recipe.epochs * len(self.which) // recipe.batch_size)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of what is trained, and on what."""
        with self.records.path.open("rb") as file:
            data = hashlib.file_digest(file, "sha256").hexdigest()
        return {"--model": self.digest, "--data": data}


def make_plan(config: TrainingConfig, processes: Processes) -> Plan:
    """Check all that a training needs, but for its weights.

    Raises UserError for the first thing that would not work; records are checked all together.
    """
    check_settings(config)
    check_seed(config.seed)
    recipe, running = config.recipe, config.running
    if recipe.batch_size % processes.count:
        raise UserError(
            f"--batch_size {recipe.batch_size} cannot be shared over {processes.count} processes; "
            f"give a multiple of {processes.count}"
        )
    if running.shard and processes.count == 1:
        raise UserError("--shard needs several processes: start them with `accelerate launch`")
    if running.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 overflows in T5; give bf16 or no")
    check_writable(Path(config.output), "output")
    folder = find_folder(config.model)
    records = RecordList(Path(config.data))
    which = check_records(records, Path(config.root), Limits.of_folder(folder))
    features = open_features(Path(config.features), folder)
    report_missing(features, records, which)
    dtype = choose_precision(running.mixed_precision, processes.device)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return Plan(config, processes, dtype, folder, model_digest(folder), records, which, features)


def report_missing(features: Features, records: RecordList, which: np.ndarray) -> None:
    """Raises UserError with what has no features, and how to make them."""
    most, lines, count = 20, [], 0
    for line in features.missing(records, which):
        count += 1
        if len(lines) < most:
            lines.append(line)
    if count:
        more = f"\n… and {count - most} more" if count > most else ""
        raise UserError(
            "\n".join(lines) + f"{more}\nmake the features that are missing: "
            "python -m mige.features with the same --data, --root and --model"
        )


def check_output(config: TrainingConfig, resume: bool, overwrite: bool) -> None:
    """Raises UserError where a folder holds what was not asked to go on with, or to replace."""
    output = Path(config.output)
    is_begun = (output / CHECKPOINT).is_file()
    if resume and overwrite:
        raise UserError("--resume and --overwrite are both given; give one of them")
    if resume and not is_begun:
        raise UserError(f"{output} holds no checkpoint to go on from; leave out --resume")
    if is_begun and not (resume or overwrite):
        raise UserError(
            f"{output} holds a training; go on with --resume, start anew with --overwrite, or "
            "give another --output"
        )
    if not is_begun and output.is_dir():
        known = {CHECKPOINT, CURVES, SAMPLES, MODEL}
        others = [p.name for p in output.iterdir() if p.name not in known and p.name[0] != "."]
        if others:
            raise UserError(f"{output} holds other files ({others[0]}); give another --output")


def check_same(config: TrainingConfig, inputs: dict[str, str]) -> None:
    """Raises UserError unless an unfinished training had these settings and inputs."""
    facts = read_facts(Path(config.output) / CHECKPOINT)
    now, then = kept_settings(config), facts.get("settings", {})
    changed = [name for name in now if then.get(name) != now[name]]
    if changed:
        shown = ", ".join(f"--{name} {then.get(name)}" for name in changed)
        raise UserError(
            f"the training in {config.output} had other settings ({shown}); go on with those, or "
            "start anew with --overwrite in place of --resume"
        )
    changed = [name for name in inputs if facts.get("inputs", {}).get(name) != inputs[name]]
    if changed:
        raise UserError(
            f"{changed[0]} is not what the training in {config.output} had; put that back, or "
            "start anew with --overwrite in place of --resume"
        )


def kept_settings(config: TrainingConfig) -> dict:
    """The settings that a resumed run has to share, in JSON's types."""
    free = FREE_SETTINGS | {"epochs", "steps"}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.settings().items()
        if name not in free
    }


# ----------------------------------------------------------------------------------------------
# carrying it out


def train(plan: Plan, resume: bool = False, overwrite: bool = False) -> Path:
    """Train, and write the trained model; its folder.

    Raises:
        Interrupted: Ctrl-C; the step was finished and saved.
        UserError: the output folder holds another training, or another process trains there.
        FloatingPointError: a loss was not finite; the last checkpoint stands.
        MemoryError: there was not enough memory, on the device or off it.
    """
    output, first = plan.output, plan.processes.is_first
    with folder_lock(output, "--output") if first else nullcontext():
        with plan.processes.first_alone():
            check_output(plan.config, resume, overwrite)
            if first and not resume:
                _clear(output)
        if first:
            output.mkdir(parents=True, exist_ok=True)
            sweep(output)
        saved = None
        if resume:
            check_same(plan.config, plan.inputs)
            saved = read_checkpoint(output / CHECKPOINT)
        plan.processes.gather(None)  # nobody writes before all have looked
        try:
            with memory_errors():
                return _run(plan, saved)
        except (KeyboardInterrupt, OSError, MemoryError, FloatingPointError):
            if first and (output / CHECKPOINT).is_file():
                log.warning("saved in %s: go on with the same command and --resume", output)
            raise


def _clear(output: Path) -> None:
    """Remove what an earlier training wrote, and nothing else."""
    (output / CHECKPOINT).unlink(missing_ok=True)
    (output / CURVES).unlink(missing_ok=True)
    for name in (SAMPLES, MODEL):
        shutil.rmtree(output / name, ignore_errors=True)


def _run(plan: Plan, saved: Checkpoint | None) -> Path:
    config, recipe, processes = plan.config, plan.config.recipe, plan.processes
    dtype = torch.float32 if config.running.shard else plan.dtype
    wants_samples = config.running.sample_steps and not config.running.shard
    kept = ["vae", *learned_whole(recipe)]
    parts = load_parts(plan.folder, dtype, kept, () if wants_samples else ["vae"])
    model = make_model(plan, parts)
    stage = make_stage(plan, model)
    ema = Ema(stage.parameters, recipe.ema) if recipe.ema else None
    callbacks: list[Callback] = [ema] if ema else []
    callbacks.append(SharedGradients(processes, are_shared=config.running.shard))
    trainer = Trainer(
        plan.output / CHECKPOINT,
        {"settings": kept_settings(config), "inputs": plan.inputs},
        max_grad_norm=recipe.max_grad_norm,
        device=plan.device,
        checkpoint_steps=config.running.checkpoint_steps,
        read_every=READ_EVERY if plan.device.startswith("cuda") else 1,
        callbacks=callbacks,
        is_writer=processes.is_first,
    )
    callbacks.append(Report(config.running.checkpoint_steps, lambda _: draw_curves(plan, trainer)))
    if wants_samples:
        count = config.running.sample_items
        painter = SamplePainter(parts, make_samples(plan), count, plan.output / SAMPLES)

        def act(done: int) -> None:
            with ema.shown() if ema else nullcontext():
                painter.paint(model, done)

        callbacks.append(Report(config.running.sample_steps, act))
    trainer.callbacks[:] = callbacks
    trainer.run({"training": lambda _: stage}, saved)
    if processes.is_first:
        draw_curves(plan, trainer)
    if ema:
        ema.swap()
    write_model(model, plan.folder, plan.output / MODEL, processes.is_first)
    processes.gather(None)
    return plan.output / MODEL


def make_model(plan: Plan, parts: dict) -> TrainedModel:
    """The model that learns, on its device, and over all processes where it is to be split."""
    config, recipe = plan.config, plan.config.recipe
    schedule = parts["scheduler"].config
    model = TrainedModel(
        parts,
        Diffusion(schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end),
        slots=parts["slots"],
        end=parts["tokenizer"].eos_token_id,
        round_timesteps=parts["round_timesteps"],
        autocast=plan.dtype,
        always_sees=config.running.shard,
    )
    choose_trained(model, recipe, config.seed)
    if config.running.gradient_checkpointing:
        checkpointed(model)
    model.to(plan.device)
    if config.running.shard:
        shard(model, blocks(model), plan.device)
    return model


def make_samples(plan: Plan) -> Samples:
    """What this process reads."""
    facts = Facts.of(plan.folder)
    return Samples(
        plan.records, plan.which, plan.features, Path(plan.config.root), facts,
        plan.config.seed, plan.config.recipe.batch_size, plan.share,
        plan.processes.index * plan.share, plan.config.running.micro_batch_size,
    )  # fmt: skip


def make_stage(plan: Plan, model: TrainedModel) -> Stage:
    """AdamW over all that learns: a warm-up, then a constant rate."""
    from diffusers.optimization import get_scheduler

    recipe, device = plan.config.recipe, plan.device
    named = trained_parameters(model)
    optimizer = torch.optim.AdamW(
        named.values(), lr=recipe.rate, betas=ADAM_BETAS, eps=ADAM_EPS,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    schedule = get_scheduler(
        "constant_with_warmup", optimizer, num_warmup_steps=recipe.warmup_steps
    )
    reader = Reader(make_samples(plan), plan.steps, plan.config.running.workers)

    @contextmanager
    def losses(step: int) -> Iterator[Tensors]:
        batches = reader.read(step)
        optimizer.zero_grad(set_to_none=True)
        tally = Tally(device)
        for number, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(plan.config.seed, step, plan.processes.index, number))
            terms = model(batch.to(device))
            (terms.loss.sum() / plan.share).backward()
            tally.add(batch.tasks, terms)
        for parameter in named.values():
            if parameter.grad is None:  # no sample of the batch has a picture, say
                parameter.grad = torch.zeros_like(parameter)
        yield tally.means(plan.processes)

    def load_state(tensors: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(split_as(tensors[name], parameter))

    return Stage(
        "training", plan.steps, list(named.values()), optimizer, schedule, losses,
        state=lambda: {name: p.detach() for name, p in named.items()},
        load_state=load_state,
        makes_gradients=True,
    )  # fmt: skip


class Tally:
    """Sums up a step's losses, over its batches and processes, and by task."""

    def __init__(self, device: str):
        self.sums = torch.zeros(len(TASKS), 3, device=device)  # mse, bound, loss
        self.counts = torch.zeros(len(TASKS), device=device)

    def add(self, tasks: tuple[str, ...], terms) -> None:
        """The terms [b] of samples of these tasks."""
        values = torch.stack([each.detach() for each in terms], dim=1)
        places = torch.tensor([TASKS.index(task) for task in tasks], device=values.device)
        self.sums.index_add_(0, places, values)
        self.counts.index_add_(0, places, torch.ones_like(places, dtype=self.counts.dtype))

    def means(self, processes: Processes) -> dict[str, Tensor]:
        """The losses of a step by name; those of a task that it has not are NaN."""
        if processes.count > 1:
            for each in (self.sums, self.counts):
                torch.distributed.all_reduce(each)
        mse, bound, loss = self.sums.sum(0) / self.counts.sum()
        by_task = self.sums[:, 2] / self.counts
        return {"loss": loss, "mse": mse, "bound": bound, **dict(zip(TASKS, by_task, strict=True))}


def draw_curves(plan: Plan, trainer: Trainer) -> None:
    """The losses of all steps so far, a panel each."""
    with written_aside(plan.output / CURVES) as aside:
        plot_losses(aside, trainer.curves)
