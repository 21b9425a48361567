"""Training records in the release's format, read one by one out of lists of millions.

A list is a JSON array of objects:

    {"image": "x/replace/t/2.jpg", "width": 512, "height": 512,
     "source_path": ["x/replace/s/2.jpg"],
     "entity_path": ["x/replace/s/2.jpg", "x/replace/e/2.jpg"],
     "multi_prompt": "replace the cup in<imagehere>with<imagehere>"}

``entity_path`` names the pictures in the order of their marks. The task follows from the target's
path, or from a key "task". A list is checked as a whole before any work: `check_records`.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imagelab.errors import UserError, cut, shorten, shown
from imagelab.io.tensors import misfit
from imagelab.training.seeds import seed_for
from mige.folder import (
    ADVICE,
    PARTS,
    config_of,
    find_folder,
    read_settings,
    read_tokenizer,
)
from mige.lists import find_objects
from mige.method.instruction import length_of, segment_ids
from mige.method.wording import MOST_WORDS, TASKS, clean, prompt_for, split

log = logging.getLogger(__name__)

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
MOST_TOLD = 100  # problems that are listed; of more there is a count
FIRST = 1000  # records, of which one has to have a picture
KEPT_PATHS = 1 << 16  # paths of which it is remembered whether they are there
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
    read, see :func:`check_records`.
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
    sizes = [_read_side(facts, key) for key in ("width", "height")]
    return Record(
        task, target, tuple(facts["entity_path"]), sources[0] if sources else None,
        facts["multi_prompt"], *sizes,
    )  # fmt: skip


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


# ----------------------------------------------------------------------------------------------
# checking, and the order of training


@dataclass(frozen=True)
class Limits:
    """What a model can read.

    Attributes:
        slots: pictures that an instruction may have.
        prefixes: the sentences before instructions.
        queries: positions that a picture takes among the tokens.
        text_length: tokens of an instruction, with its pictures and its end.
    """

    slots: int
    prefixes: Mapping[str, str]
    tokenizer: object
    queries: int
    text_length: int

    @classmethod
    def of_folder(cls, folder: str | Path) -> "Limits":
        """Those of a model folder, of which no weights are read."""
        folder = find_folder(str(folder))
        settings = read_settings(folder)
        path, config = folder / "fusion" / PARTS["fusion"].config, config_of(folder, "fusion")
        if wrong := misfit(config, {"queries": int, "text_length": int}):
            raise UserError(f"{path}: {wrong}; {ADVICE}")
        return cls(
            settings["slots"], settings["prefixes"], read_tokenizer(folder / "tokenizer"),
            config["queries"], config["text_length"],
        )  # fmt: skip

    def prompt_of(self, record: Record, most: int | None = MOST_WORDS) -> str:
        """What the tokenizer gets in training; ``most``: words after which a text is cut."""
        return prompt_for(record.task, record.prompt, self.prefixes, True, most)

    def problems(self, record: Record) -> Iterator[str]:
        """What of a record cannot be read, in words that follow its name."""
        prompt = self.prompt_of(record, most=None)
        parts = split(prompt)  # of what is read: cleaning makes <ImageHere> a mark
        marks, pictures = len(parts) - 1, len(record.entities)
        if marks != pictures:
            yield f" has {marks} marks and {pictures} pictures"
        if pictures > self.slots:
            yield f" has {pictures} pictures, and the model takes {self.slots}"
        if not clean("".join(split(record.prompt.lower()))):
            yield " has no words"
        elif prompt != self.prompt_of(record):
            words = len(clean(record.prompt, most=None).split(" "))
            yield f" has {words} words, and the model reads {MOST_WORDS}"
        elif self._may_be_long(parts):
            length = length_of(segment_ids(self.tokenizer, prompt), self.queries)
            if length > self.text_length:
                yield (
                    f" takes {length} tokens with its pictures, and the model reads "
                    f"{self.text_length}"
                )

    def _may_be_long(self, parts: Sequence[str]) -> bool:
        """Whether texts have to be tokenised to know that they are short enough.

        A token is one letter or more, and a blank may come before each text.
        """
        most = length_of([range(len(text) + 1) for text in parts], self.queries)
        return most > self.text_length or not all(map(str.isascii, parts))


class BadRecords(UserError):
    """A list has records that cannot be trained on; ``lines`` tell of the first of them."""

    def __init__(self, message: str, lines: Sequence[str]):
        super().__init__(message)
        self.lines = list(lines)


class Alike:
    """What is wrong with every record so far, as long as it is the same with all."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.count = path, root, 0
        self.missing: dict[str, None] | None = {}  # pictures; None: some are there
        self.errors: dict[object, UserError] | None = {}  # by what is told; None: some can be read

    def add_read(self, record: Record, lacking: Sequence[str]) -> None:
        """A record that can be read, and those of its pictures that are missing."""
        self.count, self.errors = self.count + 1, None
        if self.missing is not None:
            self.missing.update(dict.fromkeys(lacking))
            self.missing = self.missing if len(lacking) == len(record.paths) else None

    def add_unread(self, error: UserError) -> None:
        """A record that cannot be read."""
        self.count, self.missing = self.count + 1, None
        if self.errors is not None:
            reason = error.__cause__
            self.errors.setdefault(NoTask if type(reason) is NoTask else str(reason), error)
            self.errors = self.errors if len(self.errors) == 1 else None

    def check_root(self, of: str = "") -> None:
        """Raises UserError where not one picture is there; ``of``: of which records."""
        if self.missing and len(self.missing) > 1:
            raise UserError(
                f"{self.path}: none of the {len(self.missing)} pictures{of} is under {self.root}, "
                f"such as {cut(next(iter(self.missing)))}: is --root right?"
            )

    def check_reason(self) -> None:
        """Raises UserError where no record can be read, all for the same reason."""
        if self.errors and self.count > 1:
            error = next(iter(self.errors.values()))
            raise UserError(f"all {self.count} records are wrong alike: {error}; {SEE}")


def check_records(records: RecordList, root: Path, limits: Limits) -> np.ndarray:
    """The indices of the records to train on, int64 [n], once all are found to be right.

    Those that are too wide are left out, as in the release. Pictures are looked for, not opened.

    Args:
        root: what their paths start from.

    Raises:
        BadRecords: some cannot be trained on; the first MOST_TOLD problems are logged.
        UserError: all are wrong alike, or none is left.
    """
    is_there = lru_cache(KEPT_PATHS)(lambda path: (root / path).is_file())
    kept = np.ones(len(records), dtype=bool)
    lines, count, alike = [], 0, Alike(records.path, root)
    hidden = len(records) < 1000
    for index in tqdm(range(len(records)), "checking", unit=" records", disable=hidden):
        try:
            record = records[index]
            if record.is_wide:
                kept[index] = False
                continue
            where = f"{records.path}: record {index}"
            told = [where + problem for problem in limits.problems(record)]
            lacking = [path for path in record.paths if not is_there(path)]
            told += [f"{where}: there is no {root / path}" for path in lacking]
            alike.add_read(record, lacking)
        except UserError as error:
            told = [str(error)]
            alike.add_unread(error)
        if alike.count == FIRST:
            alike.check_root(f" of the first {FIRST} records")
        count += len(told)
        lines += told[: MOST_TOLD - len(lines)]
    alike.check_root()
    alike.check_reason()
    if wide := len(kept) - np.count_nonzero(kept):
        log.info("%s: %d records are wider than 4 : 1 and left out", records.path, wide)
    if count:
        tell(lines, count)
        raise BadRecords(
            f"{records.path} has {count} problem{'s' * (count > 1)}, listed above; mend these "
            "records, or leave them out",
            lines,
        )
    if not kept.any():
        raise UserError(f"{records.path} has no records that are not too wide; give another list")
    return np.flatnonzero(kept)


def tell(lines: Sequence[str], count: int) -> None:
    """Log lines, a problem each, and how many there are beside the first of them."""
    for line in lines[:MOST_TOLD]:
        log.warning("%s", " ".join(line.split()))
    if count > (told := min(len(lines), MOST_TOLD)):
        log.warning("and %d more", count - told)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation [count] that depends on the seed and the epoch alone."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)
