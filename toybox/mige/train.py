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
from imagelab.errors import UserError, shown
from imagelab.settings import check_within

BATCH_SIZE = 16  # triplets of an update
#: How `mige.train` trains it with BATCH_SIZE, from trials; see toybox/mige/README.md.
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
BOUNDS = {
    "triplets": (1, 10_000_000),
    "steps": (1, 100_000_000),
    "batch_size": (1, 100_000),
    "workers": (0, 256),
}
MADE = ("triplets", "begin", "begin_work", "features", "run")  # folders in --work
#: File in --work of what a training was told that its checkpoint does not tell.
SETTINGS = "settings.json"


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
        options.begin_from = options.begin_from and find_begin(options.begin_from)
        check(options)
        note(options)
    for module, words in commands(options):
        print(shlex.join(["python", "-m", module, *words]), flush=True)
        main_of(module)(words)
    with report_errors(parser, options.debug):
        from toybox.mige.packing import pack

        check(options)  # once more: hours may have gone by, and all triplets are there now
        pack(options.work / "run", begun(options), options.output, options.overwrite)
        print(options.output)


# ----------------------------------------------------------------------------------------------
# what is checked before anything is done


def find_begin(source: Path) -> Path:
    """The folder of --begin_from; a UserError where it is no toy MIGE."""
    from mige.folder import find_folder
    from toybox.mige.folders import RECORD

    folder = find_folder(str(source))
    if not (folder / RECORD).is_file():
        raise UserError(
            f"--begin_from {source} is no toy MIGE: it has no {RECORD}; give a folder that "
            "toybox.mige.begin or toybox.mige.train wrote"
        )
    return folder


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that make no sense, and where --work holds another training."""
    from imagelab.models.device import choose_device
    from imagelab.training.seeds import check_seed

    check_within({name: getattr(options, name) for name in BOUNDS}, BOUNDS)
    check_seed(options.seed)
    choose_device(options.device)
    check_work(options)
    check_places(options)
    check_training(options)


def check_work(options: argparse.Namespace) -> None:
    """Raises UserError where the work folder holds anything but what this command makes."""
    from imagelab.io.folders import check_unused, check_writable
    from imagelab.io.tensors import read_json

    work, advice = options.work, "give another --work"
    check_writable(work, "work")
    check_unused(work, "work", (*MADE, SETTINGS))
    noted = work / SETTINGS
    if noted.is_file() and [*read_json(noted, {}, advice)] != ["mixed_precision"]:
        raise UserError(f"{noted} is not of this command; {advice}")
    if not is_begun(options):
        check_unused(work / "run", "work")


def check_places(options: argparse.Namespace) -> None:
    """Raises UserError where the output would replace what is needed, or something else is."""
    from mige.targets import check_output
    from toybox.mige.folders import RECORDS

    needed = [options.work, *(options.work / name for name in MADE)]  # which may be links
    needed += [options.begin_from] if options.begin_from else []
    output = options.output.resolve()
    for place in needed:
        if output.is_relative_to(place.resolve()):
            how = "is" if output == place.resolve() else "lies in"
            raise UserError(f"--output {options.output} {how} {place}; give another folder")
    check_output(options.output, needed, options.overwrite, RECORDS)


def check_training(options: argparse.Namespace) -> None:
    """Raises UserError where a training in the work folder is not the one that is asked for."""
    from imagelab.io.tensors import read_json
    from imagelab.training.checkpoint import read_facts
    from mige.training.config import LENGTH_SETTINGS, TrainingConfig
    from mige.training.plan import kept_settings, settings_then

    if not is_begun(options):
        return
    run, noted = options.work / "run", options.work / SETTINGS
    facts = read_facts(run / "checkpoint.safetensors", {"settings": dict, "inputs": dict})
    then = settings_then(facts)
    if noted.is_file():
        then |= read_json(noted, {"mixed_precision": str}, "give another --work")
    now = kept_settings(TrainingConfig.from_settings(**numbers(options)))
    now |= {"mixed_precision": options.mixed_precision}
    # of a training that goes on mige.train tells how long it may become
    free = () if (run / "model").is_dir() else LENGTH_SETTINGS
    changed = [n for n in now if n in then and n not in free and then[n] != now[n]]
    if asked := [name for name in changed if hasattr(options, name)]:
        told = ", ".join(
            f"no --{name}" if then[name] is None else f"--{name} {shown(then[name])}"
            for name in asked
        )
        raise UserError(f"{run} was trained with {told}; give that, or another --work")
    if changed:  # of RECIPE, or of what follows from it
        told = ", ".join(f"{name} {shown(then[name])}" for name in changed)
        raise UserError(
            f"{run} was trained by an earlier recipe ({told}); go on with `python -m mige.train "
            "--resume` and its numbers, or give another --work"
        )
    check_inputs(options, facts["inputs"])


def check_inputs(options: argparse.Namespace, inputs: dict) -> None:
    """Raises UserError unless a training had this start, and the triplets that are there."""
    import hashlib

    from mige.folder import INDEX, model_digest

    run, start = options.work / "run", begun(options)
    digest = model_digest(start) if (start / INDEX).is_file() else None
    if inputs.get("--model") != digest:
        raise UserError(
            f"{run} was trained from another model than {start}; give that one as --begin_from, or "
            "another --work"
        )
    triplets = options.work / "triplets" / "triplets.json"
    if triplets.is_file():
        with triplets.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if inputs.get("--data") != digest:
            raise UserError(
                f"{run} was trained on other triplets than those of {triplets}; put those back, or "
                "give another --work"
            )


def is_begun(options: argparse.Namespace) -> bool:
    """Whether the work folder holds a training, finished or not."""
    run = options.work / "run"
    return (run / "model").is_dir() or (run / "checkpoint.safetensors").is_file()


def note(options: argparse.Namespace) -> None:
    """Write down what a training that is still to begin is told."""
    from imagelab.io.atomic import write_json

    if not is_begun(options):
        options.work.mkdir(parents=True, exist_ok=True)
        write_json(options.work / SETTINGS, {"mixed_precision": options.mixed_precision})


# ----------------------------------------------------------------------------------------------
# what is done


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
        words += ["--micro_batch_size", str(options.batch_size)]
        words += ["--mixed_precision", options.mixed_precision]
        told = numbers(options).items()
        words += [word for name, value in told for word in (f"--{name}", str(value))]
        found.append(("mige.train", [*words, "--resume"] if is_begun(options) else words))
    return found


def numbers(options: argparse.Namespace) -> dict:
    """The numbers of the method, by their names in mige.train."""
    return {"steps": options.steps, **recipe_for(options.batch_size)}


def recipe_for(batch_size: int) -> dict:
    """RECIPE for a batch of another size: the rates grow with its cube root."""
    growth = (batch_size / BATCH_SIZE) ** (1 / 3)
    rates = {name: RECIPE[name] * growth for name in ("learning_rate", "conditioning_rate")}
    return {"batch_size": batch_size, **RECIPE, **rates}


def begun(options: argparse.Namespace) -> Path:
    """The model that training begins with."""
    return options.begin_from or options.work / "begin"


def main_of(module: str) -> Callable[[list[str]], None]:
    """The command that a module is."""
    from importlib import import_module

    return import_module(module).main


if __name__ == "__main__":
    main()
