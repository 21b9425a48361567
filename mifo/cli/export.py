"""Export a learned folder in the formats of other programs (MIFO).

Reads {models_dir}/{model_id}, which semantic_learning.py wrote, and writes into
{output_path}/{model_id}:

    kohya       {model_id}.safetensors, the LoRA for A1111 and ComfyUI
    diffusers   pytorch_lora_weights.safetensors, for load_lora_weights
    embeddings  embeddings/asset0.safetensors …, a textual inversion for each token
    pipeline    pipeline/, the base model with everything merged, for from_pretrained

The LoRA needs the embeddings of its tokens beside it. diffusers reads each export back, and
nothing is written whose noise prediction differs from the learned model's by more than 1e-4.
A1111 and ComfyUI name an embedding after its file: write asset0 there, <asset0> in diffusers.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.io.folders import check_name
from mifo.synthesis.config import SynthesisConfig

FORMATS = ("kohya", "diffusers", "embeddings", "pipeline")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    defaults = SynthesisConfig()
    parser = Parser(prog="semantic_export.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model_id", default=defaults.model_id, help="name of the learned folder")
    parser.add_argument(
        "--models_dir", default=defaults.models_dir, help="folder of the learned folders"
    )
    parser.add_argument("--output_path", default="exports", help="where the folder of exports goes")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["kohya", "embeddings"],
        help="one or more formats",
    )
    parser.add_argument(
        "--model_path", help="base model; None: the one that the learned folder names"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace exports that are there")
    parser.add_argument("--offline", action="store_true", help="never ask the hub for anything")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        from mifo.export import export
        from mifo.learned import read_learned_folder

        check_name(options.model_id, "model_id")
        learned = read_learned_folder(Path(options.models_dir) / options.model_id)
        exports = export(
            learned,
            Path(options.output_path),
            options.format,
            options.overwrite,
            options.model_path,
            options.offline,
        )
        for path, difference in exports:
            print(f"{path}: differs by {difference:.1e} from the learned model")
