"""Make the model that MIGE's training starts from: python -m mige.start.

    python -m mige.start --pixart DIR --blip2 DIR --output M

The trunk is PixArt-α's for 512×512, its input widened by zeros for the picture to edit. The vision
encoder, the Q-Former, its queries and the projection are BLIP-2's with a FLAN-T5. T5 and the
autoencoder are those of PixArt-α, or others. The feature fusion and the null text are drawn.

Each is a folder of safetensors, or a model of the hub, of which only what is needed is fetched.
Nothing in them is run. --prefixes is a JSON file with the sentences before instructions:

    {"subject": "…", "subject_inference": "…", "edit": "…", "subject_edit": "…"}
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(prog="python -m mige.start", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--pixart", required=True, help="folder of diffusers, such as PixArt-XL-2-512x512's"
    )
    parser.add_argument(
        "--blip2", required=True, help="folder of transformers, such as blip2-flan-t5-xxl's"
    )
    parser.add_argument("--t5", help="folder of a T5 with its tokenizer; None: PixArt-α's")
    parser.add_argument("--vae", help="folder of an AutoencoderKL; None: PixArt-α's")
    parser.add_argument("--output", required=True, type=Path, help="model folder to write")
    parser.add_argument("--prefixes", type=Path, help="sentences of the tasks; None: empty ones")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--text_length", type=int, default=256, help="tokens of an instruction, pictures included"
    )
    parser.add_argument(
        "--exact_timesteps", action="store_true",
        help="the model sees timesteps as they are, not as bfloat16 rounds them",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument("--offline", action="store_true", help="never ask the hub for anything")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        from mige.conversion import read_prefixes
        from mige.origins import Origins
        from mige.starting import start

        prefixes = read_prefixes(options.prefixes) if options.prefixes else None
        start(
            Origins.of(options.pixart, options.blip2, options.t5, options.vae, options.offline),
            options.output,
            prefixes,
            options.seed,
            options.text_length,
            not options.exact_timesteps,
            options.overwrite,
        )
        print(options.output)


if __name__ == "__main__":
    main()
