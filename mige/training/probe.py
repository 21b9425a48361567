"""Whether a model heeds the pictures and the words of its instructions.

A model can learn to denoise, and to copy the picture that it is to edit, while what reads the
instruction falls silent: its output becomes the same for all. No loss shows that. So a few samples
are looked at again with the pictures, and with the words, of others: where they are heeded, the
error rises.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from imagelab.processes import Processes
from mige.training.model import TrainedModel, at_rest
from mige.training.samples import Batch, Samples

log = logging.getLogger(__name__)

SHUFFLED = ("other pictures", "other words")
LATE = 5000  # samples, after which a model should have begun to heed both
LEAST = 1e-3  # that the error should have risen by, as a share, by then


class Probe:
    """Looks at the samples of a process's first step."""

    def __init__(self, model: TrainedModel, samples: Samples, device: str):
        self.model, self.device, self.samples = model, device, samples
        self._batches: list[Batch] | None = None

    def look(self, step: int, every: int, processes: Processes) -> dict[str, Tensor]:
        """By how much the error rises, as a share, with SHUFFLED; NaN but for every so many steps.

        Logs a warning where it does not, once LATE samples were seen.
        """
        nothing = torch.full((), math.nan, device=self.device)
        if (step + 1) % every:
            return dict.fromkeys(SHUFFLED, nothing)
        found = dict(zip(SHUFFLED, self._rises(processes), strict=True))
        if processes.is_first and (step + 1) * self.samples.total >= LATE:
            for name, rise in found.items():
                if rise < LEAST:
                    log.warning(
                        "step %d: with %s the error is %.2f%% higher: what reads the "
                        "instruction has no effect yet", step + 1, name, 100 * rise.item(),
                    )  # fmt: skip
        return found

    @torch.no_grad()
    def _rises(self, processes: Processes) -> Tensor:
        """[2], over all processes; NaN where no sample has others' to take."""
        if self._batches is None:
            found = self.samples[0]
            if isinstance(found, Exception):
                raise found
            self._batches = [undropped(batch).to(self.device) for batch in found]
        ways = (self._batches, other_pictures(self._batches), other_words(self._batches))
        found = torch.zeros(2, len(ways), device=self.device)  # errors; whether anything differs
        with at_rest(self.model):
            for place, batches in enumerate(ways):
                found[1, place] = batches is not None
                for batch in batches or self._batches:
                    found[0, place] += self.model(batch).mse.sum()
        if processes.count > 1:
            torch.distributed.all_reduce(found)
        errors, differs = found
        return torch.where(differs[1:] > 0, errors[1:] / errors[0] - 1, math.nan)


def undropped(batch: Batch) -> Batch:
    """The same, of which nothing is left out."""
    return replace(batch, draws=torch.ones_like(batch.draws))


def other_pictures(batches: Sequence[Batch]) -> list[Batch] | None:
    """Each mark has the picture of the one before, in any batch; the pictures to edit stay.

    None where there is but one.
    """
    marks = [len(batch.vision) for batch in batches]
    if sum(marks) < 2:
        return None
    vision = torch.cat([batch.vision for batch in batches]).roll(1, 0).split(marks)
    latents = torch.cat([batch.latents for batch in batches]).roll(1, 0).split(marks)
    return [
        replace(batch, vision=own_vision, latents=own_latents)
        for batch, own_vision, own_latents in zip(batches, vision, latents, strict=True)
    ]


def other_words(batches: Sequence[Batch]) -> list[Batch] | None:
    """Each sample has the words of the next one, in any batch, with as many marks.

    None where no other has as many.
    """
    own = [segments for batch in batches for segments in batch.segments]
    alike = defaultdict(list)
    for index, segments in enumerate(own):
        alike[len(segments)].append(index)
    if all(len(places) == 1 for places in alike.values()):
        return None
    others = list(own)
    for places in alike.values():
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            others[place] = own[other]
    found = iter(others)
    return [replace(batch, segments=tuple(islice(found, len(batch)))) for batch in batches]
