"""Make the toy MIGE that training begins with: python -m toybox.mige.begin.

    python -m toybox.mige.begin --output M --work W

Its parts are drawn, and those that read learn to read; its trunk can do nothing yet. The same
command goes on where it was stopped. How well held-out triplets are read is in M/begin.json.
`torchrun --nproc_per_node N -m toybox.mige.begin` shares every batch over N processes.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, add_setting, report_errors, seed_option
from toybox.mige.config import HELP, BeginConfig


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m toybox.mige.begin", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="model folder to write")
    parser.add_argument(
        "--work", required=True, type=Path, help="folder of checkpoints and of what was rendered"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    defaults = BeginConfig()
    for name, text in HELP.items():
        more = {"type": seed_option} if name == "seed" else {}
        add_setting(parser, defaults, name, text, **more)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        from imagelab.models.device import choose_device
        from imagelab.processes import Processes
        from imagelab.training.interrupt import Interrupted
        from toybox.mige.folders import check
        from toybox.mige.pretraining import begin

        names = BeginConfig().settings()
        config = BeginConfig.from_settings(**{name: getattr(options, name) for name in names})
        check(config, options.output, options.work, options.overwrite)
        processes = Processes(choose_device(config.device))
        try:
            begin(config, options.output, options.work, processes, options.overwrite)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Interrupted):  # in all processes, and the first one still saves
                processes.leave()
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        if processes.is_first:
            print(options.output)
        processes.end()


if __name__ == "__main__":
    main()
