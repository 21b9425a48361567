"""Paint subjects into new pictures (MIGE): python -m mige.generate.

    python -m mige.generate --model M --prompt "a <image> on the beach" --images dog.jpg

<image> stands in the prompt where a picture is meant, once for each of --images, in their order.
Numbered pictures go into --output_path, each with a JSON file of what it was made of, and a contact
sheet. --items carries out a whole list; the same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser
from imagelab.errors import UserError
from mige.options import add_painting_options, check_alone, run


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m mige.generate", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--prompt", help="what to paint, with <image> for each picture")
    parser.add_argument(
        "--images", nargs="+", default=[], type=Path, metavar="FILE", help="the subjects"
    )
    add_painting_options(parser)
    return parser, parser.parse_args(argv)


def read(options: argparse.Namespace) -> list:
    """The items that the options ask for."""
    from mige.items import Item, read_items
    from mige.request import written_marks

    if options.items:
        check_alone(options, "prompt", "images")
        return read_items(options.items, options.root, edits=False)
    if options.prompt is None:
        raise UserError("there is nothing to paint; give --prompt, or a list with --items")
    return [Item(0, written_marks(options.prompt), tuple(options.images))]


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    run(parser, options, lambda: read(options))


if __name__ == "__main__":
    main()
