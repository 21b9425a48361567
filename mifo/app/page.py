"""The whole page, in gradio: its tabs, the command that runs, and what keeps it up to date."""

import gradio as gr

from mifo.app import places as folders
from mifo.app.job import LINES, Job
from mifo.app.places import Places
from mifo.app.tabs import learning_tab, masks_tab, painting_tab, read_asset, told

CSS = read_asset("page.css")


def theme() -> gr.Theme:
    """Fonts of the system: none is fetched."""
    plain, code = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="blue", font=plain, font_mono=code)


def build_page(places: Places, job: Job) -> gr.Blocks:
    """The whole page; ``job`` runs its commands."""
    with gr.Blocks(title="MIFO", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# MIFO\nMask the things in a photo, learn them, paint each inside its box.")
        with gr.Tab("1  Masks"):
            masks_tab(places)
        with gr.Tab("2  Learn"):
            instance, curves, maps = learning_tab(places, job)
        with gr.Tab("3  Paint"):
            model_id, gallery = painting_tab(places, job)
        with gr.Row(equal_height=True):
            status = gr.Textbox(label="Now", scale=5, elem_id="status")
            stop = gr.Button("Stop", variant="stop", scale=1, elem_id="stop")
        log = gr.Textbox(
            label="What the command says",
            info="Stop lets learning finish its step and saves it, to go on from there later; "
            "a second press ends it at once.",
            lines=LINES,
            max_lines=LINES,
            elem_id="log",
            elem_classes="code",
        )
        stop.click(told(job.stop))
        _watch(places, job, instance, model_id, [status, log, curves, maps, gallery])
    return page


def _watch(places: Places, job: Job, instance, model_id, shown: list) -> None:
    """Every second or two: what the command says, and what has become new in the folders."""
    seen = gr.State({})

    def choose(names, chosen):
        value = chosen if chosen in names else next(iter(names), None)
        return gr.update(choices=names, value=value)

    def look(name, learned, before):
        now = folders.stamps(places, name, learned)
        new = {key for key in now if now[key] != before.get(key)}
        choices = [gr.skip(), gr.skip()]
        if "names" in new:
            choices = [
                choose(folders.instances(places), name),
                choose(folders.learned(places), learned),
            ]
        figures = [gr.skip(), gr.skip()]
        if "learning" in new:
            figures = [folders.curves(places, name), folders.attention_maps(places, name)]
        paths = gr.skip()
        if "pictures" in new:
            paths = folders.pictures(places, learned)
        return now, *choices, job.status(), job.output(), *figures, paths

    inputs = [instance, model_id, seen]
    outputs = [seen, instance, model_id, *shown]
    gr.Timer(1.5).tick(told(look), inputs, outputs, show_progress="hidden")
