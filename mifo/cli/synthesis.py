"""Paint learned instances into a new scene, each inside its box (MIFO).

Reads {models_dir}/{model_id}, which semantic_learning.py writes, or else the files of --lora and
--tokens, and writes numbered pictures into {output_path}/{model_id}. Boxes are fractions
x0,y0,x1,y1 from the top left (or pixels, `…px`, or percent, `…%`); without --boxes and --box they
come from get_boxes in semantic_synthesis.py.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from imagelab.boxes import Box, UnknownSize, parse_boxes, parse_named_box
from imagelab.cli import (
    HelpFormatter,
    Parser,
    add_box_format,
    add_runtime_options,
    add_setting,
    random_seed_if_none,
    report_errors,
    seed_option,
)
from imagelab.errors import UserError, shorten
from imagelab.io.folders import check_name, check_writable
from mifo.bounds import MOST_POSITION, check_bounds
from mifo.synthesis.config import SynthesisConfig

if TYPE_CHECKING:
    from mifo.synthesis.layouts import GetBoxes
    from mifo.synthesis.placing import GivenBoxes
    from mifo.synthesis.scene import Scene

#: Help of the options of the box control.
GUIDANCE_HELP = {
    "guidance_steps": "first denoising steps, in which the boxes guide the latents",
    "guidance_iterations": "updates of the latents, at most, in each of these steps",
    "step_size": "size of the updates at the first step",
    "final_step_size": "size toward which they fall over these steps",
    "step_scale": "factor on both sizes; None: the model's own, or 1",
    "cross_weight": "weight of the cross-attention terms",
    "self_weight": "weight of the self-attention terms",
    "loss_threshold": "loss per subject below which a step's guidance ends",
    "refine_every": "steps between refinements of the regions; 0: boxes stay the regions",
}


def token_indices(text: str) -> list[list[int]]:
    """A JSON list with, for each subject, the list of its tokens' positions: [[4], [6]]."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    fits = isinstance(value, list) and all(
        isinstance(group, list) and group and all(type(at) is int for at in group)
        for group in value
    )
    if not value or not fits:
        raise argparse.ArgumentTypeError(
            f"{shorten(text)!r} is no list of lists of positions; write it as [[4]] or [[4],[6]]"
        )
    positions = [at for group in value for at in group]
    if len(positions) > MOST_POSITION or not all(0 <= at <= MOST_POSITION for at in positions):
        raise argparse.ArgumentTypeError(
            f"{shorten(text)!r} holds a position that no prompt has, or too many; write it as "
            "[[4]] or [[4],[6]]"
        )
    return value


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    defaults = SynthesisConfig()
    parser = Parser(
        prog="semantic_synthesis.py", description=__doc__, formatter_class=HelpFormatter
    )

    def add(name: str, text: str, into=parser, **more) -> None:
        add_setting(into, defaults, name, text, **more)

    add("batch_size", "pictures painted at a time")
    add("model_id", "name of the learned folder")
    add("output_path", "where the folder of pictures goes")
    add("prompt", "what to paint, with the names of the assets")
    add(
        "seed",
        "of the first picture; every next one has the next seed; None: random",
        type=seed_option,
    )
    parser.add_argument(
        "--subject_token_indices",
        type=token_indices,
        help="positions of each subject's tokens, such as [[4]]; None: those of the names",
    )
    parser.add_argument(
        "--boxes",
        help="a JSON list of boxes such as [[0.1,0.2,0.5,0.6]], in the order of the prompt",
    )
    parser.add_argument(
        "--box",
        action="append",
        metavar='"<asset0>=x0,y0,x1,y1"',
        help="the box of one asset; repeat the option for more",
    )
    add_box_format(parser)
    add("negative_prompt", "what not to paint")
    add("num_images", "how many pictures; None: one batch")
    add("num_inference_steps", "DDIM steps")
    text = "weight of classifier-free guidance; None: the model's own, or 7.5"
    add("guidance_scale", text)
    add("width", "pixels; None: the model's own")
    add("height", "pixels; None: the model's own")
    add("models_dir", "folder of the learned folders")
    parser.add_argument(
        "--lora",
        metavar="FILE",
        help="LoRA of kohya or diffusers (.safetensors), in place of the learned folder",
    )
    add("lora_scale", "what the strength of --lora is multiplied by")
    parser.add_argument(
        "--tokens",
        nargs="+",
        default=defaults.tokens,
        metavar="FILE",
        help="token files, in place of the learned folder; asset0.safetensors is <asset0>",
    )
    add("model_path", "base model; None: the one that the learned folder, or a file of it, names")

    group = parser.add_argument_group("box control")
    group.add_argument("--no_box_control", action="store_true", help="paint without boxes")
    for name, text in GUIDANCE_HELP.items():
        add(name, text, group)
    add_runtime_options(parser.add_argument_group("running"), defaults.runtime)
    return parser, parser.parse_args(argv)


def config_from(options: argparse.Namespace) -> SynthesisConfig:
    options.box_control = not options.no_box_control
    settings = {name: getattr(options, name) for name in SynthesisConfig().settings()}
    return SynthesisConfig.from_settings(**settings)


def read_boxes(options: argparse.Namespace) -> "GivenBoxes | None":
    """The boxes of --boxes or --box; None without either."""
    if options.boxes is not None and options.box is not None:
        raise UserError("--boxes and --box are both given; give one of them")
    size = (options.width, options.height) if options.width and options.height else None
    named: dict[str, list[Box]] = {}
    try:
        if options.boxes is not None:
            return parse_boxes(options.boxes, size, options.box_format)
        for text in options.box or []:
            name, box = parse_named_box(text, size, options.box_format)
            named.setdefault(name, []).append(box)
    except UnknownSize as error:
        raise UserError(f"{error}, or give --width and --height") from None
    return named or None


def describe_numbers(scene: "Scene") -> str:
    """The numbers that depend on the model, and where each is from."""
    config, origins = scene.config, scene.origins
    guidance = config.guidance
    text = f"guidance scale {config.guidance_scale:g} ({origins['guidance_scale']})"
    if scene.tokens is not None:
        sizes = f"{guidance.step_size:g} → {guidance.final_step_size:g}"
        text += f", box steps {sizes} × {guidance.step_scale:g} ({origins['step_scale']})"
    return text


def main(argv: list[str] | None, get_boxes: "GetBoxes") -> None:
    """The command; ``get_boxes`` is the layout where no boxes are given."""
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        config = config_from(options)
        check_bounds(config.settings())
        boxes = read_boxes(options)
        from imagelab.models.device import choose_device
        from imagelab.processes import Processes
        from mifo.synthesis.paint import synthesise
        from mifo.synthesis.scene import make_scene

        check_name(config.model_id, "model_id")
        folder = Path(config.output_path) / config.model_id
        check_writable(folder, "output_path")
        processes = Processes(choose_device(config.runtime.device))
        config = replace(config, seed=processes.agree(random_seed_if_none(config.seed)))
        indices, device = options.subject_token_indices, processes.device
        scene = make_scene(config, get_boxes, boxes, indices, device)
        if processes.is_first:
            print(f"seed {config.seed}, {scene.base.source} on {scene.device}")
            print(describe_numbers(scene))
            for name, box in zip(scene.names, scene.boxes, strict=False):
                print(f"{name} in " + ", ".join(f"{side:.3g}" for side in box))
        for path in synthesise(scene, folder, processes):
            print(path)
        processes.end()
