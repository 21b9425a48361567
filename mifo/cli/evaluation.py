"""Measure how well learned instances keep their identity and their place (MIFO).

Paints every prompt with every learned folder and fixed seeds, with boxes as semantic_synthesis.py
places them, and measures the pictures: is each box's crop nearest to its own instance, does the
object fill its box and no other place, does the picture fit the prompt, how do seeds differ.
Writes evaluation.json, evaluation.md, sheet.png and confusion.png into {output_path}. Started
again, it paints what is missing.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from imagelab.boxes import parse_boxes
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
from imagelab.io.folders import check_writable
from mifo.cli.synthesis import GUIDANCE_HELP
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import GetBoxes

DEFAULTS = SynthesisConfig(num_images=4, seed=0, output_path="evaluation")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="semantic_evaluation.py", description=__doc__, formatter_class=HelpFormatter
    )

    def add(name: str, text: str, into=parser, **more) -> None:
        add_setting(into, DEFAULTS, name, text, **more)

    parser.add_argument(
        "--model_id",
        nargs="+",
        default=[DEFAULTS.model_id],
        help="names of learned folders, or all",
    )
    add("models_dir", "folder of the learned folders")
    parser.add_argument(
        "--folder_path", help="folder of the instance folders; None: where each was learned from"
    )
    parser.add_argument(
        "--prompt", nargs="+", default=[], help="what to paint; none: a photo of all assets"
    )
    parser.add_argument(
        "--boxes",
        help="a JSON list of boxes, one for each asset of a prompt in its order; the same list is "
        "for every prompt",
    )
    add_box_format(parser)
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NAME[=SOURCE]",
        help="toybox, clip, dinov2, the last two with a folder or hub id; none: toybox, for models "
        "learned with it",
    )
    add("output_path", "where the evaluation goes")
    add("num_images", "pictures of each prompt")
    text = "of the first picture; every next one has the next seed; None: random"
    add("seed", text, type=seed_option)
    add("batch_size", "pictures painted at a time")
    add("negative_prompt", "what not to paint")
    add("num_inference_steps", "DDIM steps")
    add("guidance_scale", "weight of classifier-free guidance; None: the model's own, or 7.5")
    add("model_path", "base model; None: the one that the learned folder names")
    group = parser.add_argument_group("box control")
    group.add_argument("--no_box_control", action="store_true", help="paint without boxes")
    for name, text in GUIDANCE_HELP.items():
        add(name, text, group)
    add_runtime_options(parser.add_argument_group("running"), DEFAULTS.runtime)
    return parser, parser.parse_args(argv)


def config_from(options: argparse.Namespace) -> SynthesisConfig:
    """How every picture is painted; each case puts in its own folder and prompt."""
    given = vars(options) | {"box_control": not options.no_box_control}
    names = DEFAULTS.settings().keys() & given.keys() - {"model_id", "prompt"}  # here of several
    return SynthesisConfig.from_settings(**{name: given[name] for name in names})


def main(argv: list[str] | None, get_boxes: GetBoxes) -> None:
    """The command; ``get_boxes`` is the layout where no boxes are given."""
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        config = config_from(options)
        boxes = None
        if options.boxes is not None:
            boxes = parse_boxes(options.boxes, box_format=options.box_format)
        config = replace(config, seed=random_seed_if_none(config.seed))
        from imagelab.evaluation.report import write_report
        from imagelab.models.device import choose_device, choose_precision
        from mifo.evaluation import choose_spaces, evaluate, list_learned, plan_cases

        device = choose_device(options.device)
        choose_precision(options.mixed_precision, device)
        output = Path(options.output_path)
        check_writable(output, "output_path")
        names = list_learned(Path(options.models_dir), options.model_id)
        cases = plan_cases(config, names, options.prompt, options.folder_path, get_boxes, boxes)
        spaces = choose_spaces(options.features, cases, options.offline)
        if options.seed is None:
            print(f"seed {config.seed}")
        records = evaluate(cases, spaces, output, device)
        print(write_report(cases, records, output))
