"""The whole page, in gradio: its tabs, the running command, and the timer that updates them."""

import html
import logging
from collections.abc import Callable, Sequence
from functools import partial

import gradio as gr

from imagelab.errors import FAILURES, sentence
from mifo_page import places as folders
from mifo_page.fields import report_on_page
from mifo_page.instruct import instruct_tab
from mifo_page.job import LINES, Job
from mifo_page.places import Places
from mifo_page.tabs import learning_tab, masks_tab, painting_tab, read_asset

log = logging.getLogger(__name__)

CSS = read_asset("page.css")
TITLE = "MIFO and MIGE"
ABOUT = (
    "Mask the things in a photo, learn them, paint each inside its box. Or give pictures, and say "
    "what to make of them."
)


def theme() -> gr.Theme:
    """Fonts of the system: none is fetched."""
    plain, code = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="blue", font=plain, font_mono=code)


def build_page(places: Places, job: Job) -> gr.Blocks:
    """The whole page; ``job`` runs its commands."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {TITLE}\n{ABOUT}")
        with gr.Tab("1  Masks"):
            masks_tab(places)
        with gr.Tab("2  Learn"):
            instance, curves, maps = learning_tab(places, job)
        with gr.Tab("3  Paint") as tab:
            model_id, gallery = painting_tab(places, job, tab)
        with gr.Tab("Instructions"):
            made = instruct_tab(places, job)
        with gr.Row(equal_height=True):
            status = gr.Textbox(label="Now", scale=5, elem_id="status")
            stop = gr.Button("Stop", variant="stop", scale=1, elem_id="stop")
        printed = gr.Textbox(
            label="What the command prints",
            info="Stop lets learning finish its step and saves it, to go on from there later; "
            "a second press ends it at once.",
            lines=LINES,
            max_lines=LINES,
            elem_id="log",
            elem_classes="code",
        )
        stop.click(report_on_page(job.stop))
        _watch(places, job, instance, model_id, [status, printed, curves, maps, gallery, *made])
    return page


def _watch(places: Places, job: Job, instance, model_id, shown: list) -> None:
    """Every 1.5 seconds, show what the command prints and what is new in the folders."""
    seen = gr.State({})
    inputs = [instance, model_id, seen]
    outputs = [seen, instance, model_id, *shown]
    gr.Timer(1.5).tick(partial(look, places, job), inputs, outputs, show_progress="hidden")


def look(places: Places, job: Job, instance: str | None, model_id: str | None, before: dict):
    """The stamps of now, and what to show of what has changed since the stamps ``before``.

    A part that fails is reported once and left empty; the others are shown all the same.
    """
    now = folders.stamps(places, instance, model_id)
    new = {key for key in now if now[key] != before.get(key)}
    choices, figures, made = ([gr.skip()] * 2 for _ in range(3))
    pictures = gr.skip()
    if "names" in new:
        choices = [
            _choose(_found(folders.instances, places), instance),
            _choose(_found(folders.learned, places), model_id),
        ]
    if "learning" in new:
        figures = [
            _found(folders.curves, places, instance),
            _found(folders.attention_maps, places, instance),
        ]
    if "pictures" in new:
        pictures = _found(folders.pictures, places, model_id)
    if "instructed" in new:
        made = _found(folders.instructed, places) or [None, None]
    return now, *choices, job.status(), job.output(), *figures, pictures, *made


def _found(function: Callable, *where):
    """What a function returns; None where it fails, which is shown as a warning."""
    try:
        return function(*where)
    except Exception as error:  # in one part of the page
        log.warning("%s", sentence(error), exc_info=not isinstance(error, FAILURES))
        gr.Warning(html.escape(sentence(error)))
        return None


def _choose(names: Sequence[str] | None, chosen: str | None) -> dict:
    """Update a list of names; the first is chosen if the chosen one has gone. None: no change."""
    if names is None:
        return gr.skip()
    value = chosen if chosen in names else next(iter(names), None)
    return gr.update(choices=names, value=value)
