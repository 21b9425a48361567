"""What paints items: a toy MIGE, or stand-ins of known pictures, on which the judge is tried."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple, Protocol

import torch
from PIL import Image, ImageFilter

from imagelab.errors import UserError
from imagelab.models.device import choose_device
from imagelab.sampling import to_picture
from mige.config import Guidance, PaintingConfig
from mige.folder import find_folder, model_digest
from mige.latents import Size
from mige.options import precision
from mige.pictures import to_pixels
from mige.pipeline import MigePipeline
from mige.request import Request, make_request
from toybox.mige.evaluation.items import ROWS, Item, draw_item
from toybox.scenes.triplets import SIDE

BLUR = 4  # pixels, of the blurs that a judge has to refuse


class Painter(Protocol):
    """What paints the pictures of items."""

    def facts(self, row: str) -> dict:
        """Everything, for JSON, that a row's pictures depend on, besides the items."""
        ...

    def paint(self, items: Sequence[Item]) -> list[Image.Image]:
        """A picture for each item of one row."""
        ...


class MigePainter:
    """A toy MIGE.

    Attributes:
        settings: how it paints, for the report.
        batch_size: pictures painted at a time.
    """

    def __init__(
        self, pipeline: MigePipeline, digest: str, config: PaintingConfig, model: str = ""
    ):
        self.pipeline, self.digest, self.config = pipeline, digest, config
        self.batch_size = config.runtime.batch_size
        self.settings = {
            "model": model, "sha256": digest, "seed": config.seed,
            "precision": str(pipeline.transformer.dtype).removeprefix("torch."),
            "guidance": {task: asdict(self.guidance(task)) for task in _tasks()},
        }  # fmt: skip

    def guidance(self, task: str) -> Guidance:
        """How a task is sampled."""
        return self.config.guidance(self.pipeline.guidance(task))

    def facts(self, row: str) -> dict:
        settings = self.settings
        return {
            "sha256": self.digest, "seed": self.config.seed, "precision": settings["precision"],
            "guidance": settings["guidance"][ROWS[row].task],
        }  # fmt: skip

    def paint(self, items: Sequence[Item]) -> list[Image.Image]:
        seed = self.config.seed
        requests = [request_of(item) for item in items]
        asked = [(each, self.pipeline.encode(each, seed), seed) for each in requests]
        return self.pipeline.paint(asked, self.guidance(requests[0].task))

    @torch.inference_mode()
    def restore(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures as the autoencoder alone gives them back."""
        vae = self.pipeline.vae
        pixels = torch.stack([to_pixels(picture) for picture in pictures]).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        return [to_picture(each.float()) for each in decoded]


def _tasks() -> list[str]:
    return list(dict.fromkeys(row.task for row in ROWS.values()))


def request_of(item: Item) -> Request:
    """What a model is asked for."""
    triplet = item.triplet
    if triplet.source is None:
        return make_request(item.text, triplet.entities, name=item.name)
    others = tuple(p for place, p in enumerate(triplet.entities) if place != triplet.source)
    return make_request(item.text, others, source_of(item), triplet.source, item.name)


def load_painter(options: argparse.Namespace, rows: Sequence[str]) -> MigePainter:
    """The painter that a command's options ask for.

    Raises UserError for a model that cannot paint the rows' items.
    """
    config = PaintingConfig.from_settings(
        **{
            name: getattr(options, name)
            for name in (
                "seed", "steps", "text_scale", "image_scale", "batch_size", "device",
                "mixed_precision",
            )
        }
    )  # fmt: skip
    device = choose_device(options.device)
    dtype = precision(options.mixed_precision, device)
    pipeline = MigePipeline.from_pretrained(options.model, torch_dtype=dtype)
    if pipeline.size != Size(SIDE, SIDE):
        raise UserError(
            f"--model {options.model} paints {pipeline.size.width} x {pipeline.size.height} "
            f"pixels, and the items have {SIDE} x {SIDE}; give a toy MIGE"
        )
    for row in rows:
        pipeline.segments(request_of(draw_item(options.seed, row, 0)))
    digest = model_digest(find_folder(options.model))
    return MigePainter(pipeline.to(device), digest, config, options.model)


# ----------------------------------------------------------------------------------------------
# stand-ins


class StandIn(NamedTuple):
    """A painter of known pictures.

    Attributes:
        picture: of an item; None where it has no such picture.
        depends: on what else its pictures depend.
    """

    name: str
    title: str
    picture: Callable[[Item], Image.Image | None]
    depends: str = ""

    def facts(self, row: str) -> dict:
        return {"stand_in": self.name, "depends": self.depends}

    def paint(self, items: Sequence[Item]) -> list[Image.Image]:
        return [self.picture(item) for item in items]

    def has(self, row: str) -> bool:
        """Whether a row's items have such pictures."""
        return ROWS[row].task != "subject" or "source" not in self.name


def stand_ins(painter: MigePainter, seed: int) -> list[StandIn]:
    """What the judge is tried on: it has to pass the first, and none of the others."""

    def other(item: Item) -> Image.Image:
        return draw_item(seed, item.row, item.index + 1).triplet.target

    def restored(item: Item) -> Image.Image:
        return painter.restore([item.triplet.target])[0]

    return [
        StandIn("restored", "targets through the autoencoder", restored, painter.digest),
        StandIn("other", "targets of other items", other),
        StandIn("source", "unchanged sources", source_of),
        StandIn("blur", "blurred targets", lambda item: blurred(item.triplet.target)),
        StandIn("source-blur", "blurred sources", lambda item: blurred(source_of(item))),
    ]


def source_of(item: Item) -> Image.Image:
    """The picture to edit."""
    return item.triplet.entities[item.triplet.source]


def blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(BLUR))
