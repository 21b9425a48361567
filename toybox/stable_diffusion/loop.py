"""The training loop of toybox: resumable at any moment, with an average of the weights."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.atomic import written_aside
from imagelab.processes import Processes


def lr_factor(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant, cosine cool-down to 0.01 over the last part of the steps."""
    left = (steps - step) / max(1, cooldown * steps)
    fall = 0.01 + 0.99 * (0.5 - 0.5 * np.cos(np.pi * min(1.0, left)))
    return float(min(1.0, (step + 1) / max(1, warmup)) * fall)


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
    ):
        self.name, self.path = name, folder / f"{name}.pt"
        self.modules = modules
        parameters = [p for module in modules for p in module.parameters()]
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(
            parameters, lr=lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
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

    def run(
        self,
        steps: int,
        step: Callable[[int], Tensor],
        every: float = 120.0,
        report: Callable[[int], None] | None = None,
        report_every: int = 1000,
    ) -> None:
        """Go on to ``steps`` steps; save every ``every`` seconds and on Ctrl-C.

        A stop in the middle of an update is not saved: the last checkpoint stands then.
        """
        done, first = len(self.losses), self.processes.is_first
        saved = started = time.monotonic()
        before = self.seconds
        progress = tqdm(range(done, steps), self.name, total=steps, initial=done, disable=not first)
        whole = True
        try:
            for index in progress:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * lr_factor(
                        index, steps, self.config.warmup, self.config.cooldown
                    )
                self.optimizer.zero_grad(set_to_none=True)
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
                ):
                    loss = step(index)
                loss.backward()
                loss = self._average_over_processes(loss.detach())
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                if not (loss.isfinite() and norm.isfinite()):
                    raise UserError(
                        f"{self.name}: the loss or its gradient is not finite at step {index}; "
                        "what came before is saved; train anew with a smaller learning rate"
                    )
                whole = False
                self.optimizer.step()
                self.ema.update(index)
                self.losses.append(loss.item())
                whole = True
                now = time.monotonic()
                self.seconds = before + now - started
                if index % 20 == 0:
                    progress.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}")
                if report and first and (index + 1) % report_every == 0:
                    report(index + 1)
                if first and now - saved > every:
                    self.save()
                    saved = now
        finally:
            if whole and first:
                self.save()
