"""Do MIGE's tasks help each other, and what are its pictures for? python -m experiments.mutual

    python -m experiments.mutual --work W --begin BEGIN --triplets TRIPLETS --features FEATURES

trains a toy MIGE in six ways from one start, each for as many samples: all tasks together, each
task alone, without the autoencoder's features, and without pictures in the instruction. Then each
paints held-out items, which toybox's classifier judges. Writes rows.jsonl and mutual.md into W. The
same command goes on where it was stopped; several, with other --variants or --seeds, may share W.
What it begins with is made by the first commands of `python -m toybox.mige.train`.
"""

import argparse
import json
import logging
from pathlib import Path

from experiments.mutual.report import write_mutual
from experiments.mutual.variants import VARIANTS, write_list, write_start
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, write_json
from imagelab.io.folders import check_writable
from imagelab.io.tensors import read_json
from imagelab.settings import check_within

log = logging.getLogger(__name__)

BOUNDS = {"steps": (1, 10_000_000), "items": (1, 100_000), "batch_size": (1, 10_000)}
SETTINGS, RUN = "settings.json", "run"


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.mutual", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("mutual"), help="where everything goes")
    add("--begin", type=Path, required=True, help="model folder that all begin with")
    add("--triplets", type=Path, required=True, help="folder that toybox.triplets wrote")
    add("--features", type=Path, required=True, help="folder that mige.features wrote of them")
    add("--steps", type=int, default=4000, help="updates of each training")
    add("--items", type=int, default=64, help="held-out items of each row: of a task and an op")
    add("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    add(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"some of {', '.join(VARIANTS)}",
    )  # fmt: skip
    add("--batch_size", type=int, default=32, help="pictures painted at a time")
    add("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu")
    add("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        check_options(options)
    try:
        for seed in dict.fromkeys(options.seeds):
            for name in dict.fromkeys(options.variants):
                run_variant(parser, options, name, seed)
    finally:
        with report_errors(parser, options.debug):
            print(write_mutual(options.work))


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for what makes no sense, or is not what the work folder was made with."""
    check_within({name: getattr(options, name) for name in BOUNDS}, BOUNDS)
    check_writable(options.work, "work")
    path = options.triplets / "triplets.json"
    if not path.is_file():
        raise UserError(f"there is no {path}; `python -m toybox.triplets` writes it")
    options.work.mkdir(parents=True, exist_ok=True)
    now = {name: getattr(options, name) for name in ("steps", "items")}
    if (options.work / SETTINGS).is_file():
        then = read_json(options.work / SETTINGS, dict.fromkeys(now, int), "give another --work")
        if changed := [name for name in now if then[name] != now[name]]:
            raise UserError(
                f"{options.work} was made with --{changed[0]} {then[changed[0]]}; go on with that, "
                "or give another --work"
            )
    else:
        write_json(options.work / SETTINGS, now)


def run_variant(parser, options: argparse.Namespace, name: str, seed: int) -> None:
    """Train one variant with one seed, paint and judge; what is there already stays."""
    folder = options.work / f"{name}-{seed}"
    with report_errors(parser, options.debug):
        folder.mkdir(exist_ok=True)
        write_start(VARIANTS[name], options.begin, folder / "begin")
        if not (folder / "list.json").is_file():
            write_list(VARIANTS[name], options.triplets, folder / "list.json")
    if not (folder / RUN / "model").is_dir():
        train(options, folder, seed)
    with report_errors(parser, options.debug), folder_lock(folder, "--work"):
        measure(options, name, folder)


def train(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """Train by the command that anyone trains with."""
    from mige.train import main as train_main
    from toybox.mige.train import RECIPE

    words = {
        "data": folder / "list.json", "root": options.triplets, "features": options.features,
        "model": folder / "begin", "output": folder / RUN, "steps": options.steps, "seed": seed,
        "device": options.device, "workers": 0, "sample_steps": 0, "checkpoint_steps": 250,
        **RECIPE,
    }  # fmt: skip
    argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    is_begun = (folder / RUN / "checkpoint.safetensors").is_file()
    train_main([*argv, "--resume"] if is_begun else argv)


def measure(options: argparse.Namespace, name: str, folder: Path) -> None:
    """Paint and judge the held-out items of a variant's tasks."""
    from experiments.mutual.painting import WordsPainter
    from mige.config import PaintingConfig
    from toybox.mige.evaluate import parse_args as usual
    from toybox.mige.evaluation.items import ROWS
    from toybox.mige.evaluation.painters import load_painter
    from toybox.mige.evaluation.running import evaluate

    variant, model = VARIANTS[name], folder / RUN / "model"
    rows = [row for row, found in ROWS.items() if found.task in variant.tasks]
    _, given = usual(
        ["--model", str(model), "--output", str(folder), "--device", options.device]
        + ["--batch_size", str(options.batch_size)]
    )
    painter = load_painter(given, rows)
    if not variant.reads_pictures:
        config: PaintingConfig = painter.config
        painter = WordsPainter(painter.pipeline, painter.digest, config, str(model))
    found = evaluate(painter, rows, options.items, 0, given.seed, folder / "evaluation")
    kept = [
        {"row": row, "task": ROWS[row].task, **{k: record[k] for k in KEPT if k in record}}
        for row, records in found.rows.items()
        for record in records
    ]
    text = "".join(json.dumps(each) + "\n" for each in kept)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


KEPT = ("index", "checks", "l1", "autoencoder_l1")
