"""The folders of `toybox.mige.begin`: what they may hold, and the model that is written.

The work folder holds

    settings.json                  what the run was told
    views_train_16000.safetensors  pictures that the vision encoder learns from, and likewise
    …                              those that it is measured on, and the triplets that are read
    vision.safetensors             the checkpoint of the vision encoder
    stack.safetensors              that of the other parts
    begin.png                      losses
"""

from pathlib import Path

from imagelab.errors import UserError, shown
from imagelab.io.atomic import write_json
from imagelab.io.folders import check_unused, check_writable
from imagelab.io.tensors import read_json
from imagelab.settings import check_within
from imagelab.training.seeds import check_seed
from mige.targets import check_output
from toybox.mige.config import BOUNDS, FREE, BeginConfig

RECORD, CURVES, SETTINGS = "begin.json", "begin.png", "settings.json"
TRAINING = "training.json"  # how a trained model was trained
RECORDS = (RECORD, TRAINING)


def check(config: BeginConfig, output: Path, work: Path, overwrite: bool) -> None:
    """Raises UserError for settings that make no sense, and for folders that hold other things."""
    check_seed(config.seed)
    check_within(config.settings(), BOUNDS)
    check_writable(work, "work")
    if work.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--work {work} lies in --output {output}; give another --work")
    check_output(output, [], overwrite, RECORDS)
    if (work / SETTINGS).is_file():
        _check_same(config, work)
    else:
        check_unused(work, "work")


def _check_same(config: BeginConfig, work: Path) -> None:
    """Raises UserError where a work folder holds a run with other settings."""
    then = read_json(work / SETTINGS, {}, "give another --work")
    changed = [f"--{k} {shown(then.get(k))}" for k, v in kept(config).items() if then.get(k) != v]
    if changed:
        raise UserError(
            f"{work} was begun with other settings ({', '.join(changed)}); go on with those, or "
            "give another --work"
        )


def note(config: BeginConfig, work: Path) -> None:
    """Make the work folder, and write down what the run was told."""
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / SETTINGS, kept(config))


def kept(config: BeginConfig) -> dict:
    """The settings that a resumed run has to share."""
    return {name: value for name, value in config.settings().items() if name not in FREE}
