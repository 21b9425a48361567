"""The tab of MIGE: drop pictures, write an instruction in which they stand, see what it makes."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from imagelab.errors import UserError
from mifo_page.fields import Field, command_box, number, open_number, wire_command
from mifo_page.job import Job, command
from mifo_page.places import INSTRUCTED, Places
from mige.config import PaintingConfig
from mige.method.wording import MARK
from mige.request import written_marks

ABOUT = (
    "Write <image> where a picture is meant; subjects take theirs in their order. Such as: a "
    "<image> and a <image> on the grass. Or, with a picture to edit: make the car in <image> blue; "
    "replace the fox in <image> with <image>."
)


def instruction_command(
    places: Places,
    instruction: str,
    source: str | None,
    pictures: Sequence[str],
    order: int = 1,
    **settings,
) -> list[str]:
    """``mige.edit`` where there is a picture to edit, and ``mige.generate`` where there is none.

    Args:
        source: file of the picture to edit; ``order`` says which mark is its, from 1.
        pictures: files of the others, in the order of their marks.

    Raises:
        UserError: marks and pictures differ in number.
    """
    check_marks(instruction, len(pictures) + bool(source), is_edit=bool(source) and not pictures)
    values = {
        "model": places.mige_model,
        "output_path": str(Path(places.output_path) / INSTRUCTED),
        "device": places.device,
    }
    if source:
        values |= {"instruction": instruction, "source": source, "order": order}
    else:
        values["prompt"] = instruction
    defaults = PaintingConfig().settings() | {"order": 1}
    flags = ["--images", *pictures] if pictures else []
    module = "mige.edit" if source else "mige.generate"
    given = ("model", "output_path", "instruction", "source", "prompt")
    return command(module, defaults, values | settings, flags, given)


def check_marks(instruction: str, pictures: int, is_edit: bool) -> None:
    """Raises UserError unless each picture has its mark; one to edit alone may go without."""
    if not instruction.strip():
        raise UserError("the instruction is empty; write what to paint, or what to change")
    marks = written_marks(instruction).count(MARK)
    if max(marks, is_edit) != pictures:
        raise UserError(
            f"the instruction has {marks} <image> and there are {pictures} pictures; write one "
            "for each"
        )


def instruct_tab(places: Places, job: Job) -> tuple:
    """Pictures, instruction, results; returns the parts that are kept up to date."""
    fields: dict[str, Field] = {}
    with gr.Row():
        with gr.Column(scale=2):
            with gr.Row(equal_height=True):
                source = gr.Image(
                    label="To edit, if anything", type="filepath", image_mode=None,
                    sources=["upload", "clipboard"], height=220, elem_id="source",
                )  # fmt: skip
                pictures = gr.Gallery(
                    label="Subjects", type="filepath",
                    file_types=["image"], columns=2, height=220, interactive=True,
                    elem_id="subjects",
                )  # fmt: skip
            instruction = gr.Textbox(
                label="Instruction",
                info=ABOUT,
                elem_id="instruction",
            )
            with gr.Row():
                fields["num_images"] = number(2, "Pictures", "instruct_count")
                fields["seed"] = open_number(
                    "First seed", "instruct_seed", int, "0", "empty: random"
                )
                fields["order"] = number(1, "<image> to edit", "order")
            with gr.Accordion("More settings", open=False, elem_id="more_instruct"), gr.Row():
                fields["steps"] = open_number("Steps", "instruct_steps", int, empty="the model's")
                fields["text_scale"] = open_number(
                    "Weight of the instruction", "text_scale", float, empty="the model's"
                )
                fields["image_scale"] = open_number(
                    "Weight of the picture to edit", "image_scale", float, empty="the model's"
                )
            shown = command_box("instruct_command")
            button = gr.Button("Carry out", variant="primary", elem_id="instruct")
        with gr.Column(scale=3):
            sheet = gr.Image(
                label="Given, and made", interactive=False,
                buttons=["fullscreen"], elem_id="sheet",
            )  # fmt: skip
            results = gr.Gallery(
                label="Pictures, newest first", columns=4, object_fit="contain", height=420,
                buttons=["download", "fullscreen"], interactive=False, elem_id="instructed",
            )  # fmt: skip

    def make(instruction, source, pictures, **settings):
        files = [path for path, _ in pictures or []]
        return instruction_command(places, instruction, source, files, **settings)

    chosen = [instruction, source, pictures]
    wire_command(job, "carrying out:", chosen, fields, make, shown, button)
    return sheet, results
