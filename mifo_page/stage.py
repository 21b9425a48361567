"""The stage of boxes: one for each asset of the prompt, to drag and to write."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence

import gradio as gr

from imagelab.boxes import PALETTE, parse_boxes
from imagelab.errors import UserError
from mifo.synthesis.layouts import preset_boxes
from mifo.tokens import ASSET
from mifo_page.fields import report_on_page
from mifo_page.places import Places, proportions


def staged(prompt: str, known: Mapping[str, float]) -> dict:
    """What the stage shows for a prompt: its assets in the preset boxes, of a square picture.

    ``known``: proportions of assets, by name. ``preset`` stays when other boxes take their place.
    """
    names = ASSET.findall(prompt)
    shapes = [known.get(name) for name in names]
    found = preset_boxes(len(names), shapes) if names else []
    boxes = [[round(side, 3) for side in box] for box in found]
    colors = [f"rgb{color}" for color in PALETTE]
    return {"names": names, "boxes": boxes, "preset": boxes, "colors": colors}


def restage(places: Places, model_id: str | None, prompt: str, old: dict, written: str):
    """The stage and the written boxes for what is chosen now; no change where both stay.

    Boxes that somebody moved stay as long as the prompt names the same assets.
    """
    new = staged(prompt, proportions(places, model_id))
    is_moved = old["boxes"] != old["preset"] or written != json.dumps(old["preset"])
    if new["names"] == old["names"] and (is_moved or new["preset"] == old["preset"]):
        return gr.skip(), gr.skip()
    return new, json.dumps(new["boxes"])


def wire_stage(
    places: Places,
    triggers: Sequence[Callable],
    model_id: gr.Dropdown,
    prompt: gr.Textbox,
    stage: gr.HTML,
    boxes: gr.Textbox,
) -> None:
    """Update the stage at the triggers and from the written boxes, and those from the stage."""

    def from_text(text, old):
        new = [list(box) for box in parse_boxes(text)]
        if len(new) != len(old["names"]):
            raise UserError(
                f"there are {len(new)} boxes and {len(old['names'])} assets in the prompt; "
                "give one box for each"
            )
        return {**old, "boxes": new}

    hidden = {"show_progress": "hidden"}
    gr.on(
        triggers,
        functools.partial(restage, places),
        [model_id, prompt, stage, boxes],
        [stage, boxes],
        trigger_mode="always_last",
        **hidden,
    )
    stage.input(
        lambda new: json.dumps(new["boxes"]), stage, boxes, trigger_mode="always_last", **hidden
    )
    written = [boxes.blur, boxes.submit]
    gr.on(written, report_on_page(from_text), [boxes, stage], stage, **hidden)
