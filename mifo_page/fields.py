"""Fields that settings are read from, and the command that they make."""

import functools
import html
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import gradio as gr

from imagelab.errors import FAILURES, UserError, sentence
from mifo_page.job import Job, shown

OPEN = "empty: the model's own"


class Field(NamedTuple):
    """A part of the page, and what the command takes for the value in it; None: nothing.

    ``read`` raises UserError for a value that it cannot take.
    """

    part: gr.components.Component
    read: Callable[[object], object] = lambda value: value


def number(value: float, label: str, name: str, precision: int | None = 0) -> Field:
    """A number that has to be there; ``precision`` 0: a whole one, None: any."""

    def read(value):
        if value is None:
            raise UserError(f"{label} is empty; give a number")
        return value

    return Field(
        gr.Number(value, label=label, precision=precision, min_width=100, elem_id=name), read
    )


def open_number(label: str, name: str, kind: type, value: str = "", empty: str = OPEN) -> Field:
    """A number that may be left out; ``kind``: int or float, ``empty``: what that means.

    It is a text: a gr.Number shows 0 where it has no value.
    """

    def read(text):
        if not text.strip():
            return None
        try:
            return kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise UserError(f"{label} is {text!r}; give a {whole}number, or nothing") from None

    part = gr.Textbox(
        value, label=label, placeholder=empty, max_lines=1, min_width=100, elem_id=name
    )
    return Field(part, read)


def open_text(label: str, name: str, empty: str) -> Field:
    """A text that may be left out; ``empty`` says what that means."""
    part = gr.Textbox("", label=label, placeholder=empty, elem_id=name)
    return Field(part, lambda text: text.strip() or None)


def command_box(name: str) -> gr.Textbox:
    return gr.Textbox(
        label="The command", lines=3, buttons=["copy"], elem_id=name, elem_classes="code"
    )


def report_on_page(function: Callable) -> Callable:
    """The function; a failure that a user can mend is shown on the page in a sentence."""

    @functools.wraps(function)
    def wrapped(*values):
        try:
            return function(*values)
        except FAILURES as error:
            raise gr.Error(html.escape(sentence(error)), print_exception=False) from error

    return wrapped


def wire_command(
    job: Job,
    title: str,
    chosen: Sequence[gr.components.Component],
    fields: Mapping[str, Field],
    make: Callable[..., list[str]],
    command: gr.Textbox,
    button: gr.Button,
) -> None:
    """Show the command that the page makes; the button runs that very command.

    ``make`` gets the values of the ``chosen`` parts, the first of which is a name, and what is read
    from the fields, by setting.
    """

    def argv(*values):
        names, given = values[: len(chosen)], values[len(chosen) :]
        pairs = zip(fields.items(), given, strict=True)
        return make(*names, **{name: field.read(value) for (name, field), value in pairs})

    def show(*values):
        try:
            return shown(argv(*values))
        except UserError as error:
            return f"# {sentence(error)}"

    def run(*values):
        job.start(f"{title} {values[0]}", argv(*values))

    parts = [*chosen, *(field.part for field in fields.values())]
    gr.on([part.change for part in parts], show, parts, command, show_progress="hidden")
    button.click(report_on_page(run), parts)
