"""The comparison with steps of nothing; as a script, its command in such a hurry."""

import json

import pytest

import imagelab.figures
from experiments.comparison import command
from experiments.comparison.learning import learning_config
from experiments.comparison.settings import VARIANTS
from mifo.learning import priors

TINY = [
    *("--train_steps", "3", "--finetune_steps", "1", "--num_class_images", "1"),
    *("--num_inference_steps", "2", "--guidance_steps", "2", "--guidance_iterations", "1"),
    *("--folders", "2", "--seeds", "1", "--device", "cpu", "--mixed_precision", "no"),
]
ONLY = ["--only", "mifo", "rank4", "no_boxes"]


def hurry(patch):
    """Class images take one step, and the figures of learning are empty."""
    patch.setattr(priors, "STEPS", 1)
    for name in ("plot_losses", "plot_attention"):
        patch.setattr(imagelab.figures, name, lambda path, *args: path.touch())


class Counter:
    """Calls of a function are counted; number ``stop`` of them is a Ctrl-C."""

    def __init__(self, monkeypatch, owner, name, stop=None):
        self.count = 0
        function = getattr(owner, name)

        def counted(*args, **more):
            self.count += 1
            if self.count == stop:
                raise KeyboardInterrupt
            return function(*args, **more)

        monkeypatch.setattr(owner, name, counted)


def run(work, *more):
    command.main([*TINY, *ONLY, "--work", str(work), *more])


def facts_of(work):
    return json.loads((work / "comparison.json").read_text())


def settings_of(*argv):
    return command.chosen(command.parse_args([*TINY, *argv])[1])[0]


def config_of(work, name, *argv):
    """How the first folder is learned in a variant."""
    return learning_config(work, settings_of(*argv), VARIANTS[name], "kind2_000")


if __name__ == "__main__":
    hurry(pytest.MonkeyPatch())
    command.main()
