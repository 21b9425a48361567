"""What the commands share: how they declare options and report errors."""

import argparse
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from imagelab.boxes import FORMATS
from imagelab.console import heard_or_not
from imagelab.errors import FAILURES, cut, memory_errors, sentence, shorten
from imagelab.models.device import PRECISIONS
from imagelab.settings import Config
from imagelab.training.interrupt import signal_of, stop_when_asked

# Where bitsandbytes is installed, it tells at each start that an optional kernel of its is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line: without the usage of all options, long values in short."""

    given: Sequence[str] = ()  # the arguments that were parsed

    def parse_known_args(self, args=None, namespace=None):
        self.given = sys.argv[1:] if args is None else list(args)
        for word in self.given:
            name, _, value = word.partition("=")
            if name.startswith("--") and value == "--":  # of which Python 3.11 makes an empty list
                self.error(f"argument {name}: '--' is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def exit(self, status: int = 0, message: str | None = None):
        for argument in sorted(self.given if message else (), key=len, reverse=True):
            value = argument.partition("=")[2] if argument.startswith("--") else argument
            for written in (value, repr(value)[1:-1], " ".join(value.split())):
                if len(written) > 200:
                    message = message.replace(written, cut(written))
        super().exit(status, message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the script's docstring as it is written, and the defaults that are not empty."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        text = action.help or ""
        is_told = "(default:" in text or action.required or action.nargs == 0
        if is_told or default in ("", [], ()) or (default is None and "None:" not in text):
            return action.help
        if isinstance(default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action)


def seed_option(text: str) -> int | None:
    """A seed from an option's text, whose bounds are checked later; None for a random one."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shorten(text)!r} is no seed; give a whole number or None"
        ) from None


def random_seed_if_none(seed: int | None) -> int:
    """The seed, or a random one in place of None."""
    return secrets.randbelow(2**31) if seed is None else seed


def or_none(kind: type) -> Callable[[str], object]:
    """Reads a number of a kind, or None as help writes it."""

    def read(text: str):
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # which argparse's message has
    return read


def add_setting(into, defaults: Config, name: str, text: str, **more) -> None:
    """Declare ``--name`` with the default, and its type, of a config."""
    default = defaults.settings()[name]
    kind = defaults.open_kinds().get(name)
    more.setdefault("type", or_none(kind) if kind in (int, float) else kind or type(default))
    into.add_argument(f"--{name}", default=default, help=text, **more)


def add_box_format(parser: argparse.ArgumentParser) -> None:
    """--box_format, for the boxes of --box and --boxes."""
    meanings = "; ".join(f"{name}: {numbers}" for name, numbers in FORMATS.items())
    parser.add_argument(
        "--box_format",
        choices=tuple(FORMATS),
        help=f"what the four numbers of a box are; {meanings} (default: corners, or what the names "
        "of the numbers say)",
    )


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
def report_errors(parser: argparse.ArgumentParser, debug: bool = False) -> Iterator[None]:
    """Within, an expected error ends the command with one sentence in place of a traceback.

    Exit codes: 2 for a UserError or OSError, 1 for a FloatingPointError or MemoryError, 130 for
    Ctrl-C, 143 and 129 for a process that is asked to end (SIGTERM) or whose terminal is closed
    (SIGHUP). Any other exception is a fault of the program: it keeps its traceback (exit code 1).
    ``debug`` keeps all tracebacks. That nobody reads what is printed is no error.
    """
    with heard_or_not():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        try:
            with stop_when_asked(), memory_errors():
                yield
        except FAILURES as error:
            if debug:
                raise
            code = 1 if isinstance(error, FloatingPointError | MemoryError) else 2
            parser.exit(code, f"{parser.prog}: error: {sentence(error)}\n")
        except KeyboardInterrupt as stop:
            parser.exit(128 + signal_of(stop), f"{parser.prog}: {str(stop) or 'stopped'}\n")
