"""The settings of a comparison, and its variants: the only home of both."""

from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

#: How much each loss weighs, times its own weight. See docs/results.md for how they were chosen.
LOSSES = {"mifo": 1.0, "break_a_scene": 1.0, "none": 1.0, "reward": 1.0, "penalty": 1.0}
TEXTS = {
    "mifo": "MIFO: reward, then penalty",
    "break_a_scene": "Break-a-Scene's attention loss",
    "none": "no attention loss",
    "reward": "reward only",
    "penalty": "penalty only",
}
#: How the tokens begin: at random, or from the word for their kind.
TOKENS = ("random", "kind")


@dataclass(frozen=True)
class Settings:
    """What all variants share.

    Steps, and the rate of stage 1, are the method's own; that of stage 2 was found on folders that
    are there for that (docs/results.md). The scale of random tokens and the guidance scale are
    those that toybox brings, given here for all base models alike.
    """

    folders: int = 6
    first: int = 0
    seed: int = 0
    train_steps: int = 600
    finetune_steps: int = 400
    learning_rate: float = 5e-3
    finetune_learning_rate: float = 3e-4
    initializer_scale: float = 0.02
    num_class_images: int = 16
    weight: float = 1.0

    pictures: int = 4
    alone: int = 4
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    guidance_steps: int = 15

    device: str = "auto"
    mixed_precision: str = "auto"


#: Least and most of the numbers that learning and synthesis do not have (`mifo.bounds`).
BOUNDS = {
    "folders": (1, 100_000),
    "first": (0, 1_000_000),
    "weight": (0.0, 1e6),
    "pictures": (1, 100_000),
    "alone": (1, 100_000),
}
HELP = {
    "folders": "instance folders",
    "first": "number of the first of them: others are other toys",
    "seed": "fixes the folders, the learning and the noise",
    "train_steps": "steps of stage 1, the first third of them with the reward",
    "finetune_steps": "steps of stage 2",
    "learning_rate": "of stage 1",
    "finetune_learning_rate": "of stage 2",
    "initializer_scale": "deviation of random first tokens, over the vocabulary's",
    "num_class_images": "class images, which all variants share",
    "weight": "factor on the weight of every attention loss",
    "pictures": "pictures of all assets with boxes, and as many without",
    "alone": "pictures of each asset alone, without boxes",
    "num_inference_steps": "DDIM steps",
    "guidance_scale": "weight of classifier-free guidance",
    "guidance_steps": "of these, with box guidance",
    "device": "auto (cuda > mps > cpu), cuda, mps or cpu",
    "mixed_precision": "precision of the UNet: auto, no, fp16 or bf16",
}
#: Settings on which no learned folder depends: they may change between runs in one --work.
FREE_SETTINGS = {
    "folders", "first", "pictures", "alone", "num_inference_steps", "guidance_scale",
    "guidance_steps", "device",
}  # fmt: skip


def add_options(parser: ArgumentParser, names: Iterable[str]) -> None:
    """Add an option for each of these settings."""
    default = Settings()
    for name in names:
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=HELP[name])


@dataclass(frozen=True)
class Variant:
    """One row of the table: a base model, how the tokens begin, an attention loss."""

    base: str
    tokens: str
    loss: str

    @property
    def base_name(self) -> str:
        """What tables call the base model."""
        return Path(self.base).name

    @property
    def name(self) -> str:
        """Also of the folders below learned/ and pictures/."""
        return f"{self.base_name}-{self.tokens}-{self.loss}"


def variants(bases: list[str], tokens: list[str], losses: list[str]) -> list[Variant]:
    """All of them, the losses innermost."""
    return [Variant(*each) for each in product(bases, tokens, losses)]


def folder_seed(seed: int, name: str) -> int:
    """A folder's own seed, so that folders are independent draws."""
    return seed + 1000 * int(name.rpartition("_")[2])
