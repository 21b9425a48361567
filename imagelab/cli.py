"""What the commands share: how options are declared, and what a failure ends with."""

import argparse
import logging
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from imagelab.errors import FAILURES, memory_errors, sentence
from imagelab.models.device import PRECISIONS


class Parser(argparse.ArgumentParser):
    """Tells a bad option in one line, without the usage of all the others."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and the script's docstring as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        is_told = "(default:" in (action.help or "")
        if is_told or action.nargs == 0 or default in ("", [], ()):
            return action.help
        if isinstance(default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action)


def seed_option(text: str) -> int | None:
    """An integer seed, or None for a random one."""
    if text.lower() == "none":
        return None
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no seed; give a whole number or None"
        ) from None
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no seed; give a number from 0 to 2**63 - 1")
    return seed


def chosen_seed(seed: int | None) -> int:
    """The seed itself, or a random one."""
    return secrets.randbelow(2**31) if seed is None else seed


def add_setting(into, defaults, name: str, text: str, **more) -> None:
    """Declare ``--name`` with the default (and its type) that a config dataclass gives it."""
    default = getattr(defaults, name)
    more.setdefault("type", type(default) if default is not None else str)
    into.add_argument(f"--{name}", default=default, help=text, **more)


def add_runtime_options(parser: argparse.ArgumentParser, defaults) -> None:
    """--device, --mixed_precision, --offline, --debug."""
    parser.add_argument(
        "--device", default=defaults.device, help="auto (cuda > mps > cpu), cuda, mps or cpu"
    )
    parser.add_argument(
        "--mixed_precision",
        default=defaults.mixed_precision,
        choices=PRECISIONS,
        help="precision of the UNet; auto: bf16 where the hardware has it, fp16 on older CUDA GPUs",
    )
    parser.add_argument("--offline", action="store_true", help="never ask the hub for anything")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


@contextmanager
def told_failures(parser: argparse.ArgumentParser, debug: bool = False) -> Iterator[None]:
    """Bad input ends with one sentence and exit code 2, a failure underway with 1, Ctrl-C 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with memory_errors():
            yield
    except FAILURES as error:
        if debug:
            raise
        code = 1 if isinstance(error, FloatingPointError | MemoryError) else 2
        parser.exit(code, f"{parser.prog}: error: {sentence(error)}\n")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"{parser.prog}: {str(stop) or 'stopped'}\n")
