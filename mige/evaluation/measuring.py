"""Measuring outputs one by one; a stopped benchmark goes on."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.evaluation.runner import Records
from imagelab.io.images import MissingPicture, Picture, open_unchanged, resize_mask
from imagelab.io.masks import alpha_of
from mige.evaluation.extraction import Extractor
from mige.evaluation.item import BenchItem
from mige.evaluation.measures import cut_out, direction, distances, fill, fit, mean_cosine
from mige.evaluation.models import Clip, Dino, Weights
from mige.evaluation.outputs import Output
from mige.items import open_listed

PROTOCOL = 1  # counts up whenever a number would come out otherwise
PLACES = ("", " inside", " outside")
View = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Bench:
    """What is measured, checked and read once.

    Attributes:
        digests: sha256 of the items' pictures and masks.
        use_masks: whether masks are measured with.
        erased: masks are transparent where they are meant, as those of MagicBrush.
    """

    items: Sequence[BenchItem]
    digests: Mapping[Path, str]
    use_masks: bool = True
    erased: bool = False

    def picture(self, path: Path) -> Image.Image:
        """A picture of an item; a UserError where it has changed."""
        return open_unchanged(path, self.digests[path]).as_rgb()

    def mask(self, item: BenchItem) -> np.ndarray | None:
        """Bool [h, w] of the size of what is compared; None without a mask."""
        if item.mask is None or not self.use_masks:
            return None
        return read_mask(open_unchanged(item.mask, self.digests[item.mask]), self.erased)


def read_mask(picture: Picture, erased: bool) -> np.ndarray:
    """What is inside: by docs/masks.md, or where something was erased."""
    alpha = alpha_of(picture.image) if erased else None
    if alpha is None or alpha.min() > 127:
        return picture.as_mask()
    return alpha <= 127


def read_bench_pictures(items: Sequence[BenchItem], use_masks: bool, erased: bool) -> Bench:
    """Read every picture and mask once; a UserError names the item of one that cannot be."""
    digests: dict[Path, str] = {}
    for place, item in enumerate(tqdm(items, "bench", unit=" items", disable=len(items) < 100)):
        masks = [item.mask] if use_masks and item.mask else []
        for path in (*item.paths, *masks):
            if path in digests:
                continue
            try:
                picture = open_listed(path)
                if path in masks:
                    read_mask(picture, erased)
            except UserError as error:
                is_missing = isinstance(error, MissingPicture)
                more = " Or leave" if is_missing else ", or leave"
                more = f"{more} all masks out with --no_mask" if path in masks else ""
                raise UserError(f"item {place}: {error}{more}") from error
            digests[path] = picture.sha256
    return Bench(items, digests, use_masks, erased)


@dataclass(frozen=True)
class Judges:
    """The models, each loaded when it is first needed.

    Attributes:
        weights: by the names of the options, those that were given.
    """

    weights: Mapping[str, Weights]
    device: str

    @cached_property
    def clip(self) -> Clip | None:
        return Clip(self.weights["clip"], self.device) if "clip" in self.weights else None

    @cached_property
    def dino(self) -> Dino | None:
        return Dino(self.weights["dino"], self.device) if "dino" in self.weights else None

    @cached_property
    def extractor(self) -> Extractor | None:
        if "detector" not in self.weights:
            return None
        return Extractor(self.weights["detector"], self.weights["sam"], self.device)


# ----------------------------------------------------------------------------------------------
# all of a bench


def measure_all(bench: Bench, outputs: Sequence[Output], judges: Judges, path: Path) -> list[dict]:
    """The records of outputs, in their order; those that are in a file already stay as they are."""
    records = Records(path, "--report")
    keys = [record_key(bench, output, judges) for output in outputs]
    todo = [at for at, key in enumerate(keys) if key not in records.found]
    known: tuple[int, Wanted] | None = None
    with tqdm(
        total=len(keys), initial=len(keys) - len(todo), desc="measuring", unit="picture"
    ) as bar:
        for at in todo:
            output = outputs[at]
            if known is None or known[0] != output.place:
                known = output.place, Wanted(bench, bench.items[output.place], judges)
            picture = open_unchanged(output.path, output.sha256).as_rgb()
            records.add({"key": keys[at], **known[1].measure(picture)})
            bar.update()
    return [records.found[key] for key in keys]


def record_key(bench: Bench, output: Output, judges: Judges) -> str:
    """A hash of all that an output's numbers depend on."""
    item = bench.items[output.place]
    masks = [item.mask] if item.mask and bench.use_masks else []
    groups = ([item.source] if item.source else [], item.compared, item.entities, masks)
    facts = {
        "protocol": PROTOCOL,
        "output": output.sha256,
        "pictures": [[bench.digests[path] for path in group] for group in groups],
        "against": item.against,
        "texts": [item.caption, item.target_caption, item.noun],
        "erased": bench.erased,
        "models": {name: each.digest for name, each in judges.weights.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------------------
# one item


class Wanted:
    """What the outputs of one item are compared with, its features taken once."""

    def __init__(self, bench: Bench, item: BenchItem, judges: Judges):
        self.item, self.judges = item, judges
        self.compared = [bench.picture(path) for path in item.compared]
        self.size = None if item.against == "references" else self.compared[0].size
        self.source = None if item.source is None else bench.picture(item.source)
        self.entities = [bench.picture(path) for path in item.entities]
        self.views = self._views(bench.mask(item))
        self._kept: dict[tuple, Tensor] = {}

    def _views(self, inside: np.ndarray | None) -> dict[str, tuple[View, np.ndarray | None]]:
        """What encoders see of a picture, and which pixels that are, by the place's name."""
        views: dict[str, tuple[View, np.ndarray | None]] = {"": (lambda picture: picture, None)}
        size = self.size
        if inside is None or size is None:
            return views
        if inside.shape != size[::-1]:
            inside = resize_mask(inside, size)
        views[" inside"] = (lambda picture: cut_out(fit(picture, size), inside), inside)
        if not inside.all():
            views[" outside"] = (lambda picture: fill(fit(picture, size), inside), ~inside)
        return views

    def measure(self, output: Image.Image) -> dict:
        """All numbers of an output, for JSON; those that nothing is known for are left out."""
        values: dict[str, float | None] = {}
        for place, (view, inside) in self.views.items():
            if self.judges.clip:
                values |= self._clip(view(output), place, view)
            if self.judges.dino:
                feature = self.judges.dino.images([view(output)])[0]
                values["DINO" + place] = self._likeness("dino", feature, place, view)
            if self.size:
                apart = distances(fit(output, self.size), self.compared[0], inside)
                values["L1" + place], values["L2" + place] = apart
        found = {"values": values}
        if self.entities and self.item.noun and self.judges.extractor:
            found["entity"] = self._entity(output, values)
        found["values"] = {name: value for name, value in values.items() if value is not None}
        if not all(map(math.isfinite, found["values"].values())):
            raise FloatingPointError("a measure is not finite; give other weights of the models")
        return found

    def _likeness(self, judge: str, feature: Tensor, place: str, view: View) -> float:
        """The mean cosine with what the output is compared with."""
        model = getattr(self.judges, judge)
        wanted = self._keep((judge, place), lambda: model.images([view(p) for p in self.compared]))
        return mean_cosine(feature, wanted)

    def _clip(self, seen: Image.Image, place: str, view: View) -> dict[str, float | None]:
        clip, item = self.judges.clip, self.item
        feature = clip.images([seen])[0]
        values = {"CLIP-I" + place: self._likeness("clip", feature, place, view)}
        if not item.target_caption:
            return values
        asked = self._keep(("target_caption",), lambda: clip.text(item.target_caption))
        values["CLIP-T" + place] = mean_cosine(feature, asked[None])
        if self.source is not None and item.caption and not item.has_equal_captions:
            source = self._keep(("source", place), lambda: clip.images([view(self.source)])[0])
            caption = self._keep(("caption",), lambda: clip.text(item.caption))
            values["CLIP-dir" + place] = direction(feature, source, asked, caption)
        return values

    def _entity(self, output: Image.Image, values: dict) -> dict:
        """Add the numbers of the entity in an output; what was found of it."""
        entity = self.judges.extractor(output, self.item.noun)
        for judge, name in (("clip", "CLIP-I"), ("dino", "DINO")):
            if model := getattr(self.judges, judge):
                wanted = self._keep((judge, "entities"), lambda m=model: m.images(self.entities))
                values[f"{name} of the entity"] = mean_cosine(
                    model.images([entity.picture])[0], wanted
                )
        return {"box": entity.box, "score": entity.score, "phrase": entity.phrase}

    def _keep(self, name: tuple, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
