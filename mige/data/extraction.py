"""Making the features of a list's pictures; see `mige.data.features` for the files.

A shard is written when all its pictures are done, so that whatever is there is whole, and a stopped
run goes on with what each shard lacks.

Axes: b pictures, c latent channels, h and w latent rows and columns.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, sweep, write_json
from imagelab.io.folders import check_unused
from imagelab.io.images import open_picture
from imagelab.io.tensors import read_tensors, tensor_names, write_tensors
from imagelab.models.loading import load_module, quiet_libraries, read_part
from imagelab.models.parts import checked_folder, find_weights
from imagelab.processes import Processes
from imagelab.training.interrupt import Interrupt, finish_step_on_interrupt
from mige.data.checking import MOST_TOLD
from mige.data.features import AGAIN, FACTS, Kind, read_shards, shard_path
from mige.data.records import RecordList
from mige.data.references import References
from mige.folder import PARTS, check_finite
from mige.pictures import crop, to_pixels

PER_SHARD = 512  # references to pictures, when the folder begins
MOST_READERS = 8  # threads that decode pictures
AHEAD = 2  # batches that are decoded before they are needed


@dataclass
class Unread:
    """Pictures that cannot be read: how many, and why, for the first of them."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, lines: Iterable[str], count: int = 1) -> None:
        """Count some more."""
        self.count += count
        self.lines += islice(lines, MOST_TOLD - len(self.lines))


@dataclass(frozen=True)
class Extraction:
    """What is to be made.

    Attributes:
        root: what the list's paths start from.
        kind: what the features are of.
    """

    vae: torch.nn.Module
    kind: Kind
    records: RecordList
    root: Path
    batch_size: int
    device: str

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """Mean and deviation [b, 2c, h, w] of pictures [3, height, width], on the CPU."""
        pixels = torch.stack(list(pictures)).to(self.device)
        # not in TF32, which a GPU otherwise computes convolutions in
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.vae.encode(pixels).latent_dist
        values = torch.cat([found.mean, found.std], dim=1).float().cpu()
        if not values.isfinite().all():
            raise FloatingPointError("the autoencoder's output is not finite")
        return values

    def read(self, path: str) -> Tensor:
        """A picture as in training: its middle, float32 [3, side, side]."""
        picture, side = open_picture(self.root / path).as_rgb(), self.kind.side
        try:
            return to_pixels(crop(picture, side, side))
        except UserError as error:
            raise UserError(f"{self.root / path}: {error}") from error


def load_vae(model: Path) -> torch.nn.Module:
    """The autoencoder of a model folder, in float32; no other part's weights are read."""
    quiet_libraries()
    part = PARTS["vae"]
    weights = find_weights(model / "vae", part)
    with checked_folder(model, {"vae": part}, {"vae": weights}) as ours:
        vae = read_part(lambda _: load_module(part, ours / "vae"), model / "vae", "model")
    check_finite(vae, model / "vae")
    return vae.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------
# the folder


def check_place(folder: Path, kind: Kind) -> None:
    """Raises UserError for a folder that holds anything but features of this kind."""
    if (folder / FACTS).is_file():
        read_shards(folder, kind.vae, kind.latent_shape)
        return
    check_unused(folder, "output")


def claim(folder: Path, kind: Kind, references: int) -> None:
    """Make a folder one of features, if it is none yet; the caller holds its lock."""
    check_place(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)  # what a killed writer left
    if not (folder / FACTS).is_file():
        write_json(folder / FACTS, kind.facts(max(1, -(-references // PER_SHARD))))


def extract(job: Extraction, references: References, folder: Path, processes: Processes) -> Unread:
    """Make the features that a folder lacks; what could not be read, in all processes.

    Processes share the shards.

    Raises:
        UserError: the folder holds other files, a damaged shard, or another process writes there.
        Interrupted: Ctrl-C was pressed; what was done is saved.
    """
    with folder_lock(folder, "--output") if processes.is_first else nullcontext():
        with processes.first_alone():
            if processes.is_first:
                claim(folder, job.kind, len(references))
        shards = read_shards(folder, job.kind.vae, job.kind.latent_shape)
        mine = processes.share(list(references.by_shard(shards)))
        todo = [(shard, lacking) for shard, lacking in _lacking(folder, mine) if len(lacking)]
        total, unread = sum(len(lacking) for _, lacking in todo), Unread()
        readers = min(MOST_READERS, os.cpu_count() or 1)
        with (
            tqdm(total=total, unit=" pictures", disable=not processes.is_first) as bar,
            finish_step_on_interrupt() as interrupt,
            ThreadPoolExecutor(readers) as pool,
        ):
            for shard, lacking in todo:
                made = _make(job, lacking.paths(job.records), pool, unread, bar, interrupt)
                _add(shard_path(folder, shard), made)
                interrupt.raise_if_asked(f"in shard {shard}")
        everyone = Unread()
        for each in processes.gather(unread):  # all wait here for each other
            everyone.add(each.lines, each.count)
        return everyone


def _lacking(
    folder: Path, references: Iterable[tuple[int, References]]
) -> Iterator[tuple[int, References]]:
    """Shards with the pictures that they lack, each once."""
    for shard, found in references:
        path = shard_path(folder, shard)
        names = tensor_names(path, AGAIN) if path.is_file() else ()
        yield shard, found.without(names).once()


def _add(path: Path, made: dict[str, Tensor]) -> None:
    """Write a shard anew, with what it had before."""
    if made:
        before = read_tensors(path, AGAIN)[0] if path.is_file() else {}
        write_tensors(path, before | made)


# ----------------------------------------------------------------------------------------------
# one shard


def _make(
    job: Extraction,
    paths: Sequence[str],
    pool: ThreadPoolExecutor,
    unread: Unread,
    bar: tqdm,
    interrupt: Interrupt,
) -> dict[str, Tensor]:
    """Features [2c, h, w] by path; after Ctrl-C those of the batches that are done."""
    made: dict[str, Tensor] = {}
    pictures = _read(job, paths, pool, unread, bar)
    while not interrupt.asked and (batch := list(islice(pictures, job.batch_size))):
        names, read = zip(*batch, strict=True)
        made |= zip(names, job.encode(read), strict=True)
        bar.update(len(batch))
    return made


def _read(
    job: Extraction, paths: Sequence[str], pool: ThreadPoolExecutor, unread: Unread, bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    """Pictures by path, in order, decoded some batches ahead; without the unreadable ones."""
    waiting: deque[tuple[str, Future[Tensor]]] = deque()
    left = iter(paths)
    while True:
        for path in islice(left, AHEAD * job.batch_size - len(waiting)):
            waiting.append((path, pool.submit(job.read, path)))
        if not waiting:
            return
        path, picture = waiting.popleft()
        try:
            yield path, picture.result()
        except UserError as error:
            unread.add([str(error)])
            bar.update()
