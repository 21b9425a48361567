"""Edit a picture by an instruction (MIGE): python -m mige.edit.

    python -m mige.edit --model M --source in.jpg --instruction "make it snow"
    python -m mige.edit --model M --source in.jpg --images cat.jpg \\
        --instruction "replace the cup in <image> with <image>"

<image> stands in the instruction where a picture is meant. The first one is the source, unless
--order says otherwise; an instruction without any concerns the source. Numbered pictures go into
--output_path, each with a JSON file of what it was made of, and a contact sheet. --items carries
out a whole list; the same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser
from imagelab.errors import UserError
from mige.options import add_painting_options, check_alone, run


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(prog="python -m mige.edit", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--source", type=Path, metavar="FILE", help="the picture to edit")
    parser.add_argument("--instruction", help="what to change, with <image> for each picture")
    parser.add_argument(
        "--images", nargs="+", default=[], type=Path, metavar="FILE", help="subjects to put in"
    )
    parser.add_argument(
        "--order", type=int, default=1, metavar="N", help="which <image> is the source, from 1"
    )
    parser.add_argument(
        "--whole", action="store_true",
        help="the edit concerns the whole picture, such as its style or the weather",
    )  # fmt: skip
    add_painting_options(parser)
    return parser, parser.parse_args(argv)


def read(options: argparse.Namespace) -> list:
    """The items that the options ask for."""
    from mige.items import Item, read_items
    from mige.request import written_marks

    if options.items:
        check_alone(options, "source", "instruction", "images")
        if options.whole or options.order != 1:
            raise UserError("--order and --whole are for a single edit; leave them out of a list")
        return read_items(options.items, options.root, edits=True)
    if options.instruction is None or options.source is None:
        raise UserError("give --source and --instruction, or a list with --items")
    pictures = list(options.images)
    if not 1 <= options.order <= len(pictures) + 1:
        raise UserError(
            f"--order is {options.order}, and with the source there are {len(pictures) + 1}; "
            f"give a number from 1 to {len(pictures) + 1}"
        )
    if options.whole and options.images:
        raise UserError("--whole is for edits without --images; leave it out")
    pictures.insert(options.order - 1, options.source)
    text = written_marks(options.instruction)
    return [Item(0, text, tuple(pictures), options.order - 1, options.whole)]


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    run(parser, options, lambda: read(options))


if __name__ == "__main__":
    main()
