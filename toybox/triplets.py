"""Write exact triplets of toy scenes for MIGE: python -m toybox.triplets.

    python -m toybox.triplets --output DIR --count 9000 --seed 1
    python -m toybox.triplets --output DIR --count 512 --bench

A list for training is DIR/triplets.json, in the format that mige.features reads. --bench writes
add_bench.json and replace_bench.json in MIGEBench's format, subjects.json and edits.json, all of
the split test. Each triplet depends on seed, split and place alone, as long as its task is drawn;
where --tasks or --bench give the task, or what is asked for, it is another one. The same command
goes on where it was stopped.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from toybox.scenes.wording import SPLITS, TASKS


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m toybox.triplets", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="a folder of its own, new or to go on with"
    )
    parser.add_argument(
        "--count", type=int, default=512, help="triplets; with --bench, items of each list"
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes all that is drawn")
    parser.add_argument(
        "--split", choices=SPLITS,
        help="which share no draw (default: train, with --bench test)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=[], choices=TASKS, metavar="TASK",
        help=f"some of {', '.join(TASKS)}; several take turns (default: all, each as often)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0,
        help="processes that share the rendering of a list for training; 0: this one alone",
    )  # fmt: skip
    parser.add_argument("--bench", action="store_true", help="lists to measure a model with")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with report_errors(parser, args.debug):
        from toybox.scenes.triplet_files import Job, write

        split = args.split or ("test" if args.bench else "train")
        if not 0 <= args.workers <= 256:
            raise UserError(f"--workers is {args.workers}; give a whole number from 0 to 256")
        job = Job(args.seed, split, args.count, tuple(args.tasks), args.bench)
        try:
            paths = write(job, args.output, args.workers)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        for path in paths:
            print(path)


if __name__ == "__main__":
    main()
