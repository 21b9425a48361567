"""Regions of subjects, the attention masks that follow from them, and their refinement.

Method: arXiv 2511.00542, section 4. A region is the set of pixels that belong to a subject: its box
at first, later the shape that the subject has taken inside it. In masks True hides:
``mask[b, q, j]`` hides key ``j`` from query pixel ``q``.

Axes: b samples, s subjects, n pixels (row-major), k tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import PixelGroups
from imagelab.boxes import Box, raster
from imagelab.training.seeds import seed_for


@dataclass(frozen=True)
class TokenRoles:
    """What each token position of a prompt is, 0 being the start token.

    Attributes:
        subjects: the positions of each subject's tokens.
        filtered: positions of function words, which no pixel can show.
        end: position of the (first) end-of-text token.
        length: tokens in all, padding included.
        leading: the one position that stands for each subject in its attention map.
    """

    subjects: tuple[tuple[int, ...], ...]
    filtered: tuple[int, ...]
    end: int
    length: int
    leading: tuple[int, ...]


def box_regions(boxes: Sequence[Box], rows: int, columns: int) -> Tensor:
    """Boxes as regions, bool [1, s, rows, columns]."""
    regions = torch.zeros(1, len(boxes), rows, columns, dtype=torch.bool)
    for region, box in zip(regions[0], boxes, strict=True):
        region[raster(box, rows, columns)] = True
    return regions


def resize_regions(regions: Tensor, rows: int, columns: int) -> Tensor:
    """Regions [b, s, h, w] at another resolution (``nearest-exact``)."""
    return F.interpolate(regions.float(), (rows, columns), mode="nearest-exact") > 0.5


def self_mask(regions: Tensor) -> Tensor:
    """Hides, from each pixel of some region, the pixels that are in other regions only.

    regions: bool [b, s, n] → hidden [b, n, n]. Background pixels see all pixels and are seen by
    all; pixels that share a region see each other.
    """
    inside = regions.float()
    shared = inside.transpose(-1, -2) @ inside > 0
    occupied = regions.any(dim=1)
    return occupied[:, :, None] & occupied[:, None, :] & ~shared


def pixel_groups(regions: Tensor) -> PixelGroups:
    """:func:`self_mask` of regions bool [s, n] as groups: one for each set of subjects that share
    pixels, and one for the background.
    """
    background = ~regions.any(dim=0)
    memberships, group = regions.T.unique(dim=0, return_inverse=True)
    parts = []
    for index, subjects in enumerate(memberships):
        keys = background | regions[subjects].any(dim=0)
        seen = keys if subjects.any() else torch.ones_like(keys)
        parts.append(((group == index).nonzero()[:, 0], seen.nonzero()[:, 0]))
    order = torch.cat([queries for queries, _ in parts]).argsort()
    return PixelGroups(tuple(parts), order)


def cross_mask(regions: Tensor, tokens: TokenRoles, guidance: bool) -> Tensor:
    """Hides a subject's tokens from all pixels but those of its region.

    regions: bool [b, s, n] → hidden [b, n, k]. In guidance passes the background sees these tokens
    too; in denoising passes the end-of-text token is hidden from it. Filtered tokens are hidden
    from all pixels.
    """
    b, _, n = regions.shape
    background = ~regions.any(dim=1)
    hidden = torch.zeros(b, n, tokens.length, dtype=torch.bool, device=regions.device)
    for region, positions in zip(regions.unbind(1), tokens.subjects, strict=True):
        visible = region | background if guidance else region
        for position in positions:
            hidden[..., position] = ~visible
    hidden[..., list(tokens.filtered)] = True
    if not guidance:
        hidden[..., tokens.end] |= background
    return hidden


class RegionSet:
    """The regions of a batch and their masks at every resolution of a UNet, each made once.

    Args:
        source: boxes, which are rasterised at each resolution; or refined regions bool
            [b, s, rows, columns], which are resized to it.
        device: where masks and regions are made.
    """

    def __init__(self, source: Sequence[Box] | Tensor, tokens: TokenRoles, device="cpu"):
        self._source, self._tokens, self._device = source, tokens, device
        self._cache: dict[tuple, Tensor | list[PixelGroups]] = {}

    def _cached(self, key: tuple, make):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def at(self, rows: int, columns: int) -> Tensor:
        """Regions bool [b or 1, s, n]."""

        def make() -> Tensor:
            if isinstance(self._source, Tensor):
                regions = resize_regions(self._source, rows, columns)
            else:
                regions = box_regions(self._source, rows, columns)
            return regions.flatten(2).to(self._device)

        return self._cached((rows, columns), make)

    def self_mask(self, rows: int, columns: int) -> Tensor:
        """Hidden [b or 1, n, n]."""
        return self._cached((rows, columns, "self"), lambda: self_mask(self.at(rows, columns)))

    def groups(self, rows: int, columns: int) -> list[PixelGroups]:
        """The self mask as groups of pixels, of each sample or one for all."""
        return self._cached(
            (rows, columns, "groups"),
            lambda: [pixel_groups(regions) for regions in self.at(rows, columns)],
        )

    def cross_mask(self, rows: int, columns: int, guidance: bool) -> Tensor:
        """Hidden [b or 1, n, k]."""
        return self._cached(
            (rows, columns, "cross", guidance),
            lambda: cross_mask(self.at(rows, columns), self._tokens, guidance),
        )

    def bias(self, rows: int, columns: int, kind: str, samples: int, dtype: torch.dtype) -> Tensor:
        """A mask in the form that is added to the logits of a pass.

        Args:
            kind: ``"self"``; or, of cross-attention, ``"guidance"`` or ``"denoising"``. The latter
                hides nothing from the first half of the samples, the unconditional one.
            samples: of the pass.

        Returns:
            [1 or samples, 1, n, keys]: −∞ where hidden, 0 elsewhere.
        """

        def make() -> Tensor:
            if kind == "self":
                hidden = self.self_mask(rows, columns)
                if len(hidden) > 1:
                    hidden = hidden.repeat(samples // len(hidden), 1, 1)
            else:
                hidden = self.cross_mask(rows, columns, kind == "guidance")
            if kind == "denoising":
                hidden = hidden.expand(samples // 2, -1, -1)
                hidden = torch.cat([torch.zeros_like(hidden), hidden])
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            return bias.masked_fill_(hidden, -torch.inf)[:, None]

        return self._cached((rows, columns, kind, samples, dtype), make)


# ----------------------------------------------------------------------------------------------
# refinement


def normalise_columns(attention: Tensor) -> Tensor:
    """Divide each column of [..., queries, keys] by its maximum over queries (+1e-5)."""
    return attention / (attention.amax(dim=-2, keepdim=True) + 1e-5)


def soft_masks(cross_map: Tensor, regions: Tensor) -> Tensor:
    """sigmoid(10·(A − 0.2)), min-max normalised over pixels, inside the current regions.

    cross_map: [n, s] column-normalised; regions: bool [s, n] → [s, n] in [0, 1].
    """
    soft = torch.sigmoid(10 * (cross_map.T - 0.2))
    low, high = soft.amin(-1, keepdim=True), soft.amax(-1, keepdim=True)
    return (soft - low) / (high - low).clamp_min(torch.finfo(soft.dtype).tiny) * regions


def assign_clusters(
    labels: Tensor, soft: Tensor, boxes: Tensor, clusters: int, threshold: float = 0.2
) -> Tensor:
    """Give each cluster to the subject whose soft mask it overlaps best, or to the background.

    Overlap = Σ(cluster · soft) / min(Σ cluster, Σ soft); below ``threshold`` it is background.
    A subject without any cluster gets its box back, taken from the others. Another subject that has
    no pixels elsewhere keeps them, too.

    Args:
        labels: int [n], the cluster of each pixel, in [0, clusters).
        soft: [s, n] soft subject masks; boxes: bool [s, n].

    Returns:
        bool [s, n]
    """
    members = F.one_hot(labels.long(), clusters).T.to(soft.dtype)  # [clusters, n]
    smaller = torch.minimum(members.sum(-1)[:, None], soft.sum(-1)[None])
    overlap = (members @ soft.T) / smaller.clamp_min(torch.finfo(soft.dtype).tiny)
    best, subject = overlap.max(dim=-1)
    regions = torch.zeros_like(boxes)
    for cluster in range(clusters):
        if best[cluster] >= threshold:
            regions[subject[cluster]] |= members[cluster] > 0
    for index in range(len(regions)):
        if not regions[index].any():
            rest = regions & ~boxes[index]
            regions = torch.where(rest.any(-1, keepdim=True), rest, regions)
            regions[index] = boxes[index]
    return regions


class Refiner:
    """Running means of attention over denoising passes, and the regions that they show.

    It serves a batch of images. Each is clustered by itself, with its own seed; the next clustering
    starts from its centres.

    Attributes:
        grid: rows and columns of the maps; ``boxes``: bool [s, n] on it.
        centres: by image, float [clusters, n] of the last clustering.
    """

    def __init__(self, grid: tuple[int, int], boxes: Sequence[Box], seeds: Sequence[int]):
        self.grid = grid
        self.boxes = box_regions(boxes, *grid)[0].flatten(1)
        self.seeds = seeds
        self.centres: list = [None] * len(seeds)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, attention: Tensor) -> None:
        """Take in one layer of one pass: ``"cross"`` [b, n, s] or ``"self"`` [b, n, n]."""
        self._sums[kind] = self._sums.get(kind, 0) + attention.detach().float()
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def mean(self, kind: str) -> Tensor:
        """The mean of all maps of a kind so far, shaped as they are."""
        return self._sums[kind] / self._counts[kind]

    def refine(self, current: Tensor, step: int) -> Tensor:
        """Regions bool [b, s, rows, columns] for ``step`` from ``current`` bool [b or 1, s, n]."""
        cross = normalise_columns(self.mean("cross")).cpu()
        self_ = normalise_columns(self.mean("self")).cpu()
        current = current.cpu().expand(len(cross), -1, -1)
        clusters = min(3 * len(self.boxes), self_.shape[-1])  # a very small map has fewer pixels
        regions = []
        for image in range(len(cross)):
            labels = self._cluster(image, self_[image], clusters, step)
            soft = soft_masks(cross[image], current[image])
            regions.append(assign_clusters(labels, soft, self.boxes, clusters))
        return torch.stack(regions).unflatten(-1, self.grid)

    def _cluster(self, image: int, rows: Tensor, clusters: int, step: int) -> Tensor:
        """k-means labels of the rows: the best of 100 starts at first, later one warm run."""
        from sklearn.cluster import KMeans

        centres = self.centres[image]
        start = (
            {"init": "k-means++", "n_init": 100}
            if centres is None
            else {"init": centres, "n_init": 1}
        )
        seed = seed_for(self.seeds[image], "clusters", step) % 2**32
        fit = KMeans(clusters, **start, random_state=seed).fit(rows.numpy())
        self.centres[image] = fit.cluster_centers_
        return torch.from_numpy(fit.labels_)
