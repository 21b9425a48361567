"""Make the features of training pictures (MIGE): python -m mige.features.

    python -m mige.features --data D.json --model M --output F

Of every picture in a list of records the posterior of the model's autoencoder is computed, mean and
deviation, and written into the folder F, which training reads. The list is checked as a whole
before. The same command goes on where it was stopped, and adds what a list that has grown asks for;
accelerate launch shares the work over processes.
"""

import argparse
import logging
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.io.folders import check_writable
from mige.config import check_numbers

log = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m mige.features", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="a JSON list of records")
    parser.add_argument(
        "--root", type=Path, help="where the list's paths start; None: the list's folder"
    )
    parser.add_argument(
        "--model", required=True, help="model folder, of which the autoencoder is used"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the features")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures encoded at a time")
    parser.add_argument(
        "--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        check_numbers({"batch_size": options.batch_size})
        check_writable(options.output, "output")
        try:
            run(options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None


def run(options: argparse.Namespace) -> None:
    """Check everything, then make the features; exit code 2 where pictures cannot be read."""
    from imagelab.models.device import choose_device
    from imagelab.processes import Processes
    from mige.data.checking import Limits, check_records, tell
    from mige.data.extraction import Extraction, check_place, extract, load_vae
    from mige.data.features import Kind
    from mige.data.records import RecordList
    from mige.data.references import References
    from mige.folder import find_folder

    processes = Processes(choose_device(options.device))
    limits, kind = Limits.of_folder(options.model), Kind.of_model(options.model)
    check_place(options.output, kind)
    records = RecordList(options.data)
    root = options.data.parent if options.root is None else options.root
    with processes.first_alone():
        which = check_records(records, root, limits) if processes.is_first else None
    which = processes.agree(which)
    references = References.of_list(records, which)
    vae = load_vae(find_folder(options.model)).to(processes.device)
    job = Extraction(vae, kind, records, root, options.batch_size, processes.device)
    unread = extract(job, references, options.output, processes)
    if processes.is_first:
        tell(unread.lines, unread.count)
        if unread.count:
            log.warning(
                "%d pictures cannot be read, as listed above, and have no features; mend them, "
                "and run the same command again",
                unread.count,
            )
        print(options.output)
    processes.end(2 if unread.count else 0)


if __name__ == "__main__":
    main()
