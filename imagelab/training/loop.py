"""A training loop that knows no paper: steps, checkpoints, Ctrl-C, resuming, curves, callbacks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.training.checkpoint import (
    Checkpoint,
    pack_optimizer,
    unpack_optimizer,
    write_checkpoint,
)
from imagelab.training.interrupt import Interrupt, finish_step_on_interrupt
from imagelab.training.sharding import whole

Tensors = dict[str, Tensor]


@dataclass
class Stage:
    """One stage of a training.

    Attributes:
        name: what progress bars, checkpoints and errors call it.
        steps: how many updates it makes; None: nobody knows yet, a callback will set it.
        parameters: the tensors that it trains.
        optimizer, schedule: over these; the schedule steps after each update.
        losses: ``losses(step)`` is a context manager that yields the losses of a step by name, each
            a scalar. ``"loss"`` is descended, the others are only recorded (NaN: not in this step).
            The backward pass runs within it. It must depend on the step alone, since a step whose
            gradient overflows in fp16 is repeated, and yield new tensors each time.
        state, load_state: the trained tensors for a checkpoint, by name, and back.
        makes_gradients: ``losses`` also makes the gradients, as a replayed CUDA graph does: the
            trainer neither runs the backward pass nor clears the gradients of the step before.
    """

    name: str
    steps: int | None
    parameters: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    losses: Callable[[int], AbstractContextManager[Tensors]]
    state: Callable[[], Tensors]
    load_state: Callable[[Tensors], None]
    makes_gradients: bool = False


class Callback:
    """What happens around an update. Override what is needed."""

    def before_stage(self, trainer: "Trainer", stage: Stage, first: int) -> None:
        """The stage begins, or goes on, with update ``first``; all is restored."""

    def before_update(self, trainer: "Trainer", stage: Stage, losses: Tensors) -> None:
        """The gradients are there, unclipped; they and the losses may be replaced."""

    def after_update(self, trainer: "Trainer", stage: Stage, step: int) -> None:
        """Update ``step`` of the stage has been made."""

    def after_step(self, trainer: "Trainer", stage: Stage, step: int) -> None:
        """All of update ``step`` is done, and saved where that was due."""

    def state(self) -> Tensors:
        """Tensors for a checkpoint."""
        return {}

    def load_state(self, tensors: Tensors) -> None:
        """Take back what :meth:`state` returned."""


class Trainer:
    """Runs stages one after the other, and saves where it stands.

    Attributes:
        curves: every loss of every update, by name.
        interrupt: whether Ctrl-C was pressed in this process.
        stop: what the trainer obeys at the end of a step: ``interrupt``, unless a callback puts in
            its place what all processes agree on.

    Args:
        path: the checkpoint; its folder is made when it is first written.
        facts: what a checkpoint says of the run, in JSON's types.
        max_grad_norm: a gradient of a larger norm is scaled down to it.
        device: torch device of the trained parameters.
        fp16: scale the loss, so that small gradients survive in half precision.
        checkpoint_steps, checkpoint_seconds: how often to save; None: only when a stage or the run
            ends.
        read_every: steps between two looks at the losses. A GPU waits for Python meanwhile, so it
            learns faster with some 50; but updates are made with what may turn out not to be
            finite, before the run ends by it. fp16 needs 1.
        is_writer: whether this process writes the checkpoints and shows the progress.
    """

    def __init__(
        self,
        path: Path,
        facts: dict,
        *,
        max_grad_norm: float,
        device: str = "cpu",
        fp16: bool = False,
        checkpoint_steps: int | None = None,
        checkpoint_seconds: float | None = None,
        read_every: int = 1,
        callbacks: Sequence[Callback] = (),
        is_writer: bool = True,
    ):
        if fp16 and read_every != 1:
            raise ValueError("fp16 has to look at each gradient: read_every must be 1")
        self.path, self.facts = path, facts
        self.max_grad_norm = max_grad_norm
        self.scaler = torch.amp.GradScaler(device.split(":")[0], enabled=fp16)
        self.checkpoint_steps, self.checkpoint_seconds = checkpoint_steps, checkpoint_seconds
        self.read_every = read_every
        self.callbacks, self.is_writer = list(callbacks), is_writer
        self.curves: dict[str, list[float]] = {}
        self.interrupt = self.stop = Interrupt()
        self._unread: list[tuple[int, Tensors, Tensor]] = []  # steps, their losses and norms
        self._saved_at = time.monotonic()

    def run(
        self,
        stages: Mapping[str, Callable[["Trainer"], Stage]],
        saved: Checkpoint | None = None,
        after_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Run all stages, or what a checkpoint leaves to do.

        Args:
            stages: what makes each stage, by name. A stage is made when its turn comes.
            saved: go on from here; its tensors are handed over.
            after_stage: called with the name of a stage that has ended, once it is saved.

        Raises:
            Interrupted: Ctrl-C; the step was finished and saved.
            FloatingPointError: a loss or its gradient is not finite; the last checkpoint stands.
        """
        names = list(stages)
        with finish_step_on_interrupt() as interrupt:
            self.interrupt = self.stop = interrupt
            for name, make in stages.items():
                if saved and names.index(saved.stage) > names.index(name):
                    continue
                stage = make(self)
                first = self._restore(stage, saved) if saved else 0
                saved = None
                self._run_stage(stage, first)
                if after_stage:
                    after_stage(name)

    def _run_stage(self, stage: Stage, first: int) -> None:
        for callback in self.callbacks:
            callback.before_stage(self, stage, first)
        done = first
        with tqdm(
            desc=stage.name, total=stage.steps, initial=first, unit="step",
            disable=not self.is_writer,
        ) as progress:  # fmt: skip
            while stage.steps is None or done < stage.steps:
                try:
                    self.update(stage, done)
                except UserError:  # of what a step reads; the weights stand at the end of one
                    if done > first and not _is_shared():
                        self.save(stage, done)
                    raise
                for callback in self.callbacks:
                    callback.after_update(self, stage, done)
                done += 1
                progress.total = stage.steps
                if losses := self.curves.get("loss"):
                    progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                progress.update()
                if self.stop.asked or done == stage.steps or self._is_due(done):
                    self.save(stage, done)
                    self.stop.raise_if_asked(f"after step {done} of {stage.name}")
                for callback in self.callbacks:
                    callback.after_step(self, stage, done - 1)
                if self.stop.asked:  # meanwhile
                    self.save(stage, done)
                    self.stop.raise_if_asked(f"after step {done} of {stage.name}")

    def update(self, stage: Stage, step: int) -> None:
        """Make one update. In fp16 an overflow halves the scale and repeats the step."""
        while True:
            losses, norm = self._make_gradients(stage, step)
            is_overflow = self._is_overflow(losses["loss"], norm)
            if not is_overflow:
                self._unread.append((step, losses, norm))
                if self.reads_after(step):
                    self._read(stage)
            self.scaler.step(stage.optimizer)  # which leaves an overflow out
            self.scaler.update()
            if not is_overflow:
                stage.schedule.step()
                return

    def _make_gradients(self, stage: Stage, step: int) -> tuple[Tensors, Tensor]:
        """Make the gradients of a step, clipped; its losses, and the norm before the clipping."""
        if stage.makes_gradients:
            with stage.losses(step) as losses:
                pass
        else:
            stage.optimizer.zero_grad(set_to_none=True)
            with stage.losses(step) as losses:
                self.scaler.scale(losses["loss"]).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        self.scaler.unscale_(stage.optimizer)
        for callback in self.callbacks:
            callback.before_update(self, stage, losses)
        return losses, whole(torch.nn.utils.clip_grad_norm_(stage.parameters, self.max_grad_norm))

    def _is_overflow(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether a smaller scale of fp16 may make the gradients finite."""
        return self.scaler.get_scale() > 1 and bool(loss.isfinite()) and not norm.isfinite()

    def reads_after(self, step: int) -> bool:
        """Whether the losses are read with this step, so that the device is waited for."""
        return (step + 1) % self.read_every == 0

    def _read(self, stage: Stage) -> None:
        """Put the losses of the steps since the last look into the curves.

        Raises FloatingPointError for what is not finite.
        """
        unread, self._unread = self._unread, []
        for step, losses, norm in unread:
            values = {name: loss.item() for name, loss in losses.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(norm.item())):
                other = "go on from it with --mixed_precision no, or " * self.scaler.is_enabled()
                stands = f"the last checkpoint stands: {other}" if self.path.is_file() else ""
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step} of {stage.name}; "
                    f"{stands}start anew with a smaller learning rate"
                )
            for name, value in values.items():
                self.curves.setdefault(name, []).append(value)

    def _is_due(self, done: int) -> bool:
        by_steps = self.checkpoint_steps and done % self.checkpoint_steps == 0
        seconds = time.monotonic() - self._saved_at
        return bool(by_steps or (self.checkpoint_seconds and seconds > self.checkpoint_seconds))

    def save(self, stage: Stage, done: int) -> None:
        """Write the checkpoint: ``done`` steps of a stage have been made."""
        self._read(stage)
        self._saved_at = time.monotonic()
        tensors = {f"trained.{name}": value for name, value in stage.state().items()}
        for name, values in self.curves.items():
            tensors[f"curves.{name}"] = torch.tensor(values, dtype=torch.float64)
        for index, callback in enumerate(self.callbacks):
            found = callback.state().items()
            tensors |= {f"callbacks.{index}.{name}": value for name, value in found}
        tensors |= pack_optimizer(stage.optimizer)
        tensors = self._whole(tensors)
        if not self.is_writer:
            return
        schedule = {k: v for k, v in stage.schedule.state_dict().items() if k != "lr_lambdas"}
        facts = self.facts | {"schedule": schedule, "scaler": self.scaler.state_dict()}
        facts["curves"] = list(self.curves)  # in their order, which tensors of a file do not keep
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self.path, Checkpoint(stage.name, done, tensors, facts))

    def _whole(self, tensors: Tensors) -> Tensors:
        """Tensors with all processes' parts, for the writer; what was split is on the CPU then."""
        joined = {}
        for name, value in tensors.items():
            full = whole(value)
            if self.is_writer:
                joined[name] = full if full is value else full.cpu()
        return joined

    def _restore(self, stage: Stage, saved: Checkpoint) -> int:
        """Put a checkpoint of this stage in place; the number of its steps that are done."""
        tensors = saved.tensors
        stage.load_state(_below("trained.", tensors))
        curves = _below("curves.", tensors)
        self.curves = {name: curves[name].tolist() for name in saved.facts["curves"]}
        for index, callback in enumerate(self.callbacks):
            callback.load_state(_below(f"callbacks.{index}.", tensors))
        unpack_optimizer(stage.optimizer, tensors)
        schedule = stage.schedule
        schedule.load_state_dict(schedule.state_dict() | saved.facts["schedule"])
        groups = stage.optimizer.param_groups
        for group, base, factor in zip(
            groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):  # anew, since the number of steps may be another one now
            group["lr"] = base * factor(schedule.last_epoch)
        if scale := saved.facts.get("scaler"):
            self.scaler.load_state_dict(scale)
        tensors.clear()  # a full model and its moments, which are in the stage now
        return saved.step


def _is_shared() -> bool:
    """Whether other processes, who would have to save as well, take part."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _below(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with a prefix, by the rest of the name."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
