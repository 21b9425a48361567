"""What a model in training paints of some of its records, beside their pictures."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from imagelab.errors import UserError, shorten
from imagelab.io.atomic import written_aside
from imagelab.io.images import open_picture
from imagelab.io.pictures import Tile, encode_png, sheet_of_lines
from mige.data.records import Record
from mige.method.wording import TASKS, readable
from mige.pictures import crop
from mige.pipeline import MigePipeline
from mige.request import Request
from mige.training.model import MODULES, TrainedModel, at_rest
from mige.training.samples import Samples

SIDE = 192  # pixels of a picture on the sheet
LOOKED_AT = 10_000  # records, among which some of each task are looked for


class SamplePainter:
    """Paints the same records each time: references, source, target, and what the model makes.

    Args:
        parts: of a pipeline, by the names of its arguments; those that learn are the model's own.
        count: records of each task.
    """

    def __init__(self, parts: dict, samples: Samples, count: int, output: Path):
        self.parts, self.samples, self.output = parts, samples, output
        pipeline = MigePipeline(**parts)
        self.records = list(_some_of_each_task(samples, count, pipeline))

    def paint(self, model: TrainedModel, done: int) -> Path:
        """Write the sheet of a model that has made ``done`` updates; its path."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{done:07d}.png"
        parts = self.parts | {name: model.parts[name] for name in MODULES}
        with at_rest(model):
            pipeline = MigePipeline(**parts)
            pipeline.vae.to(pipeline.device)
            with torch.autocast(
                pipeline.device.type, model.autocast, model.autocast != torch.float32
            ):
                lines = [self._line(pipeline, record) for record in self.records]
        with written_aside(path) as aside:
            aside.write_bytes(encode_png(sheet_of_lines(lines, SIDE)))
        return path

    def _line(self, pipeline: MigePipeline, record: Record) -> list[Tile]:
        root, size = self.samples.root, pipeline.size
        read = {path: open_picture(root / path).as_rgb() for path in record.paths}
        given = tuple(read[path] for path in record.entities)
        request = _request(record, given)
        condition = pipeline.encode(request, self.samples.seed)
        asked = [(request, condition, self.samples.seed)]
        (painted,) = pipeline.paint(asked, pipeline.guidance(record.task))
        text = shorten(readable(record.prompt), 80)
        tiles = [
            Tile(
                _fitted(picture, size),
                "to edit" if index == request.source else f"<image> {index + 1}",
            )
            for index, picture in enumerate(given)
        ]
        return [Tile(painted, text), Tile(_fitted(read[record.target], size), "target"), *tiles]


def _fitted(picture: Image.Image, size) -> Image.Image:
    return crop(picture, size.width, size.height)


def _request(record: Record, pictures: tuple) -> Request:
    """What the pipeline is asked for, with a record's references."""
    place = record.entities.index(record.source) if record.source is not None else None
    return Request(record.task, record.prompt, pictures, place, record.target)


def _some_of_each_task(samples: Samples, count: int, pipeline: MigePipeline) -> Iterator[Record]:
    """The first records of each task that the pipeline can paint, in the order of the first epoch.

    Its prompts have another wording than those of training, and may be too long.
    """
    left = dict.fromkeys(TASKS, count)
    for place in range(min(len(samples.which), LOOKED_AT)):
        record = samples.record(place)
        if left[record.task] and _fits(record, pipeline):
            left[record.task] -= 1
            yield record
        if not any(left.values()):
            return


def _fits(record: Record, pipeline: MigePipeline) -> bool:
    if record.source not in (None, *record.entities):  # the pipeline edits one of the references
        return False
    try:
        pipeline.segments(_request(record, record.entities))
    except UserError:
        return False
    return True
