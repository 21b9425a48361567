"""The experiments with steps of nothing; as a script, the comparison's command in such a hurry.

As a script it is two processes, which find each other as those of torchrun do.
"""

import json
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from forked import fork_two

import imagelab.figures
from experiments import plain
from experiments.comparison import command
from experiments.comparison.folders import make_job
from experiments.comparison.settings import Settings, Variant
from mifo.learning import priors

EXAMPLES = Path(__file__).parents[2] / "example"
TINY = [
    *("--train_steps", "3", "--finetune_steps", "1", "--num_class_images", "1"),
    *("--num_inference_steps", "1", "--guidance_steps", "1", "--pictures", "1", "--alone", "1"),
    *("--folders", "2", "--tokens", "random", "--device", "cpu", "--mixed_precision", "no"),
]
LOSSES = ["--losses", "mifo", "none"]
STEPS = 3 + 1  # of learning one folder
#: The same for the plain commands, which have no options for it.
LEARNING = {"train_steps": 3, "reward_steps": 1, "finetune_steps": 1, "num_class_images": 1}
PAINTING = {"num_inference_steps": 1, "guidance_steps": 1}
make_plain_jobs = partial(plain.make_jobs, settings=LEARNING)


def hurry(patch):
    """Class images take one step, the figures of learning are empty, plain jobs are tiny."""

    def plain_jobs(*args):
        return [
            replace(job, painting={**job.painting, **PAINTING}) for job in make_plain_jobs(*args)
        ]

    patch.setattr(priors, "STEPS", 1)
    for name in ("plot_losses", "plot_attention"):
        patch.setattr(imagelab.figures, name, lambda path, *args: path.touch())
    patch.setattr(plain, "make_jobs", plain_jobs)
    patch.setattr(plain, "PICTURES", 1)
    patch.setattr(plain, "ALONE", 1)


class Counter:
    """Calls of a function are counted; in number ``stop`` of them Ctrl-C is pressed."""

    def __init__(self, monkeypatch, owner, name, stop=None):
        self.count = 0
        function = getattr(owner, name)

        def counted(*args, **more):
            self.count += 1
            if self.count == stop:
                signal.raise_signal(signal.SIGINT)
            return function(*args, **more)

        monkeypatch.setattr(owner, name, counted)


def run(work, *more):
    """The comparison of two folders with two losses."""
    command.main([*TINY, *LOSSES, "--work", str(work), *more])


def run_plain(work, *more):
    """The plain commands with one seed; ``work`` holds what is learned, too."""
    options = ["--folder_path", str(work / "folders"), "--seeds", "1", "--device", "cpu"]
    plain.main(["--work", str(work), *options, "--mixed_precision", "no", *more])


def settings_of(*argv) -> Settings:
    return command.chosen(command.parse_args([*TINY, *argv])[1])[0]


def job_of(work, name, loss="mifo", *argv):
    """A folder of the comparison with a loss."""
    return make_job(work, settings_of(*argv), Variant("toybox", "random", loss), name)


def rows_by_key(work) -> dict[str, dict]:
    lines = (work / "rows.jsonl").read_text().splitlines()
    rows = {row["key"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines)  # each is written once
    return rows


def findings(work) -> dict[str, bytes]:
    """What a command writes for people, by the file's name."""
    return {path.name: path.read_bytes() for path in work.glob("*.*") if path.suffix != ".jsonl"}


if __name__ == "__main__":
    hurry(pytest.MonkeyPatch())
    sys.exit(fork_two(command.main))
