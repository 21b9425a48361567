"""The options of the trainer, and what they ask for."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser
from imagelab.errors import UserError, shown
from imagelab.processes import Processes
from imagelab.settings import check_within
from imagelab.training.seeds import check_seed
from toybox.scenes.scenes import distinct_kinds
from toybox.scenes.toys import KINDS
from toybox.stable_diffusion.architecture import UNET_GROUPS, ToyboxConfig
from toybox.stable_diffusion.config import BOUNDS, HELP, TrainConfig
from toybox.stable_diffusion.folders import read_record

#: Parts of --begin_from that may begin anew.
PARTS = ("unet", "text_encoder")
#: Least and most of the numbers that say how the training is carried out.
RUN_BOUNDS = {"workers": (0, 256), "minutes": (0.0, 100_000.0), "between": (0, 1_000_000)}
LEVELS = 2  # of the UNet: decoder-1, whose attention is grounded, works at the latents' size
MOST_CHANNELS = 4096


def parse_args(
    argv: list[str] | None, description: str
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser of the command, and what it read."""
    parser = Parser(
        prog="python -m toybox.stable_diffusion.train",
        description=description,
        formatter_class=HelpFormatter,
    )
    _add_folders(parser)
    _add_runtime(parser)
    for name, value in asdict(TrainConfig()).items():
        more = {"type": type(value)}
        if name in ("kinds", "oftener"):
            more = {"nargs": "+", "choices": KINDS, "metavar": "KIND"}
        if name == "count_odds":
            more = {"nargs": 3, "type": float, "metavar": "ODDS"}
        if isinstance(value, bool):
            more = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", default=value, help=HELP[name], **more)
    return parser, parser.parse_args(argv)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    """What is read and written, and the model's shape."""
    parser.add_argument(
        "--work", type=Path, default=Path("toybox_work"), help="checkpoints, sample grids"
    )
    parser.add_argument(
        "--output", type=Path, help="pipeline folder; None: the folder model in --work"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument("--begin_from", type=Path, help="pipeline folder to go on from")
    parser.add_argument(
        "--fresh", nargs="+", default=[], choices=PARTS, metavar="PART",
        help=f"what begins anew all the same: {', '.join(PARTS)}",
    )  # fmt: skip
    for name, what in (("channels", "channels"), ("heads", "attention heads")):
        parser.add_argument(
            f"--unet_{name}", nargs="+", type=int, metavar="N",
            help=f"{what} of each level of a new UNet (default: those of --begin_from)",
        )  # fmt: skip


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    """How the training is carried out."""
    parser.add_argument("--device", default="auto", help="auto, cuda (in bfloat16), mps or cpu")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that render scenes; 0: this one alone"
    )
    parser.add_argument(
        "--minutes", type=float,
        help="from the start of the command to the UNet's last step; replaces --steps",
    )  # fmt: skip
    parser.add_argument(
        "--cuda_graph", action="store_true", help="replay each step as a CUDA graph: faster"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet: a minute or two, then faster"
    )
    parser.add_argument(
        "--between", type=int, default=0, metavar="IMAGES",
        help="pictures that measure hues between the named ones at the end",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def choose_config(options: argparse.Namespace, processes: Processes) -> TrainConfig:
    """The numbers that the options ask for; a UserError for what makes no sense."""
    check_seed(options.seed)
    check_within(vars(options), BOUNDS | RUN_BOUNDS)
    given = {field.name: getattr(options, field.name) for field in fields(TrainConfig)}
    given["kinds"] = distinct_kinds(given["kinds"])
    given["oftener"] = tuple(given["oftener"])
    if strange := set(given["oftener"]) - set(given["kinds"]):
        raise UserError(f"--oftener has {min(strange)}, which is not one of --kinds")
    given["count_odds"] = odds = tuple(given["count_odds"])
    if not (min(odds) >= 0 and 0 < sum(odds) < math.inf):
        raise UserError("--count_odds takes three numbers from 0 on, not all of them 0")
    if options.begin_from is None and not given["vae_steps"]:
        raise UserError("--vae_steps 0 keeps the latents of --begin_from; give that or more steps")
    if given["placeholders"] + given["mixed"] > 1:
        raise UserError("--placeholders and --mixed are shares of all captions, more than 1 here")
    if options.minutes is not None and given["cooldown"] > 0.5:
        raise UserError("with --minutes the cool-down cannot be longer than half of the steps")
    if (options.cuda_graph or options.compile) and not str(processes.device).startswith("cuda"):
        raise UserError(f"--cuda_graph and --compile are for CUDA, not for {processes.device}")
    config = TrainConfig(**given)
    batches = config.batch, config.vae_batch, config.decoder_batch
    if any(size % processes.count for size in batches):
        raise UserError(f"the batches must divide by {processes.count}, the processes")
    return config


def choose_shape(options: argparse.Namespace) -> ToyboxConfig:
    """The shape of --begin_from or the usual one, with the UNet that the options ask for.

    Raises UserError for a UNet or crops that this shape does not allow.
    """
    shape = ToyboxConfig()
    if options.begin_from is not None:
        known = read_record(options.begin_from)["shape"]
        known = {key: tuple(v) if isinstance(v, list) else v for key, v in known.items()}
        shape = replace(shape, **known)
    wanted = {
        name: tuple(value)
        for name in ("unet_channels", "unet_heads")
        if (value := getattr(options, name)) is not None
    }
    if wanted and options.begin_from is not None and "unet" not in options.fresh:
        raise UserError(f"--{min(wanted)} needs a new UNet: add --fresh unet")
    shape = replace(shape, **wanted)
    _check_unet(shape)
    step = shape.resolution // shape.latent_size
    if options.vae_steps and options.vae_crop not in range(step, shape.resolution + 1, step):
        raise UserError(
            f"--vae_crop is {options.vae_crop}; give a multiple of {step} up to {shape.resolution}"
        )
    return shape


def _check_unet(shape: ToyboxConfig) -> None:
    """Raises UserError for a UNet that could not be built, or not be trained."""
    channels, heads = shape.unet_channels, shape.unet_heads
    allowed = range(UNET_GROUPS, MOST_CHANNELS + 1, UNET_GROUPS)
    if len(channels) != LEVELS or any(each not in allowed for each in channels):
        raise UserError(
            f"--unet_channels is {_words(channels)}; give {LEVELS} multiples of {UNET_GROUPS} up "
            f"to {MOST_CHANNELS}"
        )
    if heads is None and min(channels) < shape.head_channels:
        raise UserError(
            f"--unet_channels is {_words(channels)}, and an attention head has "
            f"{shape.head_channels}; give more, or --unet_heads"
        )
    if heads is not None and (
        len(heads) != LEVELS
        or any(not 1 <= some <= each for some, each in zip(heads, channels, strict=True))
    ):
        raise UserError(
            f"--unet_heads is {_words(heads)}; give {LEVELS} numbers, each from 1 to the channels "
            f"of its level ({_words(channels)})"
        )


def _words(numbers: Sequence[int]) -> str:
    """Numbers as the command line has them."""
    return shown(" ".join(map(shown, numbers)))
