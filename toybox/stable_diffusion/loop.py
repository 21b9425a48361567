"""The training loop of toybox: resumable at any moment, with an average of the weights."""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.atomic import write_json, written_aside
from imagelab.processes import Processes
from toybox.stable_diffusion.graphs import autocast

READ_EVERY = 50  # steps between two looks at the losses on a GPU, which waits meanwhile


def lr_factor(step: int, steps: int | None, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant, cosine cool-down to 0.01 over the last part of the steps.

    ``steps`` is None while nobody knows their number, which is before the cool-down.
    """
    left = 1.0 if steps is None else (steps - step) / max(1, cooldown * steps)
    fall = 0.01 + 0.99 * (0.5 - 0.5 * np.cos(np.pi * min(1.0, left)))
    return float(min(1.0, (step + 1) / max(1, warmup)) * fall)


class Budget:
    """The number of steps that fill a time, found while they are taken.

    The learning rate is the same until the cool-down, so the number is needed half-way: it follows
    from the pace until then, and is kept in a file, so that a run that was stopped ends alike.

    Args:
        path: JSON file of the number.
        until: when to be done, as time.monotonic() tells it.
    """

    WARMING = 100  # steps that tell nothing about the pace

    def __init__(self, path: Path, until: float):
        self.path, self.until = path, until
        self.begun: tuple[int, float] | None = None
        self.steps: int | None = None
        if path.is_file():
            self.steps = json.loads(path.read_text(encoding="utf-8"))["steps"]

    def look(self, taken: int, done: int) -> None:
        """Fix the number, if it is time, after ``taken`` steps of this run, ``done`` in all."""
        now = time.monotonic()
        if self.steps is not None or taken < self.WARMING:
            return
        if self.begun is None:
            self.begun = taken, now
            return
        before, started = self.begun
        if now - started >= (self.until - started) / 2:
            pace = (now - started) / (taken - before)
            self.steps = done + max(1, int((self.until - now) / pace))
            write_json(self.path, {"steps": self.steps})


class Ema:
    """Exponential moving average of modules' weights, faster while young."""

    def __init__(self, modules: list[torch.nn.Module], decay: float):
        self.decay = decay
        self.live = [parameter for module in modules for parameter in module.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.live]

    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], weight)

    def swap(self) -> None:
        """Exchange the average with the live weights (twice: as before)."""
        for parameter, average in zip(self.live, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    @contextmanager
    def shown(self):
        """With the average in place of the live weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


class Trainer:
    """A resumable loop: `step(index) -> loss` between checkpoints written aside and renamed."""

    def __init__(
        self,
        name: str,
        folder: Path,
        modules: list[torch.nn.Module],
        config,
        lr: float,
        processes: Processes,
        batch: int = 1,
    ):
        self.name, self.path = name, folder / f"{name}.pt"
        self.modules = modules
        parameters = [p for module in modules for p in module.parameters()]
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=lr,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.batch = batch
        self.lr, self.config, self.parameters, self.processes = lr, config, parameters, processes
        self.ema = Ema(modules, config.ema)
        self.losses: list[float] = []
        self.seconds = 0.0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location=self.device)
        for module, weights in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.average = state["ema"]
        self.losses, self.seconds = state["losses"], state["seconds"]

    def save(self) -> None:
        state = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.average,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        with written_aside(self.path) as aside:
            torch.save(state, aside)

    def _average_over_processes(self, loss: Tensor) -> Tensor:
        """Make the gradients, and return the loss, of the whole batch."""
        if self.processes.count > 1:
            parts = [loss.view(1), *(p.grad for p in self.parameters if p.grad is not None)]
            whole = torch.cat([part.flatten() for part in parts])
            torch.distributed.all_reduce(whole)
            means = (whole / self.processes.count).split([part.numel() for part in parts])
            for part, mean in zip(parts, means, strict=True):
                part.copy_(mean.view_as(part))
        return loss

    def _plain(self, step: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """The loss of a step, with its gradients."""

        def gradients(index: int) -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            with autocast(self.device):
                loss = step(index)
            loss.backward()
            return loss.detach()

        return gradients

    def _read(self, waiting: list[Tensor]) -> None:
        """Take over what :meth:`_losses` gave for the steps up to now; it waits for the device."""
        if not waiting:
            return
        found = torch.stack(waiting).tolist()
        waiting.clear()
        for loss, norm in found:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"{self.name}: the loss or its gradient is not finite at step "
                    f"{len(self.losses)}; what was saved before stays; train anew with a smaller "
                    "learning rate"
                )
            self.losses.append(loss)

    def _progress(self, done: int, steps: int | None):
        return tqdm(
            desc=self.name,
            total=steps,
            initial=done,
            disable=not self.processes.is_first,
            unit=" samples",
            unit_scale=self.batch,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        )

    def run(
        self,
        steps: int | Budget,
        step: Callable[[int], Tensor],
        every: float = 120.0,
        report: Callable[[int], None] | None = None,
        report_every: int = 1000,
        graphed: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Go on to ``steps`` steps; save every ``every`` seconds and on Ctrl-C.

        A stop in the middle of an update is not saved: the last checkpoint stands then.
        ``graphed``, where it is given, computes the losses and gradients in place of ``step``.
        """
        budget = steps if isinstance(steps, Budget) else None
        total = budget.steps if budget else steps
        first, done = self.processes.is_first, len(self.losses)
        gradients = graphed or self._plain(step)
        read_every = READ_EVERY if self.device.type == "cuda" else 1
        saved = started = time.monotonic()
        before, index = self.seconds, done
        progress = self._progress(done, total)
        waiting: list[Tensor] = []
        whole = True
        try:
            while total is None or index < total:
                waiting.append(self._losses(gradients, index, total))
                looked = (index + 1) % read_every == 0
                if looked:
                    whole = read_every == 1  # else updates were made with what may not be finite
                    self._read(waiting)
                whole = False
                self.optimizer.step()
                self.ema.update(index)
                whole = True
                index += 1
                now = time.monotonic()
                self.seconds = before + now - started
                progress.update()
                if index % 20 == 0 and self.losses:
                    progress.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}", refresh=False)
                if total is None and looked:
                    budget.look(index - done, index)
                    total = progress.total = self.processes.agree(budget.steps)
                if report and first and index % report_every == 0:
                    report(index)
                if first and now - saved > every:
                    self._read(waiting)
                    self.save()
                    saved = now
        finally:
            progress.close()
            if whole and first:
                self._read(waiting)
                self.save()

    def _losses(self, gradients: Callable, index: int, total: int | None) -> Tensor:
        """Make a step's gradients, clipped; the loss and the gradients' norm before that, [2]."""
        factor = lr_factor(index, total, self.config.warmup, self.config.cooldown)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        loss = self._average_over_processes(gradients(index))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        return torch.stack([loss, norm])
