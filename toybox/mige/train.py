"""Train toybox's MIGE from nothing, by one command: python -m toybox.mige.train.

    python -m toybox.mige.train --work W --output M

It renders triplets, makes the model that training begins with, computes features, trains, and
writes the model in half precision. Each part is a command of its own, which is printed. The same
command goes on where it was stopped.
"""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError

BATCH_SIZE = 16  # triplets of an update
#: How `mige.train` trains it. Batch size and rates are from trials; see toybox/mige/README.md.
RECIPE = {
    "optimizer": "muon",
    "warmup_steps": 100,
    "learning_rate": 1e-3,
    "conditioning_rate": 3e-5,
    "timestep_shift": 3,
    "cooldown": 0.3,
    "max_grad_norm": 1,
    "weight_decay": 0.01,
    "ema": 0.999,
    "probe_steps": 100,
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m toybox.mige.train", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of all that is made on the way")
    add("--output", type=Path, required=True, help="model folder to write")
    add("--overwrite", action="store_true", help="replace a model that is there")
    add("--seed", type=int, default=1, help="of the triplets")
    add("--triplets", type=int, default=24_000, help="to train on")
    add("--steps", type=int, default=25_000, help="updates")
    add("--batch_size", type=int, default=BATCH_SIZE, help="triplets of an update")
    add("--begin_from", type=Path, help="a toy MIGE to go on from; None: one is made")
    add("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu")
    add(
        "--mixed_precision",
        default="no",
        choices=("no", "bf16"),
        help="bf16: on CPUs that have it, and on GPUs, more steps a second",
    )
    add("--workers", type=int, default=0, help="processes that render and read ahead")
    add("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        check(options)
    for module, words in commands(options):
        print(shlex.join(["python", "-m", module, *words]), flush=True)
        main_of(module)(words)
    with report_errors(parser, options.debug):
        from toybox.mige.packing import pack

        pack(options.work / "run", begun(options), options.output)
        print(options.output)


def check(options: argparse.Namespace) -> None:
    """Raises UserError for a place that holds other things, and for a model that is no toy MIGE."""
    from imagelab.training.checkpoint import read_facts
    from mige.folder import find_folder
    from mige.targets import check_output
    from toybox.mige.folders import RECORD, RECORDS

    run = options.work / "run"
    if (run / "model").is_dir():  # of which nothing is trained any more
        then = read_facts(run / "checkpoint.safetensors", {"settings": dict})["settings"]
        for name in ("steps", "batch_size"):
            if (used := then.get(name)) != getattr(options, name):
                raise UserError(
                    f"{run} was trained with --{name} {used}; give that, or another --work"
                )
    if options.begin_from and not (find_folder(str(options.begin_from)) / RECORD).is_file():
        raise UserError(
            f"--begin_from {options.begin_from} is no toy MIGE: it has no {RECORD}; give a folder "
            "that toybox.mige.begin or toybox.mige.train wrote"
        )
    check_output(options.output, [], options.overwrite, RECORDS)


def commands(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Modules and their arguments, of what is still to be done, in order."""
    work, device = options.work, ["--device", options.device]
    workers = ["--workers", str(options.workers)]
    triplets, features, run = (str(work / name) for name in ("triplets", "features", "run"))
    data = ["--data", f"{triplets}/triplets.json", "--model", str(begun(options))]
    found = [
        (
            "toybox.triplets",
            ["--output", triplets, "--count", str(options.triplets), "--seed", str(options.seed)]
            + workers,
        )
    ]
    if options.begin_from is None and not (work / "begin" / "model_index.json").is_file():
        words = ["--output", str(work / "begin"), "--work", str(work / "begin_work")]
        words += [*device, *workers]
        found.append(("toybox.mige.begin", words))
    found.append(("mige.features", [*data, "--output", features, *device]))
    if not (work / "run" / "model").is_dir():
        words = [*data, "--features", features, "--output", run, *device, *workers]
        size = str(options.batch_size)
        words += ["--steps", str(options.steps), "--batch_size", size, "--micro_batch_size", size]
        words += ["--mixed_precision", options.mixed_precision]
        words += [word for name, value in RECIPE.items() for word in (f"--{name}", str(value))]
        is_begun = (work / "run" / "checkpoint.safetensors").is_file()
        found.append(("mige.train", [*words, "--resume" if is_begun else "--overwrite"]))
    return found


def begun(options: argparse.Namespace) -> Path:
    """The model that training begins with."""
    return options.begin_from or options.work / "begin"


def main_of(module: str) -> Callable[[list[str]], None]:
    """The command that a module is."""
    from importlib import import_module

    return import_module(module).main


if __name__ == "__main__":
    main()
