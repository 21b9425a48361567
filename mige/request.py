"""What the model is asked for: an instruction and its pictures."""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from imagelab.errors import UserError, shorten
from mige.method.wording import (
    MARK,
    MOST_WORDS,
    TASKS,
    WRITTEN,
    name_source,
    prompt_for,
    split,
)


@dataclass(frozen=True)
class Request:
    """One item.

    Attributes:
        task: one of :data:`~mige.method.wording.TASKS`.
        text: the instruction, with :data:`~mige.method.wording.MARK` for each picture.
        pictures: RGB, in the order of the marks.
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
        together.insert(source_place, source)
        request = Request("subject_edit", text, tuple(together), source_place, name)
    check_request(request)
    return request


def written_marks(text: str) -> str:
    """An instruction with marks as the model knows them.

    ``<image>`` becomes ``<imagehere>``, without the blanks beside it. Blanks beside a mark that is
    written ``<imagehere>`` are meant, and stay.
    """
    if MARK in text:
        return text
    return WRITTEN.sub(MARK, text)


def check_request(request: Request) -> None:
    """Raises UserError for a request that no model can carry out."""
    if request.task not in TASKS:
        raise UserError(
            f"there is no task {shorten(request.task)!r}; the tasks are {', '.join(TASKS)}"
        )
    try:
        request.text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the instruction {shorten(request.text)!r} is not UTF-8 text") from None
    parts = split(request.instruction)
    marks, pictures = len(parts) - 1, len(request.pictures)
    shown = shorten(request.text)
    if not "".join(split(request.text)).strip():
        raise UserError(f"the instruction {shown!r} has no words; say what is to be painted")
    if marks > pictures:
        raise UserError(
            f"the instruction {shown!r} has {_count(marks, 'mark')} <image> and there "
            f"{_are(pictures, 'picture')}; give a picture for each mark"
        )
    if marks < pictures:
        raise UserError(
            f"there {_are(pictures, 'picture')} and the instruction {shown!r} has "
            f"{_count(marks, 'mark')} <image>; write <image> where each picture is meant"
        )


def _count(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'s' * (number != 1)}"


def _are(number: int, thing: str) -> str:
    return f"{'is' if number == 1 else 'are'} {_count(number, thing)}"
