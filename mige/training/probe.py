"""Whether a model heeds the pictures and the words of its instructions.

A model can learn to denoise, and to copy the picture that it is to edit, while what reads the
instruction falls silent: its output becomes the same for all. No loss shows that. So a few samples
are looked at again with the pictures, and with the words, of others: where they are heeded, the
error rises.
"""

import logging
import math
from collections import defaultdict
from dataclasses import replace

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
        """[2], over all processes."""
        if self._batches is None:
            found = self.samples[0]
            if isinstance(found, Exception):
                raise found
            self._batches = [undropped(batch).to(self.device) for batch in found]
        errors = torch.zeros(3, device=self.device)
        with at_rest(self.model):
            for batch in self._batches:
                for place, each in enumerate((batch, other_pictures(batch), other_words(batch))):
                    errors[place] += self.model(each).mse.sum()
        if processes.count > 1:
            torch.distributed.all_reduce(errors)
        return errors[1:] / errors[0] - 1


def undropped(batch: Batch) -> Batch:
    """The same, of which nothing is left out."""
    return replace(batch, draws=torch.ones_like(batch.draws))


def other_pictures(batch: Batch) -> Batch:
    """Each mark has the picture of the next one in the batch; the pictures to edit stay."""
    return replace(batch, vision=batch.vision.roll(1, 0), latents=batch.latents.roll(1, 0))


def other_words(batch: Batch) -> Batch:
    """Each sample has the words of the next one with as many marks."""
    alike = defaultdict(list)
    for index, segments in enumerate(batch.segments):
        alike[len(segments)].append(index)
    segments = list(batch.segments)
    for places in alike.values():
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            segments[place] = batch.segments[other]
    return replace(batch, segments=tuple(segments))
