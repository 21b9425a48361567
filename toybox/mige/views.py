"""Pictures of triplets, as the vision encoder learns from them: which toy is where, of what hue.

Axes: n views, b batch, m toys of a view (at most MOST_TOYS), k kinds with the ground first, r rows
and c columns of patches, h and w pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from imagelab.io.tensors import read_tensors, write_tensors
from imagelab.training.seeds import seed_for
from mige.pictures import DEVIATION, MEAN
from toybox.scenes import edits
from toybox.scenes.layouts import (
    draw_kinds,
    draw_look,
    draw_looks,
    draw_reference,
    on_ground,
    place_toys,
)
from toybox.scenes.scenes import Scene, render
from toybox.scenes.toys import KINDS
from toybox.scenes.triplets import GROUNDED, SIDE

CHUNK = 250  # views that are rendered at a time
MOST_TOYS = 3
MOST_SHIFT = 4  # pixels
CHANGES = (*edits.EDITS.values(), *edits.SUBJECT_EDITS.values())


def draw_scene(rng: np.random.Generator) -> Scene:
    """A reference, a scene of subjects, or a scene before or after an edit, as triplets have."""
    family = rng.integers(3)
    if family == 0:
        (kind,) = draw_kinds(rng, 1)
        (placed,) = place_toys(rng, [draw_look(rng, kind)])
        return draw_reference(rng, placed, None)
    if family == 1:
        toys = place_toys(rng, draw_looks(rng, int(rng.integers(1, 3))))
        return on_ground(rng, toys, GROUNDED)
    change = edits.draw_change(rng, CHANGES[rng.integers(len(CHANGES))])
    return change.before if rng.random() < 0.5 else change.after


def small(picture: Image.Image, side: int) -> np.ndarray:
    """A picture as the vision encoder's squeezes it, uint8 [3, side, side]."""
    squeezed = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(squeezed).transpose(2, 0, 1)


def as_seen(pixels: Tensor) -> Tensor:
    """What :func:`small` gives, uint8 [b, 3, h, w], as `mige.pictures.to_vision` does the rest."""
    mean, deviation = (pixels.new_tensor(each, dtype=torch.float32) for each in (MEAN, DEVIATION))
    return (pixels.float() / 255 - mean[:, None, None]) / deviation[:, None, None]


class Rendered(Dataset):
    """Chunks of views, as NumPy arrays by name (see :func:`render_views`)."""

    def __init__(self, seed: int, split: str, count: int, side: int):
        self.seed, self.split, self.count, self.side = seed, split, count, side

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, chunk: int) -> dict[str, np.ndarray]:
        indices = range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count))
        views = [self._view(index) for index in indices]
        return {name: np.stack([view[name] for view in views]) for name in views[0]}

    def _view(self, index: int) -> dict[str, np.ndarray]:
        scene = draw_scene(np.random.default_rng(seed_for(self.seed, "view", self.split, index)))
        picture, masks = render(scene, SIDE, sprites=SIDE)
        toys = np.zeros((self.side, self.side), np.uint8)
        kinds, hues = np.zeros(MOST_TOYS, np.uint8), np.zeros(MOST_TOYS, np.float32)
        for at, (toy, mask) in enumerate(zip(scene.toys, masks, strict=True)):
            grey = Image.fromarray(mask.astype(np.uint8) * 255)
            covered = np.asarray(grey.resize((self.side, self.side), Image.Resampling.BOX))
            toys[covered > 127] = 1 + at
            kinds[at], hues[at] = 1 + KINDS.index(toy.look.kind), toy.look.hue
        return {"pixels": small(picture, self.side), "toys": toys, "kinds": kinds, "hues": hues}


def render_views(
    seed: int, split: str, count: int, side: int, path: Path | None = None, workers: int = 0
) -> dict[str, Tensor]:
    """Views and their truth, kept in a file.

    Args:
        split: "train" or "test", which share no draw.
        side: pixels.
        path: of the file; None: none is kept.
        workers: processes that render; 0: this one. The result is the same.

    Returns:
        ``pixels``: uint8 [n, 3, h, w]; ``toys``: uint8 [n, h, w], 0 on the ground, 1 + the toy
        elsewhere; ``kinds``: uint8 [n, m], 1 + the place in KINDS, 0 for none; ``hues``: [n, m] in
        degrees.
    """
    return kept(Rendered(seed, split, count, side), path, workers, "views")


def kept(
    rendered: Dataset,
    path: Path | None,
    workers: int,
    name: str,
    change: Callable[[dict], dict] = dict,
) -> dict[str, Tensor]:
    """All chunks of a data set behind each other, out of a file if it is there.

    Args:
        change: what is made of each chunk.
    """
    if path and path.is_file():
        return read_tensors(path, "remove it", finite=False)[0]
    loader = DataLoader(rendered, batch_size=None, collate_fn=_as_it_is, num_workers=workers)
    parts: dict[str, list[Tensor]] = {}
    for chunk in tqdm(loader, name, unit=f" × {CHUNK}"):
        for key, array in change(chunk).items():
            parts.setdefault(key, []).append(torch.as_tensor(array))
    data = {key: torch.cat(several) for key, several in parts.items()}
    if path:
        write_tensors(path, data)
    return data


def _as_it_is(chunk):
    """Keep NumPy arrays: as tensors they would go through shared memory, which may be small."""
    return chunk


# ----------------------------------------------------------------------------------------------
# what a step is fed


class Views(NamedTuple):
    """A batch.

    Attributes:
        pictures: float32 [b, 3, h, w], as the vision encoder reads them.
        shares: [b, m, r, c], how much of each patch each toy covers.
        kinds: int [b, m], 1 + the place in KINDS, 0 for no toy.
        hues: [b, m, 2], cosine and sine.
    """

    pictures: Tensor
    shares: Tensor
    kinds: Tensor
    hues: Tensor

    def of_kinds(self) -> Tensor:
        """How much of each patch each kind covers, the ground first: [b, k, r, c]."""
        b, _, r, c = self.shares.shape
        found = self.shares.new_zeros(b, 1 + len(KINDS), r, c)
        index = self.kinds[:, :, None, None].expand_as(self.shares)
        found.scatter_add_(1, index, self.shares)
        found[:, 0] = 1 - self.shares.sum(1)
        return found

    def of_hues(self) -> Tensor:
        """The hues of the toys in each patch by their shares: [b, 2, r, c]."""
        return torch.einsum("bmrc,bmv->bvrc", self.shares, self.hues)


def batch_of(data: dict[str, Tensor], rows: Tensor, patch: int) -> Views:
    """The views of some rows as they are."""
    return _views(data["pixels"][rows], data["toys"][rows], data, rows, patch)


def draw_moves(rng: np.random.Generator, count: int) -> Tensor:
    """How views are varied, int [b, 3]: shifts down and right from 0 on, and 1 for a mirrored one.

    A shift of MOST_SHIFT leaves a view where it is.
    """
    shifts = rng.integers(2 * MOST_SHIFT + 1, size=(count, 2))
    return torch.from_numpy(np.concatenate([shifts, rng.integers(2, size=(count, 1))], 1))


def varied(data: dict[str, Tensor], rows: Tensor, patch: int, moves: Tensor) -> Views:
    """The views of some rows, shifted and mirrored; edges are drawn on."""
    layers = torch.cat([data["pixels"][rows], data["toys"][rows][:, None]], 1)
    side = layers.shape[-1]
    padded = F.pad(layers.float(), (MOST_SHIFT,) * 4, mode="replicate").to(torch.uint8)
    moved = []
    for one, (top, left, is_mirrored) in zip(padded, moves.tolist(), strict=True):
        cut = one[:, top : top + side, left : left + side]
        moved.append(cut.flip(-1) if is_mirrored else cut)
    layers = torch.stack(moved)
    return _views(layers[:, :3], layers[:, 3], data, rows, patch)


def _views(
    pixels: Tensor, toys: Tensor, data: dict[str, Tensor], rows: Tensor, patch: int
) -> Views:
    places = torch.arange(1, MOST_TOYS + 1)[:, None, None]
    shares = F.avg_pool2d((toys[:, None] == places).float(), patch)
    angles = data["hues"][rows].deg2rad()
    hues = torch.stack([angles.cos(), angles.sin()], -1)
    return Views(as_seen(pixels), shares, data["kinds"][rows].long(), hues)
