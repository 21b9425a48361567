"""How good a toy MIGE is, on items that it has not seen: python -m toybox.mige.evaluate.

    python -m toybox.mige.evaluate --model M --output DIR

Each row has --items held-out triplets, which the model paints and toybox's classifier judges (see
toybox/mige/judge.py). DIR gets report.md, report.json, every picture, and a sheet for each row:
the given pictures, the target and what was painted, with the failed checks in red. The same command
goes on where it was stopped. What is painted is painted once: another judge judges it anew.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError, shorten
from imagelab.io.atomic import folder_lock
from imagelab.io.folders import check_writable
from imagelab.models.device import PRECISIONS
from imagelab.settings import check_within
from toybox.mige.evaluation.items import ROWS

BOUNDS = {
    "items": (1, 100_000),
    "calibration": (0, 100_000),
    "steps": (1, 1000),
    "text_scale": (0.0, 1e6),
    "image_scale": (0.0, 1e6),
    "batch_size": (1, 10_000),
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m toybox.mige.evaluate", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder of a toy MIGE")
    add("--output", type=Path, required=True, metavar="DIR", help="where the report goes")
    add("--items", type=int, default=512, help="of each row")
    add(
        "--calibration", type=int, default=32,
        help="items of each row on which the judge itself is tried, at most --items; 0: none",
    )  # fmt: skip
    add("--only", nargs="+", metavar="ROW", default=[], help=f"of {', '.join(ROWS)}")
    add("--seed", type=int, default=0, help="of the items, and of all that is drawn")
    add("--steps", type=int, default=20, help="of DPM-Solver++")
    add("--text_scale", type=float, help="weight of the instruction; None: the model's own")
    add("--image_scale", type=float, help="weight of the picture to edit; None: the model's own")
    group = parser.add_argument_group("running")
    group.add_argument("--batch_size", type=int, default=32, help="pictures painted at a time")
    group.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu")
    group.add_argument(
        "--mixed_precision", default="no", choices=[each for each in PRECISIONS if each != "fp16"],
        help="of all parts but the autoencoder; it may change pictures a little",
    )  # fmt: skip
    group.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        check_options(options)
        from toybox.mige.evaluation.painters import load_painter
        from toybox.mige.evaluation.report import write_report
        from toybox.mige.evaluation.running import evaluate

        names = [name for name in ROWS if name in options.only or not options.only]
        painter = load_painter(options, names)
        with folder_lock(options.output, "--output"):
            try:
                found = evaluate(
                    painter, names, options.items, options.calibration, options.seed,
                    options.output,
                )  # fmt: skip
            except KeyboardInterrupt:
                more = "; the very same command goes on from here"
                raise KeyboardInterrupt(f"stopped{more}") from None
            print(write_report(found, painter.settings, options.output))


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for what makes no sense."""
    from imagelab.training.seeds import check_seed

    check_within({name: getattr(options, name) for name in BOUNDS}, BOUNDS)
    check_seed(options.seed)
    check_writable(options.output, "output")
    if unknown := [name for name in options.only if name not in ROWS]:
        raise UserError(f"there is no row {shorten(unknown[0])!r}; give some of {', '.join(ROWS)}")


if __name__ == "__main__":
    main()
