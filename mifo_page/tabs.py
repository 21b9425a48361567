"""The three tabs of the page, in gradio; the other modules do the work."""

import functools
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gradio as gr

from imagelab.boxes import PALETTE, parse_boxes
from imagelab.errors import FAILURES, UserError, sentence
from mifo.learning.config import LearningConfig
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import preset_boxes
from mifo.tokens import ASSET
from mifo_page import draft as drafts
from mifo_page.draft import Draft
from mifo_page.job import STARTS, Job, as_words, learning_command, shown, synthesis_command
from mifo_page.places import Places, instances

PROMPT = "a photo of <asset0> and <asset1>"


def read_asset(name: str) -> str:
    """A file beside this one: a style, a template, a script."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def report_on_page(function: Callable) -> Callable:
    """The function; a failure that a user can mend is shown on the page in a sentence."""

    @functools.wraps(function)
    def wrapped(*values):
        try:
            return function(*values)
        except FAILURES as error:
            raise gr.Error(html.escape(sentence(error)), print_exception=False) from error

    return wrapped


def _command_box(name: str) -> gr.Textbox:
    return gr.Textbox(
        label="The command", lines=3, buttons=["copy"], elem_id=name, elem_classes="code"
    )


def _number(value: float, label: str, name: str, precision: int | None = 0) -> gr.Number:
    return gr.Number(value, label=label, precision=precision, min_width=100, elem_id=name)


def _picture_box(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, buttons=["fullscreen"], elem_id=name)


# ----------------------------------------------------------------------------------------------
# the tabs


def masks_tab(places: Places) -> None:
    """Open a photo, paint or upload a mask for each thing, save the instance folder."""
    draft = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3):
            with gr.Row(equal_height=True):
                photo = gr.UploadButton(
                    "Open a photo", file_types=["image"], variant="primary", elem_id="photo"
                )
                known = gr.Dropdown(
                    instances(places), value=None, label="or an instance", elem_id="open"
                )
            brush = gr.HTML(
                {"photo": ""},
                html_template=read_asset("brush.html"),
                css_template=read_asset("brush.css"),
                js_on_load=read_asset("brush.js"),
                elem_id="brush",
            )
            with gr.Row():
                upload = gr.UploadButton(
                    "Upload masks", file_types=["image"], file_count="multiple", elem_id="upload"
                )
                undo = gr.Button("Take back the last mask", elem_id="undo")
        with gr.Column(scale=2):
            report = gr.Textbox(label="Coverage and overlap", lines=4, elem_id="report")
            name = gr.Textbox(label="Name", placeholder="my_things", elem_id="name")
            may_replace = gr.Checkbox(label="Replace the instance of that name", elem_id="replace")
            save = gr.Button("Save the instance", variant="primary", elem_id="save")
            saved = gr.Textbox(
                label="Saved: the command that checks it and plans to learn it",
                buttons=["copy"],
                elem_id="saved",
                elem_classes="code",
            )

    def show(new: Draft):
        return new, {"photo": drafts.as_data(drafts.overlay(new))}, drafts.report(new)

    def open_known(name):
        return name, *show(drafts.open_instance(places, name))

    def add_painted(old, painted):
        return show(drafts.add_painted_mask(_opened(old), painted))

    def add_files(old, paths):
        return show(functools.reduce(drafts.add_mask_file, paths, _opened(old)))

    def take_back(old):
        return show(replace(_opened(old), masks=_opened(old).masks[:-1]))

    def save_draft(old, name, may_replace):
        drafts.save_instance(places, name, _opened(old), may_replace)
        plan = shown([*learning_command(places, name, "new"), "--dry_run"])
        return plan, gr.update(choices=instances(places))

    outputs = [draft, brush, report]
    progress = {"show_progress_on": [report]}  # elsewhere it would cover the photo
    photo.upload(
        report_on_page(lambda path: show(drafts.open_photo(path))), photo, outputs, **progress
    )
    known.input(report_on_page(open_known), known, [name, *outputs], **progress)
    brush.input(report_on_page(add_painted), [draft, brush], outputs, **progress)
    upload.upload(report_on_page(add_files), [draft, upload], outputs, **progress)
    undo.click(report_on_page(take_back), draft, outputs, **progress)
    save.click(report_on_page(save_draft), [draft, name, may_replace], [saved, known], **progress)


def _opened(draft: Draft | None) -> Draft:
    if draft is None:
        raise UserError("there is no photo yet; open one first")
    return draft


def learning_tab(places: Places, job: Job) -> tuple:
    """Start learning and watch it; returns the parts that are kept up to date."""
    default = LearningConfig().recipe
    with gr.Row():
        with gr.Column(scale=2):
            instance = gr.Dropdown(label="Instance", elem_id="instance")
            starts = [(text, key) for key, text in STARTS.items()]
            start = gr.Radio(starts, value="new", label="Start", elem_id="start")
            with gr.Row():
                steps = _number(default.train_steps, "Token steps", "train_steps")
                more = _number(default.finetune_steps, "Fine-tuning steps", "finetune_steps")
                seed = _number(0, "Seed", "learning_seed")
            with gr.Accordion("More settings", open=False, elem_id="more_learning"):
                words = gr.Textbox(
                    "",
                    label="Words to start the tokens from (empty: random)",
                    placeholder="blue car, teal car",
                )
                kind = gr.Textbox(default.class_prompt, label="Prompt of the class images")
                with gr.Row():
                    count = _number(default.num_class_images, "Class images", "num_class_images")
                    tokens = _number(default.learning_rate, "Token rate", "learning_rate", None)
                    rate = _number(
                        default.stage_two_learning_rate,
                        "Fine-tuning rate",
                        "finetune_learning_rate",
                        None,
                    )
                    every = _number(20, "Steps between curves", "checkpoint_steps")
            command = _command_box("learning_command")
            learn = gr.Button("Learn", variant="primary", elem_id="learn")
        with gr.Column(scale=3):
            curves = _picture_box("Losses", "curves")
            maps = _picture_box("Where each asset looks", "maps")

    def argv(instance, start, steps, more, seed, words, kind, count, tokens, rate, every):
        return learning_command(
            places,
            instance,
            start,
            train_steps=steps,
            finetune_steps=more,
            seed=seed,
            initializer_tokens=as_words(words),
            class_prompt=kind,
            num_class_images=count,
            learning_rate=tokens,
            finetune_learning_rate=None if rate == default.stage_two_learning_rate else rate,
            checkpoint_steps=every,
        )

    settings = [instance, start, steps, more, seed, words, kind, count, tokens, rate, every]
    _wire_command(job, "learning", settings, argv, command, learn)
    return instance, curves, maps


def painting_tab(places: Places, job: Job) -> tuple:
    """Prompt, boxes, pictures; returns the parts that are kept up to date."""
    default, first = SynthesisConfig(), _staged(PROMPT)
    with gr.Row():
        with gr.Column(scale=2):
            model_id = gr.Dropdown(label="Learned", elem_id="model_id")
            prompt = gr.Textbox(PROMPT, label="Prompt", elem_id="prompt")
            stage = gr.HTML(
                first,
                html_template="<div class='stage'></div>",
                css_template=read_asset("boxes.css"),
                js_on_load=read_asset("boxes.js"),
                elem_id="stage",
            )
            boxes = gr.Textbox(
                json.dumps(first["boxes"]),
                label="Boxes",
                info="Drag them, or write left, top, right, bottom of each asset of the prompt.",
                elem_id="boxes",
            )
            with gr.Row():
                count = _number(4, "Pictures", "count")
                seed = _number(0, "First seed", "painting_seed")
                steps = _number(default.num_inference_steps, "Steps", "steps")
            with gr.Accordion("More settings", open=False, elem_id="more_painting"):
                with gr.Row():
                    guidance = default.guidance
                    scale = _number(
                        default.guidance_scale, "Guidance scale", "guidance_scale", None
                    )
                    first_size = _number(guidance.step_size, "Box step", "step_size", None)
                    last_size = _number(
                        guidance.final_step_size, "Box step at last", "final_step_size", None
                    )
                negative = gr.Textbox("", label="Negative prompt: what to keep away from")
            command = _command_box("painting_command")
            paint = gr.Button("Paint", variant="primary", elem_id="paint")
        with gr.Column(scale=3):
            gallery = gr.Gallery(
                label="Pictures, newest first",
                columns=4,
                object_fit="contain",
                height=700,
                buttons=["download", "fullscreen"],
                interactive=False,
                elem_id="gallery",
            )

    def argv(model_id, prompt, boxes, count, seed, steps, scale, first_size, last_size, negative):
        return synthesis_command(
            places,
            model_id,
            boxes,
            prompt=prompt,
            num_images=count,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=scale,
            step_size=first_size,
            final_step_size=last_size,
            negative_prompt=negative,
        )

    _wire_stage(prompt, stage, boxes)
    sizes = [first_size, last_size]
    settings = [model_id, prompt, boxes, count, seed, steps, scale, *sizes, negative]
    _wire_command(job, "painting", settings, argv, command, paint)
    return model_id, gallery


# ----------------------------------------------------------------------------------------------
# what updates what


def _staged(prompt: str) -> dict:
    """What the stage shows for a prompt: its assets in the preset boxes."""
    names = ASSET.findall(prompt)
    boxes = [list(box) for box in preset_boxes(len(names))] if names else []
    return {"names": names, "boxes": boxes, "colors": [f"rgb{color}" for color in PALETTE]}


def _wire_stage(prompt: gr.Textbox, stage: gr.HTML, boxes: gr.Textbox) -> None:
    """Update the stage from the prompt and the written boxes, and the written boxes from it."""

    def from_prompt(text, old):
        if ASSET.findall(text) == old["names"]:
            return gr.skip(), gr.skip()
        new = _staged(text)
        return new, json.dumps(new["boxes"])

    def from_text(text, old):
        new = [list(box) for box in parse_boxes(text)]
        if len(new) != len(old["names"]):
            raise UserError(
                f"there are {len(new)} boxes and {len(old['names'])} assets in the prompt; "
                "give one box for each"
            )
        return {**old, "boxes": new}

    prompt.change(from_prompt, [prompt, stage], [stage, boxes], show_progress="hidden")
    stage.input(
        lambda new: json.dumps(new["boxes"]),
        stage,
        boxes,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    written = [boxes.blur, boxes.submit]
    gr.on(written, report_on_page(from_text), [boxes, stage], stage, show_progress="hidden")


def _wire_command(
    job: Job,
    title: str,
    settings: Sequence[gr.components.Component],
    argv: Callable,
    command: gr.Textbox,
    button: gr.Button,
) -> None:
    """Show the command that the settings make; the button runs that very command."""

    def show(*values):
        try:
            return shown(argv(*values))
        except UserError as error:
            return f"# {sentence(error)}"

    def run(*values):
        job.start(f"{title} {values[0]}", argv(*values))

    gr.on([one.change for one in settings], show, settings, command, show_progress="hidden")
    button.click(report_on_page(run), settings)
