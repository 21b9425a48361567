"""The paper's comparison on toybox: MIFO against other losses, ranks and ways of painting.

Makes instance folders of look-alikes from a seed, learns each of them in every variant, paints it
with fixed seeds and measures the pictures as semantic_evaluation.py does. Writes comparison.md,
comparison.json, sheet.png and confusion.png into {work}, anew after each variant. The same command
goes on where it was stopped. Processes share the folders:

    torchrun --nproc_per_node 2 -m experiments.comparison            # about 70 minutes on two cores
    torchrun --nproc_per_node 2 -m experiments.comparison --short    # ten minutes
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from experiments.comparison.run import compare
from experiments.comparison.settings import (
    HELP,
    LONG,
    SHORT,
    SHORT_VARIANTS,
    VARIANTS,
    WORDS,
    Settings,
    Variant,
)
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.comparison", description=__doc__, formatter_class=HelpFormatter
    )
    unset = argparse.SUPPRESS
    parser.add_argument(
        "--work",
        type=Path,
        default=unset,
        help="where everything goes (default: comparison, with --short comparison_short)",
    )
    parser.add_argument("--short", action="store_true", help="a small comparison in minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=unset,
        metavar="VARIANT",
        help=f"some of {', '.join(VARIANTS)} (default: all, with --short "
        f"{', '.join(SHORT_VARIANTS)})",
    )
    for one in fields(Settings):
        long, short = getattr(LONG, one.name), getattr(SHORT, one.name)
        shown = f"{long}" if short == long else f"{long}, with --short {short}"
        text = f"{HELP[one.name]} (default: {shown})"
        choices = WORDS if one.name == "words" else None
        parser.add_argument(
            f"--{one.name}", type=type(long), choices=choices, default=unset, help=text
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> tuple[Settings, list[Variant], Path]:
    """What the options ask for; a UserError for what makes no sense."""
    given = vars(options)
    names = {one.name for one in fields(Settings)} & given.keys()
    settings = replace(SHORT if options.short else LONG, **{name: given[name] for name in names})
    if settings.folders < 1 or settings.seeds < 1:
        name = "folders" if settings.folders < 1 else "seeds"
        raise UserError(f"--{name} is {getattr(settings, name)}; give a whole number from 1 on")
    wanted = given.get("only", SHORT_VARIANTS if options.short else VARIANTS)
    work = given.get("work", Path("comparison_short" if options.short else "comparison"))
    return settings, [VARIANTS[name] for name in VARIANTS if name in wanted], work


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        settings, variants, work = chosen(options)
        from imagelab.models.device import choose_device
        from imagelab.processes import Processes

        processes = Processes(choose_device(settings.device))
        try:
            failures = compare(settings, variants, work, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        if processes.is_first:
            print((work / "comparison.md").read_text(encoding="utf-8"))
        processes.end(2 if failures else 0)
