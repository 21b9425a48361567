"""What each step of a training reads, and the random numbers that it draws.

A sample's place in the endless row of epochs fixes both: neither the batch size, nor the number of
processes, nor where a run was stopped changes them.

Axes: b samples, r pictures of all their marks, c latent channels, h and w latent rows and columns.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imagelab.errors import FAILURES
from imagelab.io.images import open_picture
from imagelab.training.interrupt import ENDINGS
from imagelab.training.seeds import generator_for, seed_for
from mige.data.checking import Limits
from mige.data.features import Features, Kind
from mige.data.records import Record, RecordList, shuffled
from mige.folder import config_of, read_schedule
from mige.method.instruction import segment_ids
from mige.pictures import to_vision

log = logging.getLogger(__name__)

MUCH = 0.25  # of the time, that waiting for samples may take before it is told
SOON, ENOUGH = 200, 20  # steps after which it is told, and at the end of a shorter training


@dataclass(frozen=True)
class Batch:
    """Samples that are computed together.

    Attributes:
        tasks: of each sample.
        segments: token ids before, between and behind the marks, of each sample.
        counts: pictures of each sample, which stand in ``vision`` and ``latents`` one sample after
            the other.
        clean, noise, source: scaled latents [b, c, h, w]; the source's are zeros where none is.
        timesteps: int [b], on the CPU.
        draws: [b], from 0 to 1, which say what is left out.
        vision: [r, 3, side, side], what the vision encoder reads; latents: unscaled, [r, c, h, w].
    """

    tasks: tuple[str, ...]
    segments: tuple[list[list[int]], ...]
    counts: tuple[int, ...]
    clean: Tensor
    noise: Tensor
    source: Tensor
    timesteps: Tensor
    draws: Tensor
    vision: Tensor
    latents: Tensor

    def __len__(self) -> int:
        return len(self.tasks)

    def to(self, device: str) -> "Batch":
        """The same with its tensors on a device, but for the timesteps."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}
        del tensors["timesteps"]
        return replace(
            self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        )


@dataclass(frozen=True)
class Facts:
    """What of a model its samples depend on.

    Attributes:
        vision_side: pixels of what the vision encoder reads.
        latent_shape: (c, h, w); ``scaling``: what scales them.
        timesteps: of the diffusion.
    """

    limits: Limits
    vision_side: int
    latent_shape: tuple[int, int, int]
    scaling: float
    timesteps: int

    @classmethod
    def of(cls, folder: Path) -> "Facts":
        """Those of a model folder, of which no weights are read."""
        configs = {name: config_of(folder, name) for name in ("vae", "vision_encoder", "scheduler")}
        return cls(
            Limits.of_folder(folder),
            configs["vision_encoder"]["image_size"],
            Kind.of_model(folder).latent_shape,
            configs["vae"]["scaling_factor"],
            read_schedule(configs["scheduler"], folder)["num_train_timesteps"],
        )


@dataclass(frozen=True)
class Samples(Dataset):
    """What one process reads in each step: a list of batches, by the number of the step.

    Attributes:
        which: records to train on, by their position in the list.
        share: samples of this process in a step; ``first``: where they begin among all of the step.
        total: samples of a step, over all processes; ``micro``: of a batch.
        shift: of the timesteps, see :func:`shifted`.
    """

    records: RecordList
    which: np.ndarray
    features: Features
    root: Path
    facts: Facts
    seed: int
    total: int
    share: int
    first: int
    micro: int
    shift: float = 1.0

    def __getitem__(self, step: int) -> list[Batch] | Exception:
        """The batches of a step; an error is returned, for the process that learns to raise."""
        try:
            start = step * self.total + self.first
            places = range(start, start + self.share)
            seen: dict[str, Tensor] = {}  # no picture is read twice in a step
            return [
                self._batch(places[at : at + self.micro], seen)
                for at in range(0, self.share, self.micro)
            ]
        except FAILURES as error:
            return error

    def record(self, place: int) -> Record:
        """The record of a place in the endless row of epochs."""
        epoch, at = divmod(place, len(self.which))
        return self.records[int(self.which[self._order(epoch)[at]])]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = shuffled(len(self.which), self.seed, epoch)
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    def _batch(self, places: Sequence[int], seen: dict[str, Tensor]) -> Batch:
        records = [self.record(place) for place in places]
        pairs = list(zip(places, records, strict=True))
        facts, shape = self.facts, self.facts.latent_shape
        vision = [self._see(path, seen) for record in records for path in record.entities]
        latents = [
            self._latents(record, place, path, "entity", index)
            for place, record in pairs
            for index, path in enumerate(record.entities)
        ]
        side = facts.vision_side
        return Batch(
            tasks=tuple(record.task for record in records),
            segments=tuple(self.segments(record) for record in records),
            counts=tuple(len(record.entities) for record in records),
            clean=torch.stack(
                [self._latents(r, place, r.target, "target") * facts.scaling for place, r in pairs]
            ),
            noise=torch.stack([self._normal("noise", place) for place in places]),
            source=torch.stack([self._source(record, place) for place, record in pairs]),
            timesteps=torch.stack([self._timestep(place) for place in places]),
            draws=torch.stack(
                [torch.rand((), generator=self._generator("dropout", place)) for place in places]
            ),
            vision=torch.stack(vision) if vision else torch.zeros(0, 3, side, side),
            latents=torch.stack(latents) if latents else torch.zeros(0, *shape),
        )

    def _timestep(self, place: int) -> Tensor:
        most, generator = self.facts.timesteps, self._generator("timestep", place)
        return shifted(torch.randint(most, (), generator=generator), most, self.shift)

    def segments(self, record: Record) -> list[list[int]]:
        """Token ids of a record's prompt."""
        limits = self.facts.limits
        return segment_ids(limits.tokenizer, limits.prompt_of(record))

    def _see(self, path: str, seen: dict[str, Tensor]) -> Tensor:
        if path not in seen:
            seen[path] = to_vision(open_picture(self.root / path).as_rgb(), self.facts.vision_side)
        return seen[path]

    def _latents(self, record: Record, place: int, path: str, role: str, index: int = 0) -> Tensor:
        """A draw from a picture's posterior, unscaled."""
        posterior = self.features.posterior(record, path, role)
        return posterior.sample(self._generator(role, place, index))

    def _source(self, record: Record, place: int) -> Tensor:
        if record.source is None:
            return torch.zeros(self.facts.latent_shape)
        return self._latents(record, place, record.source, "source") * self.facts.scaling

    def _normal(self, label: str, place: int) -> Tensor:
        return torch.randn(self.facts.latent_shape, generator=self._generator(label, place))

    def _generator(self, label: str, *place: int) -> torch.Generator:
        return generator_for(self.seed, label, *place)


def shifted(timestep: Tensor, timesteps: int, shift: float) -> Tensor:
    """A timestep moved towards the noise: u = (t + ½) / T becomes s u / (1 + (s − 1) u).

    Esser et al. (arXiv 2403.03206), section 5.3.2, shift the sampler's in the same way. With a
    shift of 1 it stays.
    """
    if shift == 1:
        return timestep
    share = (timestep + 0.5) / timesteps
    return (shift * share / (1 + (shift - 1) * share) * timesteps).long()


class Reader:
    """Hands out the batches of steps that follow each other, read ahead by worker processes.

    It tells once if much of the time goes by until samples are there.
    """

    def __init__(self, samples: Samples, steps: int, workers: int):
        self.samples, self.steps, self.workers = samples, steps, workers
        self._next, self._steps = -1, iter(())
        self._clock = WaitingClock()

    def read(self, step: int) -> list[Batch]:
        """The batches of a step.

        Raises UserError or OSError for a record or a picture that cannot be read.
        """
        if step != self._next:
            self._next, self._steps = step, self._read_from(step)
        self._next += 1
        with self._clock.waiting():
            found = next(self._steps)
        if isinstance(found, Exception):
            raise found
        if self.samples.first == 0 and (share := self._clock.told(self._next == self.steps)):
            how = "waiting for samples" if self.workers else "reading samples"
            log.warning(
                "%s took %.0f%% of the time so far: a --workers above %d may be faster",
                how, 100 * share, self.workers,
            )  # fmt: skip
        return found

    def _read_from(self, step: int) -> Iterator[list[Batch] | Exception]:
        ending = multiprocessing.Event()
        loader = DataLoader(
            self.samples,
            batch_size=None,
            sampler=range(step, self.steps),
            num_workers=self.workers,
            worker_init_fn=partial(_leave_signals, ending),
        )
        steps = iter(loader)
        atexit.register(ending.set)  # before torch and Python end the workers, and wait for them
        return steps


class WaitingClock:
    """How much of the time is spent within ``waiting``; the first time, a start, does not count."""

    def __init__(self):
        self.count, self.waited = 0, 0.0
        self._since: float | None = None
        self._is_told = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        now = time.monotonic()
        if self._since is None:
            self._since = now
        else:
            self.count, self.waited = self.count + 1, self.waited + now - began

    def told(self, is_last: bool) -> float | None:
        """The share of the time so far, if it is MUCH, and is to be told now: once."""
        is_due = self.count == SOON or (is_last and self.count >= ENOUGH)
        if not is_due or self._is_told:
            return None
        share = self.waited / (time.monotonic() - self._since)
        self._is_told = share > MUCH
        return share if self._is_told else None


def _leave_signals(ending, worker: int) -> None:
    """Ctrl-C and being asked to end are for the process that learns, which ends its workers.

    A terminal, or a batch system whose time is up, sends them to all processes. Once ``ending`` is
    set, being asked to end is for the worker.
    """

    def end(*_) -> None:
        if ending.is_set():
            os._exit(0)

    for each in (signal.SIGINT, *ENDINGS):
        signal.signal(each, end if each == signal.SIGTERM else signal.SIG_IGN)


def dropout_seed(seed: int, step: int, process: int, part: int) -> int:
    """Of the dropout within Q-Former and text encoder, in one batch of a step."""
    return seed_for(seed, "layers", step, process, part)
