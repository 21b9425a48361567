"""What the commands that paint share: their options, and carrying them out."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from imagelab.cli import Parser, add_setting, random_seed_if_none, report_errors, seed_option
from imagelab.errors import UserError
from imagelab.io.folders import check_writable
from imagelab.models.device import PRECISIONS
from mige.config import PaintingConfig, check_numbers

if TYPE_CHECKING:
    import torch

    from mige.items import Item
    from mige.painting import Job

#: Help of the settings, in order.
HELP = {
    "num_images": "pictures of each item; each has noise of the next seed",
    "steps": "of DPM-Solver++; None: the model's; without one 50, for edits 60",
    "text_scale": "weight of the instruction; None: the model's; without one 7, for edits 5",
    "image_scale": "weight of the picture to edit, at 1 a branch is saved; None: the model's, or 1",
    "width": "pixels; None: the model's own (another is an extension of the paper)",
    "height": "pixels; None: the model's own",
}


def add_painting_options(parser: Parser) -> None:
    """The options of both commands."""
    defaults = PaintingConfig()
    parser.add_argument(
        "--model", required=True, help="model folder, or toybox; docs/mige.md says how to make one"
    )
    parser.add_argument("--items", type=Path, help="a JSON list of items; see docs/mige.md")
    parser.add_argument(
        "--root", type=Path, help="where the list's paths start; None: the list's folder"
    )
    parser.add_argument(
        "--output_path", type=Path, default=Path("output/mige"), help="where the pictures go"
    )
    add_setting(
        parser, defaults, "seed",
        "of the first picture; with an item's place it fixes all that is drawn; None: random",
        type=seed_option,
    )  # fmt: skip
    for name, text in HELP.items():
        add_setting(parser, defaults, name, text)
    group = parser.add_argument_group("running")
    add_setting(group, defaults, "batch_size", "pictures painted at a time")
    add_setting(group, defaults, "device", "auto (cuda > mps > cpu), cuda, mps or cpu")
    group.add_argument(
        "--mixed_precision", default=defaults.runtime.mixed_precision, choices=PRECISIONS,
        help="bf16 or no; auto: bf16 where the hardware has it, else no (fp16 overflows in T5)",
    )  # fmt: skip
    group.add_argument(
        "--offload", action="store_true",
        help="keep in the GPU's memory only the part that works",
    )  # fmt: skip
    group.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def check_alone(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError where one of these options is given beside a list."""
    for name in names:
        if getattr(options, name) not in (None, []):
            raise UserError(f"--items and --{name} are both given; give one of them")


def run(parser: Parser, options: argparse.Namespace, read: Callable[[], "list[Item]"]) -> None:
    """Carry a command out; ``read`` gives the items that its own options ask for."""
    with report_errors(parser, options.debug):
        names = PaintingConfig().settings()
        config = PaintingConfig.from_settings(**{name: getattr(options, name) for name in names})
        check_numbers(config.settings())
        check_writable(options.output_path, "output_path")
        items = read()
        if options.root is not None and not options.items:
            raise UserError("--root is for the paths of a list; give --items as well")
        from imagelab.models.device import choose_device
        from imagelab.processes import Processes
        from mige.painting import check_place, kept_seed, paint_list, paint_once, prepare

        check_place(options.output_path, bool(options.items))
        processes = Processes(choose_device(config.runtime.device))
        seed = config.seed
        if seed is None and options.items:  # a stopped list goes on with its own
            seed = kept_seed(options.output_path)
        config = replace(config, seed=processes.agree(random_seed_if_none(seed)))
        job = make_job(options.model, items, config, processes.device)
        if processes.is_first:
            dtype = str(job.pipeline.transformer.dtype).removeprefix("torch.")
            where = f"{options.model} on {processes.device} in {dtype}"
            print(f"seed {config.seed}, {where}", flush=True)
        prepare(job, processes.device, config.runtime.offload)
        paint = paint_list if options.items else paint_once
        try:
            paths = paint(job, options.output_path, processes)
        except KeyboardInterrupt:
            more = "; the very same command goes on from here" if options.items else ""
            raise KeyboardInterrupt(f"stopped{more}") from None
        for path in paths:
            print(path)
        processes.end()


def make_job(model: str, items: "list[Item]", config: PaintingConfig, device: str) -> "Job":
    """Load the model and check everything against it, before any picture is painted."""
    from imagelab.training.seeds import check_seed
    from mige.folder import find_folder, model_digest
    from mige.items import check_items, read_pictures
    from mige.painting import Job
    from mige.pipeline import MigePipeline

    check_seed(config.seed)
    pictures = read_pictures(items)
    if config.runtime.offload and device == "cpu":
        raise UserError("--offload saves a GPU's memory; leave it out on the CPU")
    dtype = precision(config.runtime.mixed_precision, device)
    pipeline = MigePipeline.from_pretrained(model, torch_dtype=dtype)
    job = Job(pipeline, model, model_digest(find_folder(model)), items, config, pictures)
    pipeline.check_size(job.size)
    check_items(items, pipeline)
    return job


def precision(name: str, device: str) -> "torch.dtype":
    """The dtype of all parts but the autoencoder; a UserError for float16."""
    import torch

    from imagelab.models.device import choose_precision

    if name == "fp16":
        raise UserError(
            "--mixed_precision fp16 overflows in T5, whose states go beyond 65504; give bf16 or no"
        )
    dtype = choose_precision(name, device)
    return torch.float32 if dtype == torch.float16 else dtype
