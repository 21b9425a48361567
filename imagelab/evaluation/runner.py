"""Painting and measuring many pictures, one by one, so that a stopped evaluation goes on.

Each picture leaves a JSON line in ``records.jsonl`` with

identity   a box's crop against the reference crops of all instances, in each feature space
layout     IoU of each box with the bounding box of its object; objects are what differs in colour
           from the background outside the boxes
leakage    share of the objects' pixels outside all boxes
prompt     cosine of picture and text, in a space that has both
features   of the whole picture, for the diversity over seeds
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imagelab.boxes import Box
from imagelab.errors import UserError
from imagelab.evaluation.features import FeatureSpace
from imagelab.evaluation.measures import crop, layout, objects_by_colour
from imagelab.io.atomic import lock_file, written_aside

RECORDS = "records.jsonl"
PICTURES = "pictures"
RECORD_START = b'{"key": '


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt: what is painted for it, and what the pictures are compared with.

    Attributes:
        name: of what is evaluated; pictures and rows of the report are called by it.
        caption: the prompt in words that a text encoder knows.
        photo: the picture of all instances.
        references: a crop of each instance; ``labels``: what the report calls it.
        own: the instance that each of ``boxes`` is for.
        seeds: one a picture.
        about: what else the report says, for JSON.
    """

    name: str
    prompt: str
    caption: str
    photo: Image.Image
    references: tuple[Image.Image, ...]
    labels: tuple[str, ...]
    own: tuple[int, ...]
    boxes: tuple[Box, ...]
    seeds: tuple[int, ...]
    about: dict


class Painter(Protocol):
    """What paints the pictures of cases."""

    def facts(self, case: Case, index: int) -> dict:
        """Everything, for JSON, that picture ``index`` depends on."""
        ...

    def paint(self, case: Case, indices: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Pictures of these indices, each with its index."""
        ...


def evaluate(
    cases: Sequence[Case], spaces: Sequence[FeatureSpace], output: Path, painter: Painter
) -> list[list[dict]]:
    """Paint and measure every picture that has no record yet; the records of each case.

    One that was removed is painted again; of its two records the later one counts.
    """
    records = Records(output / RECORDS)
    keys = [
        [record_key(case, i, spaces, painter) for i in range(len(case.seeds))] for case in cases
    ]
    records.forget_without(output / PICTURES)
    done = sum(each in records.found for row in keys for each in row)
    (output / PICTURES).mkdir(exist_ok=True)
    with tqdm(total=sum(map(len, keys)), initial=done, desc="pictures", unit="picture") as bar:
        for case, row in zip(cases, keys, strict=True):
            missing = [index for index, each in enumerate(row) if each not in records.found]
            if not missing:
                continue
            references = {space.name: space.images(case.references) for space in spaces}
            for index, picture in painter.paint(case, missing):
                path = output / PICTURES / f"{case.name}-{row[index]}.png"
                with written_aside(path) as aside:
                    picture.save(aside, "PNG")
                facts = {"key": row[index], "name": case.name, "picture": path.name}
                facts |= {"prompt": case.prompt, "seed": case.seeds[index]}
                records.add(facts | measure(picture, case, spaces, references))
                bar.update(1)
    return [[records.found[each] for each in row] for row in keys]


def record_key(case: Case, index: int, spaces: Sequence[FeatureSpace], painter: Painter) -> str:
    """A hash of all that a record depends on."""
    sources = [(space.name, space.source) for space in spaces]
    text = json.dumps([painter.facts(case, index), case.boxes, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    picture: Image.Image, case: Case, spaces: Sequence[FeatureSpace], references: dict[str, Tensor]
) -> dict:
    """Everything that is measured of one picture, for JSON.

    references: by the space's name, features [instances, d] of the reference crops.
    """
    found: dict = {"own": list(case.own), "spaces": {}}
    crops = [crop(picture, box) for box in case.boxes]
    for space in spaces:
        whole = (space.scenes or space.images)([picture])[0]
        inside = space.images(crops)
        result = {
            "similarities": (inside @ references[space.name].T).tolist(),
            "features": [round(value, 5) for value in whole.tolist()],
        }
        if space.text:
            result["prompt"] = (whole @ space.text(case.caption)).item()
        found["spaces"][space.name] = result
    found["iou"], found["leakage"] = layout(objects_by_colour(picture, case.boxes), case.boxes)
    return found


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """A file of records, opened to append; other processes wait for it until it is closed.

    See :func:`imagelab.io.atomic.lock_file` for disks without locks.
    """
    with path.open("a+b", buffering=0) as file:
        lock_file(file.fileno(), path.parent)
        yield file


class Records:
    """The records by key, kept in a file of one JSON line each that several processes may share."""

    def __init__(self, path: Path, option: str = "--output_path"):
        """Read the file; a last line that was cut off is dropped.

        option: what to give another of, in the message about a file of other kind.
        """
        self.path, self._option = path, option
        self.found: dict[str, dict] = {}
        self._read = 0  # bytes of the file
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path) as file:
            self._catch_up(file)

    def add(self, record: dict) -> None:
        """Append a record, unless another process has one of its key; on the disk on return.

        A line that the disk had no room for is dropped by whoever reads on.
        """
        with locked(self.path) as file:
            self._catch_up(file)
            if record["key"] in self.found:
                return
            line = json.dumps(record).encode() + b"\n"
            written = 0
            while written < len(line):  # a disk that fills takes the beginning without an error
                written += file.write(line[written:])
            os.fsync(file.fileno())
            self._read += len(line)
        self.found[record["key"]] = record

    def forget(self, is_gone: Callable[[dict], bool]) -> None:
        """Pass over records whose pictures are gone; new ones of their keys may be added."""
        self.found = {key: each for key, each in self.found.items() if not is_gone(each)}

    def forget_without(self, pictures: Path) -> None:
        """Pass over records whose ``picture`` is no longer in a folder."""
        self.forget(lambda each: "picture" in each and not (pictures / each["picture"]).is_file())

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what other processes have added since the last time."""
        if os.fstat(file.fileno()).st_size < self._read:  # somebody has emptied or removed it
            self._read = 0
        file.seek(self._read)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        cut_off = content[len(whole) :]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self.found |= {line["key"]: line for line in lines}
            if not cut_off.startswith(RECORD_START[: len(cut_off)]):
                raise ValueError("not the start of a record")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is no record of an evaluation; move it away or give another "
                f"{self._option}"
            ) from error
        self._read += len(whole)
        if cut_off:
            file.truncate(self._read)
