"""Do MIGE's tasks help each other, and what are its pictures for? python -m experiments.mutual

    python -m experiments.mutual --work W --begin BEGIN --triplets TRIPLETS --features FEATURES

trains a toy MIGE in six ways from one start, each for as many samples: all tasks together, each
task alone, without the autoencoder's features, and without pictures in the instruction. A seventh,
all tasks together, is trained three times as long: for as many samples of each task as those of one
task. Then each paints held-out items, which toybox's classifier judges, and its error is measured
on held-out triplets. Writes rows.jsonl, errors.jsonl and mutual.md into W. The same command goes on
where it was stopped; several, with other --variants or --seeds, may share W once one of them has
begun. What it begins with is made by the first commands of `python -m toybox.mige.train`.
"""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

from experiments.mutual.report import ERRORS, ROWS, write_lines, write_mutual
from experiments.mutual.variants import VARIANTS, write_list, write_start
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, write_json
from imagelab.io.folders import check_writable
from imagelab.io.tensors import read_json
from imagelab.settings import check_within
from mige.folder import find_folder, model_digest
from mige.method.wording import TASKS
from toybox.mige.train import BATCH_SIZE, recipe_for

BOUNDS = {
    "steps": (1, 10_000_000), "items": (1, 100_000), "held_out": (3, 100_000),
    "batch_size": (1, 10_000), "training_batch": (1, 100_000), "workers": (0, 256),
}  # fmt: skip
KEPT = ("index", "checks", "l1", "autoencoder_l1")  # of a painted item's record
#: Options that all trainings of a folder share.
KNOWN = ("steps", "training_batch", "items", "held_out", "mixed_precision")
SETTINGS, RUN, HELD_OUT = "settings.json", "run", "held_out"


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.mutual", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("mutual"), help="where everything goes")
    add("--begin", type=Path, required=True, help="model folder that all begin with")
    add("--triplets", type=Path, required=True, help="folder that toybox.triplets wrote")
    add("--features", type=Path, required=True, help="folder that mige.features wrote of them")
    add("--steps", type=int, default=4000, help="updates of a training")
    add("--training_batch", type=int, default=BATCH_SIZE, help="triplets of an update")
    add("--items", type=int, default=64, help="held-out items of each row: of a task and an op")
    add("--held_out", type=int, default=600, help="triplets whose error is measured")
    add("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    add(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"some of {', '.join(VARIANTS)}",
    )  # fmt: skip
    add("--batch_size", type=int, default=32, help="pictures painted at a time")
    add("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu")
    add("--mixed_precision", default="no", choices=("no", "bf16"), help="of the trainings")
    add("--workers", type=int, default=0, help="processes that read ahead for a training")
    add("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        check_options(options)
    prepare(options)
    try:
        for seed in dict.fromkeys(options.seeds):
            for name in dict.fromkeys(options.variants):
                run_variant(parser, options, name, seed)
    finally:
        with report_errors(parser, options.debug):
            print(write_mutual(options.work))


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for what makes no sense, or is not what the work folder was made with.

    ``--begin`` becomes a folder.
    """
    check_within({name: getattr(options, name) for name in BOUNDS}, BOUNDS)
    check_writable(options.work, "work")
    path = options.triplets / "triplets.json"
    if not path.is_file():
        raise UserError(f"there is no {path}; `python -m toybox.triplets` writes it")
    options.begin = find_folder(str(options.begin))
    with path.open("rb") as file:
        triplets = hashlib.file_digest(file, "sha256").hexdigest()
    now = {name: getattr(options, name) for name in KNOWN}
    now |= {"begin": model_digest(options.begin), "triplets": triplets}
    options.work.mkdir(parents=True, exist_ok=True)
    if (options.work / SETTINGS).is_file():
        then = {"training_batch": BATCH_SIZE}  # of folders that do not tell
        then |= read_json(options.work / SETTINGS, {}, "give another --work")
        if changed := [name for name in now if then.get(name) != now[name]]:
            name = changed[0]
            is_digest = name in ("begin", "triplets")
            was = f"another --{name}" if is_digest else f"--{name} {then.get(name)}"
            raise UserError(
                f"{options.work} was made with {was}; go on with that, or give another --work"
            )
    else:
        write_json(options.work / SETTINGS, now)


def prepare(options: argparse.Namespace) -> None:
    """Held-out triplets and their features, by the commands that make those of training."""
    from mige.features import main as features_main
    from toybox.triplets import main as triplets_main

    folder = str(options.work / HELD_OUT)
    triplets_main(["--output", folder, "--split", "test", "--count", str(options.held_out)])
    features_main(
        ["--data", f"{folder}/triplets.json", "--model", str(options.begin)]
        + ["--output", f"{folder}_features", "--device", options.device]
    )


def run_variant(parser, options: argparse.Namespace, name: str, seed: int) -> None:
    """Train one variant with one seed, paint and judge; what is there already stays."""
    folder = options.work / f"{name}-{seed}"
    with report_errors(parser, options.debug):
        folder.mkdir(exist_ok=True)
        write_start(VARIANTS[name], options.begin, folder / "begin")
        if not (folder / "list.json").is_file():
            write_list(VARIANTS[name], options.triplets, folder / "list.json")
    if not (folder / RUN / "model").is_dir():
        train(options, name, folder, seed)
    with report_errors(parser, options.debug), folder_lock(folder, "--work"):
        measure(options, name, folder)
        measure_errors(options, name, folder)


def train(options: argparse.Namespace, name: str, folder: Path, seed: int) -> None:
    """Train by the command that anyone trains with."""
    from mige.train import main as train_main

    words = {
        "data": folder / "list.json", "root": options.triplets, "features": options.features,
        "model": folder / "begin", "output": folder / RUN, "seed": seed,
        "steps": options.steps * VARIANTS[name].times,
        "device": options.device, "workers": options.workers, "sample_steps": 0,
        "checkpoint_steps": 250, "micro_batch_size": options.training_batch,
        "mixed_precision": options.mixed_precision,
        **recipe_for(options.training_batch),
    }  # fmt: skip
    argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    is_begun = (folder / RUN / "checkpoint.safetensors").is_file()
    train_main([*argv, "--resume"] if is_begun else argv)


def measure(options: argparse.Namespace, name: str, folder: Path) -> None:
    """Paint and judge the held-out items of a variant's tasks."""
    from experiments.mutual.painting import WordsPainter
    from toybox.mige.evaluate import parse_args as usual
    from toybox.mige.evaluation import items
    from toybox.mige.evaluation.painters import load_painter
    from toybox.mige.evaluation.running import evaluate

    variant, model = VARIANTS[name], folder / RUN / "model"
    rows = [row for row, found in items.ROWS.items() if found.task in variant.tasks]
    _, given = usual(
        ["--model", str(model), "--output", str(folder), "--device", options.device]
        + ["--batch_size", str(options.batch_size)]
    )
    painter = load_painter(given, rows)
    if not variant.reads_pictures:
        painter = WordsPainter(painter.pipeline, painter.digest, painter.config, str(model))
    found = evaluate(painter, rows, options.items, 0, given.seed, folder / "evaluation")
    kept = [
        {"row": row, "task": items.ROWS[row].task, **{k: record[k] for k in KEPT if k in record}}
        for row, records in found.rows.items()
        for record in records
    ]
    write_lines(folder / ROWS, kept)


def measure_errors(options: argparse.Namespace, name: str, folder: Path) -> None:
    """The errors of a variant on the held-out triplets of its tasks."""
    from experiments.mutual.errors import held_out_errors
    from imagelab.models.device import choose_device

    variant, root = VARIANTS[name], options.work / HELD_OUT
    whole = replace(variant, tasks=TASKS)  # of all variants a triplet has the same place
    write_list(whole, root, folder / "held_out.json")
    found = held_out_errors(
        folder / RUN / "model", folder / "held_out.json", root, Path(f"{root}_features"), 0,
        choose_device(options.device),
    )  # fmt: skip
    write_lines(folder / ERRORS, [each for each in found if each["task"] in variant.tasks])
