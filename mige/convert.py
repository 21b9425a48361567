"""Make a model folder out of the released weights (MIGE): python -m mige.convert.

    python -m mige.convert --release DIR --output M --prefixes FILE.json

DIR holds model.pth, the trained weights, and pretrained_models, in which the autoencoder and T5's
tokenizer are looked for. Every tensor has to be one that the model knows. --prefixes is a JSON file
with the release's sentences before instructions:

    {"subject": "…", "subject_inference": "…", "edit": "…", "subject_edit": "…"}

No file runs code: a torch file is read as tensors alone.
"""

import argparse
import logging
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors

log = logging.getLogger(__name__)

PARTS = ("transformer", "vision_encoder", "qformer", "fusion")


def heads_option(text: str) -> tuple[str, int]:
    """A part and its number of heads."""
    part, _, number = text.partition("=")
    if part not in PARTS or not number.isdecimal() or len(number) > 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(f'{name}=NUMBER' for name in PARTS)}"
        )
    return part, int(number)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m mige.convert", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--release", required=True, type=Path, help="folder of the release")
    parser.add_argument("--output", required=True, type=Path, help="model folder to write")
    parser.add_argument("--prefixes", type=Path, help="the release's sentences; None: empty ones")
    group = parser.add_argument_group("what is not where it is looked for")
    group.add_argument(
        "--weights", type=Path, help="torch or safetensors file; None: DIR/model.pth"
    )
    group.add_argument(
        "--vae", type=Path, help="folder of an AutoencoderKL; None: it is looked for"
    )
    group.add_argument(
        "--t5", type=Path, help="folder with spiece.model or tokenizer.json; None: it is looked for"
    )
    parser.add_argument(
        "--heads", nargs="+", default=[], type=heads_option, metavar="PART=NUMBER",
        help="heads of attention, for weights of other widths than the released ones",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        from mige.conversion import convert, read_prefixes
        from mige.sources import find_sources

        prefixes = read_prefixes(options.prefixes) if options.prefixes else None
        sources = find_sources(options.release, options.weights, options.vae, options.t5)
        convert(sources, options.output, prefixes, dict(options.heads), options.overwrite)
        if prefixes is None:
            log.warning(
                "without --prefixes nothing stands before the instructions; the released weights "
                "expect the release's own sentences there, and pictures will be worse: convert "
                "again with them, or write them into %s",
                options.output / "model_index.json",
            )
        print(options.output)


if __name__ == "__main__":
    main()
