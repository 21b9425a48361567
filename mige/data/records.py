"""Training records in the release's format, read one by one out of lists of millions.

A list is a JSON array of objects:

    {"image": "x/replace/t/2.jpg", "width": 512, "height": 512,
     "source_path": ["x/replace/s/2.jpg"],
     "entity_path": ["x/replace/s/2.jpg", "x/replace/e/2.jpg"],
     "multi_prompt": "replace the cup in<imagehere>with<imagehere>"}

``entity_path`` names the pictures in the order of their marks. The task follows from the target's
path, or from a key "task". A list is checked as a whole before any work: `mige.data.checking`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagelab.errors import UserError, shorten, shown
from imagelab.io.tensors import misfit
from imagelab.training.seeds import seed_for
from mige.lists import find_objects
from mige.method.wording import TASKS
from mige.request import written_marks

#: Parts of a target's path that tell its task, the first that is in it.
PATHS = {
    "Subjects200K": "subject",
    "instructpix2pix": "edit",
    "replace": "subject_edit",
    "add": "subject_edit",
}
#: By the same parts, the release's folders of features.
FEATURE_FOLDERS = {
    "Subjects200K": "vae_subject200k",
    "instructpix2pix": "vae_instructpix",
    "replace": "vae_replace",
    "add": "vae_add",
}
FORM = {"image": str, "multi_prompt": str, "entity_path": [str]}
MOST_ASPECT = 4.0  # width over height, beyond which the release leaves a record out
SEE = "docs/mige_training.md shows a list"


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
    read, see `mige.data.checking`.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"there is no list {path}; give a JSON file of records")
        self._places = find_objects(path, SEE)
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


class NoTask(UserError):
    """A record says nothing of its task."""


def parse_record(facts: dict) -> Record:
    """A record out of its JSON object; UserError where it is not as it should be."""
    if wrong := misfit(facts, FORM, "it"):
        raise UserError(wrong)
    sources = facts.get("source_path") or []
    if misfit(sources, [str]) or len(sources) > 1:
        raise UserError("source_path is no list of one path")
    task, target = facts.get("task"), facts["image"]
    if not all(map(_is_utf8, (target, *facts["entity_path"], *sources, facts["multi_prompt"]))):
        raise UserError("it holds text that is not UTF-8")
    if task is None:
        task = PATHS.get(part_of(target))
        if task is None:
            raise NoTask(
                f'the path {shorten(target)!r} tells no task; write "task", which is one of '
                f"{', '.join(TASKS)}"
            )
    if task not in TASKS:
        raise UserError(
            f"there is no task {shorten(str(task))!r}; the tasks are {', '.join(TASKS)}"
        )
    if (task == "subject") == bool(sources):
        raise UserError(f"a record of {task} has {len(sources) or 'no'} source_path")
    check_pictures(task, facts["entity_path"], sources)
    sizes = [_read_side(facts, key) for key in ("width", "height")]
    return Record(
        task, target, tuple(facts["entity_path"]), sources[0] if sources else None,
        written_marks(facts["multi_prompt"]), *sizes,
    )  # fmt: skip


def check_pictures(task: str, entities: Sequence[str], sources: Sequence[str]) -> None:
    """Raises UserError where a task has other pictures than when it is painted.

    Instructions to edit may do without any, as where it is to be measured what pictures bring.
    """
    if task == "subject" or not entities:
        return
    if sources[0] not in entities:
        raise UserError(
            "entity_path lacks the source; name all pictures there, in the order of their marks"
        )
    if (task == "edit") != (len(entities) == 1):
        raise UserError(
            f"a record of {task} has {len(entities)} entity_path; an edit has the source alone, "
            "and a subject_edit the source and others"
        )


def _read_side(facts: dict, key: str) -> int | None:
    """The pixels of a side, if the record tells them."""
    side = facts.get(key)
    if wrong := misfit(side, (int, None), key):
        raise UserError(wrong)
    if side is not None and side < 1:
        raise UserError(f"{key} is {shown(side)}; give the picture's pixels, or leave it out")
    return side


def part_of(target: str) -> str | None:
    """The first of PATHS that is in a target's path."""
    return next((part for part in PATHS if part in target), None)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation [count] that depends on the seed and the epoch alone."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)
