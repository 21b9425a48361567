"""A training, checked whole before any weights are read.

The output folder holds

    checkpoint.safetensors   weights that learn, moments, curves: what --resume goes on from
    curves.png               losses, by task
    samples/                 what the model painted on the way
    model/                   the trained model, once training is done
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from imagelab.errors import UserError
from imagelab.io.folders import check_only, check_unused, check_writable, foreign
from imagelab.models.device import choose_precision
from imagelab.processes import Processes
from imagelab.training.checkpoint import Checkpoint, read_facts
from imagelab.training.seeds import check_seed
from mige.data.checking import MOST_TOLD, Limits, check_records, tell
from mige.data.features import Features, open_features
from mige.data.records import RecordList
from mige.folder import CONTENTS, find_folder, model_digest
from mige.training.config import (
    FREE_SETTINGS,
    LENGTH_SETTINGS,
    TrainingConfig,
    check_settings,
)
from mige.training.samples import Facts

CHECKPOINT, CURVES, SAMPLES, MODEL = "checkpoint.safetensors", "curves.png", "samples", "model"
OWN = (CHECKPOINT, CURVES, SAMPLES, MODEL)  # what a training writes into its output folder


@dataclass(frozen=True)
class Plan:
    """What is to be trained, on what, and where; all of it checked.

    Attributes:
        folder: of the model that is begun with; ``digest``: of its weights and settings.
        which: records to train on, by their position in the list.
    """

    config: TrainingConfig
    processes: Processes
    dtype: torch.dtype
    folder: Path
    digest: str
    records: RecordList
    which: np.ndarray
    features: Features

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def device(self) -> str:
        return self.processes.device

    @property
    def share(self) -> int:
        """Samples of a process in a step."""
        return self.config.recipe.batch_size // self.processes.count

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.config.recipe.updates(len(self.which))

    @cached_property
    def facts(self) -> Facts:
        """What of the model its samples depend on."""
        return Facts.of(self.folder)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of what is trained, and on what."""
        with self.records.path.open("rb") as file:
            data = hashlib.file_digest(file, "sha256").hexdigest()
        return {"--model": self.digest, "--data": data}


def make_plan(config: TrainingConfig, processes: Processes) -> Plan:
    """Check all that a training needs, but for its weights.

    Raises UserError for the first thing that would not work; records are checked all together.
    """
    check_settings(config)
    check_seed(config.seed)
    recipe, running = config.recipe, config.running
    if recipe.batch_size % processes.count:
        raise UserError(
            f"--batch_size {recipe.batch_size} cannot be shared over {processes.count} processes; "
            f"give a multiple of {processes.count}"
        )
    if running.shard and processes.count == 1:
        raise UserError("--shard needs several processes: start them with `accelerate launch`")
    if running.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 overflows in T5; give bf16 or no")
    check_writable(Path(config.output), "output")
    folder = find_folder(config.model)
    records = RecordList(Path(config.data))
    features = open_features(Path(config.features), folder)
    with processes.first_alone():  # who tells all problems; then the launcher ends the others
        which = None
        if processes.is_first:
            which = check_records(records, Path(config.root), Limits.of_folder(folder))
            report_missing(features, records, which)
    which = processes.agree(which)
    dtype = choose_precision(running.mixed_precision, processes.device)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return Plan(config, processes, dtype, folder, model_digest(folder), records, which, features)


def report_missing(features: Features, records: RecordList, which: np.ndarray) -> None:
    """Raises UserError where pictures have no features; the first of them are logged."""
    lines, count = [], 0
    for line in features.missing(records, which):
        count += 1
        lines += [line] if count <= MOST_TOLD else []
    if count:
        tell(lines, count)
        raise UserError(
            f"features are missing in {count} places, as listed above; make them with "
            "`python -m mige.features` and the same --data, --root and --model"
        )


def check_output(config: TrainingConfig, resume: bool, overwrite: bool) -> None:
    """Raises UserError where a folder holds what was not asked to go on with, or to replace."""
    output = Path(config.output)
    is_begun, is_done = (output / CHECKPOINT).is_file(), (output / MODEL).exists()
    check_apart(config)
    if resume and overwrite:
        raise UserError("--resume and --overwrite are both given; give one of them")
    if resume and not is_begun:
        raise UserError(f"{output} holds no checkpoint to go on from; leave out --resume")
    if is_begun and not (resume or overwrite):
        raise UserError(
            f"{output} holds a training; go on with --resume, start anew with --overwrite, or "
            "give another --output"
        )
    if is_done and not (resume or overwrite):
        raise UserError(
            f"{output} holds a trained model; replace it with --overwrite, or give another --output"
        )
    if (output / MODEL).is_dir():
        check_only(output / MODEL, CONTENTS)
    if not is_begun and output.is_dir():
        names = [path.name for path in foreign(output)]
        if (own := [name for name in names if name in OWN]) and not overwrite:
            raise UserError(
                f"{output} holds {own[0]}, as of a training; replace it with --overwrite, or give "
                "another --output"
            )
        check_unused(output, "output", OWN)


def check_apart(config: TrainingConfig) -> None:
    """Raises UserError where the output would take the place of what is trained on."""
    output = Path(config.output).resolve()
    for name in ("data", "root", "features", "model"):
        given = Path(getattr(config, name)).expanduser()
        if any(given.resolve().is_relative_to(output / own) for own in OWN):
            raise UserError(
                f"--{name} {given} lies where --output {config.output} is written, which would "
                "replace it; give another --output"
            )
        if name in ("features", "model") and output.is_relative_to(given.resolve()):
            raise UserError(f"--output {config.output} lies in --{name} {given}; give another")


def check_same(config: TrainingConfig, inputs: dict[str, str]) -> None:
    """Raises UserError unless an unfinished training had these settings and inputs."""
    facts = read_facts(Path(config.output) / CHECKPOINT, {"settings": dict, "inputs": dict})
    now, then = kept_settings(config), settings_then(facts)
    changed = [n for n in now if n not in LENGTH_SETTINGS and then.get(n) != now[n]]
    if changed:
        shown = ", ".join(
            f"no --{name}" if then.get(name) is None else f"--{name} {then[name]}"
            for name in changed
        )
        raise UserError(
            f"the training in {config.output} had other settings ({shown}); go on with those, or "
            "start anew with --overwrite in place of --resume"
        )
    changed = [name for name in inputs if facts["inputs"].get(name) != inputs[name]]
    if changed:
        raise UserError(
            f"{changed[0]} is not what the training in {config.output} had; put that back, or "
            "start anew with --overwrite in place of --resume"
        )


def check_rates(plan: Plan, saved: Checkpoint) -> None:
    """Raises UserError where the updates that were made had other rates than they would have now.

    A training may become longer, and may be told when to end, before its rates fall.
    """
    done, recipe = saved.step, plan.config.recipe
    if done > plan.steps:
        raise UserError(
            f"{plan.output} has {done} steps already, and {plan.steps} are asked for; give more "
            "--steps, or use the model that is there"
        )
    then = settings_then(saved.facts)
    before = replace(recipe, **{name: then[name] for name in LENGTH_SETTINGS})
    steps = before.updates(len(plan.which))
    if (before.cooldown, steps) == (recipe.cooldown, plan.steps):
        return
    if before.has_cooled(done, steps):
        raise UserError(
            f"the rates of the training in {plan.output} have begun to fall; go on with --steps "
            f"{steps} --cooldown {before.cooldown:g}, or start anew with --overwrite"
        )
    if recipe.has_cooled(done, plan.steps):
        raise UserError(
            f"{plan.output} has {done} steps already, and with --cooldown {recipe.cooldown:g} the "
            f"rates of {plan.steps} would have begun to fall; give more --steps"
        )


def settings_then(facts: Mapping) -> dict:
    """The settings of a checkpoint; one that it is older than was as it is by default."""
    return kept_settings(TrainingConfig()) | facts["settings"]


def kept_settings(config: TrainingConfig) -> dict:
    """The settings that a checkpoint tells of, in JSON's types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.settings().items()
        if name not in FREE_SETTINGS
    }
