"""Training records in the release's format, read one by one out of lists of millions.

A list is a JSON array of objects:

    {"image": "x/replace/t/2.jpg", "width": 512, "height": 512,
     "source_path": ["x/replace/s/2.jpg"],
     "entity_path": ["x/replace/s/2.jpg", "x/replace/e/2.jpg"],
     "multi_prompt": "replace the cup in<imagehere>with<imagehere>"}

``entity_path`` names the pictures in the order of their marks. The task follows from the target's
path, or from a key "task".
"""

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import misfit
from imagelab.training.seeds import seed_for
from mige.method.wording import TASKS, split

#: Parts of a target's path that tell its task, the first that is in it.
PATHS = {
    "Subjects200K": "subject",
    "instructpix2pix": "edit",
    "replace": "subject_edit",
    "add": "subject_edit",
}
FORM = {"image": str, "multi_prompt": str, "entity_path": [str]}
MOST_ASPECT = 4.0  # width over height, beyond which the release leaves a record out
BLOCK = 1 << 24  # bytes that are looked through at a time
LONGEST = 1 << 22  # bytes of a record


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        target: path of the picture to be painted; ``width``, ``height``: its size, if it is told.
        entities: paths of the pictures of the marks, in their order.
        source: path of the picture to be edited; None for subjects.
        prompt: the instruction, with marks.
    """

    task: str
    target: str
    entities: tuple[str, ...]
    source: str | None
    prompt: str
    width: int | None = None
    height: int | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Every picture, each once."""
        source = (self.source,) if self.source is not None else ()
        return tuple(dict.fromkeys((self.target, *self.entities, *source)))

    @property
    def is_wide(self) -> bool:
        """So much wider than high that it is left out."""
        return bool(self.width and self.height) and self.width > MOST_ASPECT * self.height


class RecordList(Sequence[Record]):
    """The records of a list, of which only the places in the file are kept in memory.

    Raises UserError for a file that is no JSON array of objects; records are checked as they are
    read, see :func:`problems`.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"there is no list {path}; give a JSON file of records")
        self._places = _find_objects(path)
        if not len(self._places):
            raise UserError(f"{path} holds no records")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        """Raises UserError, with the record's position, for one that is not as it should be."""
        start, end = self._places[index]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            return parse_record(json.loads(data.decode("utf-8")))
        except (UserError, ValueError) as error:
            place = range(len(self))[index]
            raise UserError(f"{self.path}: record {place}: {error}") from error


def parse_record(facts: dict) -> Record:
    """A record out of its JSON object; UserError where it is not as it should be."""
    if wrong := misfit(facts, FORM, "it"):
        raise UserError(wrong)
    sources = facts.get("source_path") or []
    if misfit(sources, [str]) or len(sources) > 1:
        raise UserError("source_path is no list of one path")
    task, target = facts.get("task"), facts["image"]
    if task is None:
        task = next((task for part, task in PATHS.items() if part in target), None)
        if task is None:
            raise UserError(
                f'the path {shorten(target)!r} tells no task; write "task", which is one of '
                f"{', '.join(TASKS)}"
            )
    if task not in TASKS:
        raise UserError(
            f"there is no task {shorten(str(task))!r}; the tasks are {', '.join(TASKS)}"
        )
    if (task == "subject") == bool(sources):
        raise UserError(f"a record of {task} has {len(sources) or 'no'} source_path")
    sizes = [facts.get(key) for key in ("width", "height")]
    known = all(type(side) is int and side > 0 for side in sizes)
    return Record(
        task, target, tuple(facts["entity_path"]), sources[0] if sources else None,
        facts["multi_prompt"], *(sizes if known else (None, None)),
    )  # fmt: skip


def _find_objects(path: Path) -> np.ndarray:
    """Where the objects of a JSON array begin and end in a file, in bytes, int64 [n, 2].

    Bytes are taken for characters: all that JSON is built of is ASCII, and within texts nothing is
    read yet.
    """
    decoder, places = json.JSONDecoder(strict=False), []
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        tqdm(total=len(data), desc="reading", unit="B", unit_scale=True, disable=len(data) < BLOCK)
        as bar,
    ):  # fmt: skip
        at = _expect(data, 0, b"[", path)
        while data[at : at + 1] != b"]":
            if places:
                at = _expect(data, at, b",", path)
            text = data[at : at + BLOCK].decode("latin-1")
            shift, found = at, 0
            while True:
                try:
                    value, end = decoder.raw_decode(text, found)
                except (ValueError, RecursionError) as error:
                    if found and len(text) == BLOCK:
                        break  # cut in the middle: the next block begins here
                    raise _broken(data, shift + found, path) from error
                if type(value) is not dict or end - found > LONGEST:
                    raise _broken(data, shift + found, path)
                places.append((shift + found, shift + end))
                at = _skip(data, shift + end)
                if data[at : at + 1] != b"," or at - shift > BLOCK - LONGEST:
                    break
                found = _skip(data, at + 1) - shift
            bar.update(at - bar.n)
        if data[_skip(data, at + 1) :]:
            raise _broken(data, at + 1, path)
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def _skip(data: mmap.mmap, at: int) -> int:
    """The next place that is no blank."""
    while data[at : at + 1] in (b" ", b"\n", b"\r", b"\t"):
        at += 1
    return at


def _expect(data: mmap.mmap, at: int, sign: bytes, path: Path) -> int:
    """The next place behind a sign, which has to stand here."""
    at = _skip(data, at)
    if data[at : at + 1] != sign:
        raise _broken(data, at, path)
    return _skip(data, at + 1)


def _broken(data: mmap.mmap, at: int, path: Path) -> UserError:
    line = data[:at].count(b"\n") + 1
    return UserError(f"{path} is no JSON array of objects: see line {line}")


# ----------------------------------------------------------------------------------------------
# checking, and the order of training


def problems(records: RecordList, root: Path, slots: int) -> Iterator[str]:
    """A sentence for each record that cannot be trained on, with its position.

    Args:
        root: what its paths start from.
        slots: pictures that an instruction may have.
    """
    there: dict[str, bool] = {}
    for index in tqdm(
        range(len(records)), "checking", unit=" records", disable=len(records) < 1000
    ):
        try:
            record = records[index]
        except UserError as error:
            yield str(error)
            continue
        marks = len(split(record.prompt)) - 1
        where = f"{records.path}: record {index}"
        if marks != len(record.entities):
            yield f"{where} has {marks} marks and {len(record.entities)} pictures"
        if len(record.entities) > slots:
            yield f"{where} has {len(record.entities)} pictures, and the model takes {slots}"
        for path in record.paths:
            if path not in there:
                there[path] = (root / path).is_file()
            if not there[path]:
                yield f"{where}: there is no {root / path}"


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation [count] that depends on the seed and the epoch alone."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)
