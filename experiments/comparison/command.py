"""The paper's comparison on toybox: MIFO's attention loss against others, with and without boxes.

Makes instance folders of look-alikes from a seed, learns each of them with every loss, paints it
with fixed seeds and reads from the pictures which toys they show. Writes rows.jsonl, and from it
comparison.md and contact sheets, into {work}. The same command goes on where it was
stopped, also with more folders, losses or bases. Processes share the work:

    torchrun --nproc_per_node 2 -m experiments.comparison
    torchrun --nproc_per_node 2 -m experiments.comparison --bases toybox comparison_base
"""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from experiments.comparison.settings import (
    BOUNDS,
    LOSSES,
    TOKENS,
    Settings,
    Variant,
    add_options,
    variants,
)
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.settings import check_within
from mifo.bounds import check_bounds


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.comparison", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("comparison"), help="where everything goes"
    )
    parser.add_argument(
        "--bases", nargs="+", default=["toybox"], metavar="MODEL",
        help="base models: toybox, or folders that toybox.stable_diffusion.train wrote",
    )  # fmt: skip
    choices = (("tokens", TOKENS, "how the tokens begin"), ("losses", LOSSES, "attention losses"))
    for name, known, text in choices:
        shown = f"{text}, some of {', '.join(known)}"
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), metavar="NAME", help=shown
        )
    add_options(parser, [one.name for one in fields(Settings)])
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> tuple[Settings, list[Variant]]:
    """What the options ask for; a UserError for what makes no sense."""
    from imagelab.training.seeds import check_seed  # which takes its time: it imports torch

    settings = Settings(**{one.name: getattr(options, one.name) for one in fields(Settings)})
    check_within(asdict(settings), BOUNDS)
    check_bounds(asdict(settings))
    check_seed(settings.seed)
    found = variants(
        *(list(dict.fromkeys(v)) for v in (options.bases, options.tokens, options.losses))
    )
    if len({variant.name for variant in found}) < len(found):
        raise UserError("--bases has two models of one name; rename the folder of one")
    return settings, found


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        settings, found = chosen(options)
        from experiments.comparison.folders import make_job, prepare
        from experiments.comparison.report import write_comparison
        from experiments.study import rows_of, run_study
        from imagelab.models.device import choose_device, choose_precision
        from imagelab.processes import Processes

        device = choose_device(settings.device)
        choose_precision(settings.mixed_precision, device)  # fails before anything is learned
        work, processes = options.work, Processes(device)
        with processes.first_alone():
            names = prepare(work, settings, list(dict.fromkeys(v.base for v in found)))
        # folder by folder, so that a table of some folders has all variants
        jobs = [make_job(work, settings, variant, name) for name in names for variant in found]
        try:
            failures = run_study(jobs, work, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        if processes.is_first:
            print(write_comparison(found, rows_of(jobs, work), work, failures))
        processes.end(2 if failures else 0)
