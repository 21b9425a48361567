"""A training, carried out and gone on with."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import FAILURES, memory_errors
from imagelab.figures import plot_losses
from imagelab.io.atomic import folder_lock, sweep, written_aside
from imagelab.processes import Processes
from imagelab.training.callbacks import Ema, Report, SharedGradients
from imagelab.training.checkpoint import Checkpoint, read_checkpoint
from imagelab.training.loop import Stage, Tensors, Trainer
from imagelab.training.sharding import shard, split_as
from mige.folder import load_parts
from mige.method.wording import TASKS
from mige.training.model import (
    TrainedModel,
    blocks,
    checkpointed,
    choose_trained,
    learned_whole,
    suited_attention,
    trained_parameters,
)
from mige.training.optimizer import make_optimizer
from mige.training.plan import (
    CHECKPOINT,
    CURVES,
    MODEL,
    SAMPLES,
    Plan,
    check_output,
    check_rates,
    check_same,
    kept_settings,
)
from mige.training.probe import Probe
from mige.training.result import write_model
from mige.training.samples import Reader, Samples, dropout_seed
from mige.training.sheets import SamplePainter

log = logging.getLogger(__name__)

READ_EVERY = 20  # steps between two looks at the losses on a GPU


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
        if first:
            output.mkdir(parents=True, exist_ok=True)
            sweep(output)
        saved = None
        if resume:
            check_same(plan.config, plan.inputs)
            saved = read_checkpoint(output / CHECKPOINT)
            check_rates(plan, saved)
        plan.processes.gather(None)  # nobody writes before all have looked
        then = _written(output / CHECKPOINT)
        try:
            with memory_errors():
                return _run(plan, saved)
        except (KeyboardInterrupt, *FAILURES):
            is_new = _written(output / CHECKPOINT) != then
            if first and (resume or is_new):
                what = "saved in" if is_new else "the checkpoint stands in"
                log.warning("%s %s: go on with the same command and --resume", what, output)
            raise


def _written(path: Path) -> int | None:
    """When a file was written; None where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


def _run(plan: Plan, saved: Checkpoint | None) -> Path:
    config, processes = plan.config, plan.processes
    recipe, running = config.recipe, config.running
    dtype = torch.float32 if running.shard else plan.dtype
    wants_samples = running.sample_steps and not running.shard
    kept = ["vae", *learned_whole(recipe)]
    parts = load_parts(plan.folder, dtype, kept, () if wants_samples else ["vae"])
    model = make_model(plan, parts)
    stage = make_stage(plan, model)
    ema = Ema(stage.parameters, recipe.ema) if recipe.ema else None
    trainer = Trainer(
        plan.output / CHECKPOINT,
        {"settings": kept_settings(config), "inputs": plan.inputs},
        max_grad_norm=recipe.max_grad_norm,
        device=plan.device,
        checkpoint_steps=running.checkpoint_steps,
        read_every=READ_EVERY if plan.device.startswith("cuda") else 1,
        callbacks=[ema] if ema else [],
        is_writer=processes.is_first,
    )
    trainer.callbacks.append(SharedGradients(processes, are_shared=running.shard))
    trainer.callbacks.append(Report(running.checkpoint_steps, lambda _: draw_curves(plan, trainer)))
    if processes.is_first and not saved:  # those of a training that this one takes the place of
        shutil.rmtree(plan.output / SAMPLES, ignore_errors=True)
    painter = None
    if wants_samples:
        count = running.sample_items
        painter = SamplePainter(parts, make_samples(plan), count, plan.output / SAMPLES)
        painter = painter if painter.records else None
    if painter:

        def act(done: int) -> None:
            with ema.shown() if ema else nullcontext():
                painter.paint(model, done)

        trainer.callbacks.append(Report(running.sample_steps, act))
    with suited_attention(plan.device, plan.dtype):
        trainer.run({"training": lambda _: stage}, saved)
        if processes.is_first:
            draw_curves(plan, trainer)
        if ema:
            ema.swap()
        write_model(model, plan.folder, plan.output / MODEL, processes.is_first)
        if painter and processes.is_first and plan.steps % running.sample_steps:
            painter.paint(model, plan.steps)
    processes.gather(None)  # all wait here for each other
    return plan.output / MODEL


def make_model(plan: Plan, parts: dict) -> TrainedModel:
    """The model that learns, on its device, and over all processes where it is to be split."""
    config, recipe = plan.config, plan.config.recipe
    model = TrainedModel.of_parts(parts, autocast=plan.dtype, always_sees=config.running.shard)
    choose_trained(model, recipe, config.seed)
    if config.running.gradient_checkpointing:
        checkpointed(model)
    model.to(plan.device)
    if config.running.shard:
        # at each step of T5's blocks, whose results nobody changes in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        shard(model, blocks(model), plan.device)
    return model


def make_samples(plan: Plan) -> Samples:
    """What this process reads."""
    return Samples(
        plan.records, plan.which, plan.features, Path(plan.config.root), plan.facts,
        plan.config.seed, plan.config.recipe.batch_size, plan.share,
        plan.processes.index * plan.share, plan.config.running.micro_batch_size,
        plan.config.recipe.timestep_shift,
    )  # fmt: skip


def make_stage(plan: Plan, model: TrainedModel) -> Stage:
    """Updates of all that learns: warm-up, constant rate, cooldown where one is asked for."""
    recipe, running, device = plan.config.recipe, plan.config.running, plan.device
    named = trained_parameters(model)
    optimizer = make_optimizer(named, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.factor(step, plan.steps)
    )
    samples = make_samples(plan)
    reader = Reader(samples, plan.steps, running.workers)
    probe = Probe(model, samples, device) if running.probe_steps else None

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
        found = tally.means(plan.processes)
        if probe:
            found |= probe.look(step, running.probe_steps, plan.processes)
        yield found

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
