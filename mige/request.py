"""What the model is asked for: an instruction and its pictures."""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from imagelab.errors import UserError, shorten
from mige.method.wording import (
    MARK,
    MOST_WORDS,
    SHORT,
    TASKS,
    WRITTEN,
    clean,
    name_source,
    prompt_for,
    split,
)

LONGEST = 4000  # letters of an instruction


@dataclass(frozen=True)
class Request:
    """One item.

    Attributes:
        task: one of :data:`~mige.method.wording.TASKS`.
        text: the instruction, with :data:`~mige.method.wording.MARK` for each picture.
        pictures: RGB, in the order of the marks. The one of a plain edit may be named again: "make
            the photo black and white, keep the photo sharp".
        source: which of the pictures is to be edited; None for the task "subject".
        name: what the item's random draws are called by: no two items of a list share it.
        is_global: an edit of the whole picture, which its prompt says where it has no mark.
    """

    task: str
    text: str
    pictures: tuple[Image.Image, ...]
    source: int | None = None
    name: str | int = 0
    is_global: bool = False

    def prompt(self, prefixes: Mapping[str, str]) -> str:
        """What the tokenizer gets; a UserError where it would be cut."""
        prompt = prompt_for(self.task, self.instruction, prefixes)
        whole = prompt_for(self.task, self.instruction, prefixes, most=None)
        if prompt != whole:
            raise UserError(
                f"the instruction {shorten(self.text)!r} has {len(whole.split(' '))} words with "
                f"those that the model puts before it, and {MOST_WORDS} are read; shorten it"
            )
        return prompt

    @property
    def marks(self) -> int:
        """How often the instruction names a picture."""
        return len(split(self.instruction)) - 1

    @property
    def instruction(self) -> str:
        """The text, where an edit names its picture."""
        if self.task != "edit":
            return self.text
        return name_source(self.text, self.is_global)


def make_request(
    instruction: str,
    pictures: tuple[Image.Image, ...] = (),
    source: Image.Image | None = None,
    source_place: int = 0,
    name: str | int = 0,
    is_global: bool = False,
) -> Request:
    """A request out of what a person gives; its task follows from that.

    Args:
        instruction: with ``<image>`` (or ``<imagehere>``) where a picture is meant. An instruction
            that edits a source without any other picture may leave the mark out.
        pictures: the subjects, in the order of their marks.
        source: the picture to edit; it has the mark of number ``source_place``, from 0.

    Raises:
        UserError: marks and pictures do not fit, or there are no words.
    """
    text = written_marks(instruction)
    if source is None:
        request = Request("subject", text, tuple(pictures), name=name)
    elif not pictures:
        request = Request("edit", text, (source,), 0, name, is_global)
    else:
        together = list(pictures)
        if not 0 <= source_place <= len(together):
            raise UserError(
                f"the source's place is {source_place}; give a number from 0 to {len(together)}"
            )
        together.insert(source_place, source)
        request = Request("subject_edit", text, tuple(together), source_place, name)
    check_request(request)
    return request


def written_marks(text: str) -> str:
    """An instruction with marks as the model knows them.

    ``<image>`` becomes ``<imagehere>``, without the blanks beside it. Where a text has a mark that
    is written ``<imagehere>``, the blanks beside it are meant, and stay.

    Raises UserError for a text that is longer than any prompt.
    """
    if len(text) > LONGEST:
        raise UserError(
            f"the instruction {shorten(text)!r} has {len(text)} letters; give at most {LONGEST}"
        )
    return (SHORT if MARK in text else WRITTEN).sub(MARK, text)


def check_request(request: Request) -> None:
    """Raises UserError for a request that no model can carry out."""
    if request.task not in TASKS:
        raise UserError(
            f"there is no task {shorten(request.task)!r}; the tasks are {', '.join(TASKS)}"
        )
    try:
        request.text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the instruction {shorten(request.text)!r} is not UTF-8 text; write it so"
        ) from None
    marks, pictures = len(split(request.text)) - 1, len(request.pictures)
    if request.task == "edit":
        marks = max(marks, 1)  # of the one that it may leave out
    shown = shorten(request.text)
    added = request.instruction.removesuffix(f" in{MARK}").removesuffix(f" of{MARK}")
    if not all(clean("".join(split(text))) for text in (request.text, added)):
        raise UserError(f"the instruction {shown!r} has no words; say what is to be painted")
    if marks > pictures:
        raise UserError(
            f"the instruction {shown!r} has {counted(marks, 'mark')} <image> and there "
            f"{_are(pictures, 'picture')}; give a picture for each mark"
        )
    if marks < pictures:
        raise UserError(
            f"there {_are(pictures, 'picture')} and the instruction {shown!r} has "
            f"{counted(marks, 'mark')} <image>; write <image> where each picture is meant"
        )


def counted(number: int, thing: str) -> str:
    """How many of a thing there are, in words of a message."""
    return f"{number or 'no'} {thing}{'s' * (number != 1)}"


def _are(number: int, thing: str) -> str:
    return f"{'is' if number == 1 else 'are'} {counted(number, thing)}"
