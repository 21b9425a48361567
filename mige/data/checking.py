"""A list of records, checked as a whole before any work: what a model cannot read is told."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imagelab.errors import UserError, cut
from imagelab.io.tensors import misfit
from mige.data.records import SEE, NoTask, Record, RecordList
from mige.folder import (
    ADVICE,
    PARTS,
    config_of,
    find_folder,
    read_settings,
    read_tokenizer,
)
from mige.method.instruction import length_of, segment_ids
from mige.method.wording import MOST_WORDS, clean, prompt_for, split
from mige.request import counted

log = logging.getLogger(__name__)

MOST_TOLD = 100  # problems that are listed; of more there is a count
FIRST = 1000  # records, of which one has to have a picture
KEPT_PATHS = 1 << 16  # paths of which it is remembered whether they are there


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
            yield (
                f" has {counted(marks, 'mark')} <image> and {counted(pictures, 'picture')}; write "
                "<image> where each picture is meant"
            )
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
