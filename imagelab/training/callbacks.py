"""Callbacks of the training loop: an average of the weights, shared gradients, time, reports.

A checkpoint numbers the states of callbacks, so those that have one come first and keep their
order: :class:`Ema`, :class:`Stopwatch`.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from imagelab.io.atomic import write_json
from imagelab.processes import Processes
from imagelab.training.interrupt import Interrupt
from imagelab.training.loop import Callback, Stage, Tensors, Trainer
from imagelab.training.sharding import split_as


class Ema(Callback):
    """Exponential moving average of trained tensors, faster while young.

    After update t, counted from 0, the average moves toward the tensors by
    1 − min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float):
        self.decay, self.parameters = decay, list(parameters)
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def after_update(self, trainer: Trainer, stage: Stage, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], weight)

    def swap(self) -> None:
        """Exchange the average with the trained tensors (twice: as before)."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            trained = parameter.detach().clone()
            parameter.detach().copy_(average)
            average.copy_(trained)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """With the average in place of the trained tensors."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state(self) -> Tensors:
        return {str(index): average for index, average in enumerate(self.average)}

    def load_state(self, tensors: Tensors) -> None:
        for index, average in enumerate(self.average):
            average.copy_(split_as(tensors[str(index)], average))


class Stopwatch(Callback):
    """``seconds`` that a stage has taken, together with those before it was resumed."""

    def __init__(self):
        self.seconds = 0.0

    def before_stage(self, trainer: Trainer, stage: Stage, first: int) -> None:
        self._begun = time.monotonic() - self.seconds

    def after_update(self, trainer: Trainer, stage: Stage, step: int) -> None:
        self.seconds = time.monotonic() - self._begun

    def state(self) -> Tensors:
        return {"seconds": torch.tensor(self.seconds, dtype=torch.float64)}

    def load_state(self, tensors: Tensors) -> None:
        self.seconds = tensors["seconds"].item()


class SharedGradients(Callback):
    """Processes that each compute a part of every batch learn as one.

    Gradients and losses become their means over the processes, so each process's loss is to be
    such that the mean is the loss of the whole batch. All stop after the same step when Ctrl-C was
    pressed in any of them.

    Args:
        are_shared: the gradients are means already, as those of sharded weights are.
    """

    BUCKET = 1 << 25  # numbers that are exchanged at a time

    def __init__(self, processes: Processes, are_shared: bool = False):
        self.processes, self.are_shared = processes, are_shared
        self._agreed = Interrupt()

    def before_stage(self, trainer: Trainer, stage: Stage, first: int) -> None:
        if self.processes.count > 1:
            trainer.stop = self._agreed

    def before_update(self, trainer: Trainer, stage: Stage, losses: Tensors) -> None:
        if self.processes.count == 1:
            return
        asked = losses["loss"].new_full((), float(trainer.interrupt.asked))
        self._asked, *means = self._means([asked, *losses.values()])
        losses.update(zip(losses, means, strict=True))
        if self.are_shared:
            return
        gradients = [p.grad for p in stage.parameters if p.grad is not None]
        for bucket in self._buckets(gradients):
            for gradient, mean in zip(bucket, self._means(bucket), strict=True):
                gradient.copy_(mean)

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Tensors that are exchanged together, so that copies of a few are needed at a time."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(map(torch.numel, [*bucket, tensor])) > self.BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        if bucket:
            yield bucket

    def _means(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Means of tensors over the processes, in one exchange."""
        whole = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(whole)
        split = (whole / self.processes.count).split([part.numel() for part in parts])
        return [mean.view_as(part) for mean, part in zip(split, parts, strict=True)]

    def after_update(self, trainer: Trainer, stage: Stage, step: int) -> None:
        if self.processes.count > 1 and trainer.reads_after(step):
            self._agreed.asked = self._asked.item() > 0


class Report(Callback):
    """Calls ``act(done)`` in the process that writes, after every so many updates.

    What is due to be saved then is saved before.
    """

    def __init__(self, every: int, act: Callable[[int], None]):
        self.every, self.act = every, act

    def after_step(self, trainer: Trainer, stage: Stage, step: int) -> None:
        if trainer.is_writer and (step + 1) % self.every == 0:
            self.act(step + 1)


class TimeBudget(Callback):
    """Ends a stage at a given time: finds the number of its steps half-way, from the pace.

    The learning rate must not depend on the number before that. The number is kept in a file, so
    that a run that was stopped ends alike.

    Args:
        path: JSON file of the number.
        until: when the stage is to end, on the clock of time.monotonic().
    """

    WARMING = 100  # updates that say nothing about the pace

    def __init__(self, path: Path, until: float, processes: Processes):
        self.path, self.until, self.processes = path, until, processes
        self._started: tuple[float, int] | None = None  # when the pace is measured from

    def before_stage(self, trainer: Trainer, stage: Stage, first: int) -> None:
        self._first = first
        stage.steps = None
        if self.path.is_file():
            stage.steps = json.loads(self.path.read_text(encoding="utf-8"))["steps"]

    def after_update(self, trainer: Trainer, stage: Stage, step: int) -> None:
        if stage.steps is None and trainer.reads_after(step):
            stage.steps = self.processes.agree(self._find(step + 1))

    def _find(self, done: int) -> int | None:
        """The number of steps, if it is time to fix it after ``done`` of them."""
        now = time.monotonic()
        if done - self._first < self.WARMING:
            return None
        if self._started is None:
            self._started = now, done
            return None
        started, before = self._started
        if now - started < (self.until - started) / 2:
            return None
        pace = (now - started) / (done - before)
        steps = done + max(1, int((self.until - now) / pace))
        if self.processes.is_first:
            write_json(self.path, {"steps": steps})
        return steps
