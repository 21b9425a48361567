"""The three tabs of the page, in gradio; the other modules do the work."""

import functools
import html
import json
from dataclasses import replace
from pathlib import Path

import gradio as gr

from imagelab.errors import UserError, sentence
from mifo.learning.config import LearningConfig
from mifo.synthesis.config import SynthesisConfig
from mifo_page import draft as drafts
from mifo_page.draft import Draft
from mifo_page.fields import (
    Field,
    command_box,
    number,
    open_number,
    open_text,
    report_on_page,
    wire_command,
)
from mifo_page.job import STARTS, Job, as_words, learning_command, shown, synthesis_command
from mifo_page.places import Places, instances
from mifo_page.stage import staged, wire_stage

PROMPT = "a photo of <asset0> and <asset1>"


def read_asset(name: str) -> str:
    """A file beside this one: a style, a template, a script."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _picture_box(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, buttons=["fullscreen"], elem_id=name)


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
            classes = gr.Textbox(
                label="What are they? (such as car, or cat, fox: one for each mask)",
                placeholder="empty: not said",
                elem_id="classes",
            )
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

    def open_new(path, old, classes):
        """What was said of another photo goes."""
        return "" if old else classes, *show(drafts.open_photo(path))

    def open_known(name):
        opened = drafts.open_instance(places, name)
        try:
            classes = drafts.classes_of(opened)
        except UserError as error:  # said anew, it is mended
            gr.Warning(html.escape(sentence(error)))
            classes = ""
        return name, classes, *show(opened)

    def add_painted(old, painted):
        return show(drafts.add_painted_mask(_opened(old), painted))

    def add_files(old, paths):
        return show(functools.reduce(drafts.add_mask_file, paths, _opened(old)))

    def take_back(old):
        return show(replace(_opened(old), masks=_opened(old).masks[:-1]))

    def save_draft(old, name, classes, may_replace):
        drafts.save_instance(places, name, _opened(old), may_replace, as_words(classes))
        plan = shown([*learning_command(places, name, "new"), "--dry_run"])
        return plan, gr.update(choices=instances(places))

    outputs = [draft, brush, report]
    progress = {"show_progress_on": [report]}  # elsewhere it would cover the photo
    photo.upload(report_on_page(open_new), [photo, draft, classes], [classes, *outputs], **progress)
    known.input(report_on_page(open_known), known, [name, classes, *outputs], **progress)
    brush.input(report_on_page(add_painted), [draft, brush], outputs, **progress)
    upload.upload(report_on_page(add_files), [draft, upload], outputs, **progress)
    undo.click(report_on_page(take_back), draft, outputs, **progress)
    save.click(
        report_on_page(save_draft), [draft, name, classes, may_replace], [saved, known], **progress
    )


def _opened(draft: Draft | None) -> Draft:
    if draft is None:
        raise UserError("there is no photo yet; open one first")
    return draft


def learning_tab(places: Places, job: Job) -> tuple:
    """Start learning and watch it; returns the parts that are kept up to date."""
    default, fields = LearningConfig().recipe, {}
    with gr.Row():
        with gr.Column(scale=2):
            instance = gr.Dropdown(label="Instance", elem_id="instance")
            starts = [(text, key) for key, text in STARTS.items()]
            start = gr.Radio(starts, value="new", label="Start", elem_id="start")
            with gr.Row():
                fields["train_steps"] = number(default.train_steps, "Token steps", "train_steps")
                fields["reward_steps"] = number(
                    default.reward_steps, "Of these, with the reward", "reward_steps"
                )
                fields["finetune_steps"] = number(
                    default.finetune_steps, "Fine-tuning steps", "finetune_steps"
                )
                fields["seed"] = open_number("Seed", "learning_seed", int, "0", "empty: random")
            with gr.Accordion("More settings", open=False, elem_id="more_learning"):
                _more_learning(fields)
            command = command_box("learning_command")
            learn = gr.Button("Learn", variant="primary", elem_id="learn")
        with gr.Column(scale=3):
            curves = _picture_box("Losses", "curves")
            maps = _picture_box("Where each asset looks", "maps")
    make = functools.partial(learning_command, places)
    wire_command(job, "learning", [instance, start], fields, make, command, learn)
    return instance, curves, maps


def _more_learning(fields: dict[str, Field]) -> None:
    """The settings of learning that are seldom needed."""
    part = gr.Checkbox(
        label="Start the tokens from what the things are", elem_id="initialize_from_class"
    )
    fields["initialize_from_class"] = Field(part)
    part = gr.Textbox(
        "",
        label="Words to start the tokens from (empty: random)",
        placeholder="blue car, teal car",
        elem_id="initializer_tokens",
    )
    fields["initializer_tokens"] = Field(part, as_words)
    fields["class_prompt"] = open_text(
        "Prompt of the class images", "class_prompt", "empty: of what the things are, or of a chair"
    )
    with gr.Row():
        fields["num_class_images"] = open_number("Class images", "num_class_images", int)
        fields["checkpoint_steps"] = number(20, "Steps between curves", "checkpoint_steps")
    with gr.Row():
        name = "finetune_learning_rate"
        fields["learning_rate"] = open_number("Token rate", "learning_rate", float)
        fields[name] = open_number("Fine-tuning rate", name, float)


def painting_tab(places: Places, job: Job, tab: gr.Tab) -> tuple:
    """Prompt, boxes, pictures; returns the parts that are kept up to date."""
    first, fields = staged(PROMPT, {}), {}
    with gr.Row():
        with gr.Column(scale=2):
            model_id = gr.Dropdown(label="Learned", elem_id="model_id")
            prompt = gr.Textbox(PROMPT, label="Prompt", elem_id="prompt")
            fields["prompt"] = Field(prompt)
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
                steps = SynthesisConfig.num_inference_steps
                fields["num_images"] = number(4, "Pictures", "count")
                fields["seed"] = open_number(
                    "First seed", "painting_seed", int, "0", "empty: random"
                )
                fields["num_inference_steps"] = number(steps, "Steps", "steps")
            with gr.Accordion("More settings", open=False, elem_id="more_painting"):
                _more_painting(fields)
            command = command_box("painting_command")
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
    triggers = [tab.select, model_id.change, prompt.change]
    wire_stage(places, triggers, model_id, prompt, stage, boxes)
    make = functools.partial(synthesis_command, places)
    wire_command(job, "painting", [model_id, boxes], fields, make, command, paint)
    return model_id, gallery


def _more_painting(fields: dict[str, Field]) -> None:
    """The settings of painting that are seldom needed."""
    sizes = SynthesisConfig().guidance
    with gr.Row():
        fields["guidance_scale"] = open_number("Guidance scale", "guidance_scale", float)
        fields["step_scale"] = open_number("Box step scale", "step_scale", float)
    with gr.Row():
        fields["step_size"] = number(sizes.step_size, "Box step", "step_size", None)
        fields["final_step_size"] = number(
            sizes.final_step_size, "Box step at last", "final_step_size", None
        )
    part = gr.Textbox("", label="Negative prompt: what to keep away from", elem_id="negative")
    fields["negative_prompt"] = Field(part)
