"""Every setting of training and its default."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi

from imagelab.errors import UserError
from imagelab.settings import Config, check_within

#: What may be trained. The release trains all of it; vision encoder and autoencoder stay frozen.
PARTS = ("transformer", "fusion", "qformer", "text_encoder", "vision_norm")
#: Of these a LoRA may be trained in place of all weights.
LORA_PARTS = ("transformer", "text_encoder")
#: Rates where none is given: the release's 1e-5 · √(32 / 256), and a usual one for a LoRA.
RATE, LORA_RATE = 3.54e-6, 1e-4
OPTIMIZERS = ("adamw", "muon")
RULE_RATE, RULE_BATCH = 1e-5, 256  # the release's rule gives this rate to this batch
BOUNDS = {
    "batch_size": (1, 1_000_000),
    "micro_batch_size": (1, 100_000),
    "epochs": (1, 1_000_000),
    "steps": (1, 100_000_000),
    "learning_rate": (0.0, 1.0),
    "conditioning_rate": (0.0, 1.0),
    "cooldown": (0.0, 1.0),
    "timestep_shift": (0.01, 100.0),
    "weight_decay": (0.0, 1.0),
    "warmup_steps": (0, 100_000_000),
    "max_grad_norm": (1e-12, 1e12),
    "lora_rank": (0, 4096),
    "ema": (0.0, 0.999999),
    "dropout": (0.0, 0.9),
    "checkpoint_steps": (1, 100_000_000),
    "sample_steps": (0, 100_000_000),
    "sample_items": (1, 64),
    "probe_steps": (0, 100_000_000),
    "workers": (0, 256),
}


@dataclass(frozen=True)
class Recipe:
    """The numbers of the method (MIGE, section 4.1, and the release's configs)."""

    batch_size: int = 32  # samples of an update, over all processes
    epochs: int = 20
    steps: int | None = None  # updates, in place of epochs
    optimizer: str = "adamw"  # muon: for the matrices of the transformer's blocks
    learning_rate: float | None = None  # None: RATE, or LORA_RATE; RULE_RATE with scale_rate
    scale_rate: bool = False  # multiply it by √(batch_size / 256), the release's rule
    conditioning_rate: float | None = None  # of all but the transformer; None: the same
    cooldown: float = 0.0  # last share of the steps, in which the rates fall to 0 as a cosine
    timestep_shift: float = 1.0  # above 1 noisier steps are drawn more often
    weight_decay: float = 0.03  # of every weight
    warmup_steps: int = 1000  # updates
    max_grad_norm: float = 0.01
    parts: tuple[str, ...] = PARTS
    lora_rank: int = 0  # of transformer and text encoder; 0: they train whole
    ema: float = 0.0  # decay of an average of the weights, which is then the result; 0: none
    dropout: float | None = None  # within Q-Former and text encoder; None: as their configs say

    @property
    def rate(self) -> float:
        """The learning rate after the warm-up."""
        rate = self.learning_rate
        if rate is None:
            rate = LORA_RATE if self.lora_rank else RULE_RATE if self.scale_rate else RATE
        return rate * self._scale

    @property
    def rate_of_conditioning(self) -> float:
        """That of what reads the instruction: all that learns but the transformer."""
        rate = self.conditioning_rate
        return self.rate if rate is None else rate * self._scale

    @property
    def _scale(self) -> float:
        return (self.batch_size / RULE_BATCH) ** 0.5 if self.scale_rate else 1.0

    def updates(self, records: int) -> int:
        """Updates in all, for a list of so many records."""
        return self.steps or max(1, self.epochs * records // self.batch_size)

    def factor(self, step: int, steps: int) -> float:
        """What the rates of update ``step``, from 0, of ``steps`` are multiplied by."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        left, falling = max(steps - step, 0), self.cooldown * steps
        return 0.5 - 0.5 * cos(pi * left / falling) if left < falling else 1.0

    def has_cooled(self, done: int, steps: int) -> bool:
        """Whether one of the first ``done`` updates, of ``steps``, had a falling rate."""
        return self.cooldown > 0 and steps - (done - 1) < self.cooldown * steps


@dataclass(frozen=True)
class Running:
    """How training is carried out.

    Only rounding depends on it, and which numbers the dropout within Q-Former and text encoder
    leaves out, which follows from how a batch is divided.
    """

    micro_batch_size: int = 8  # samples that a process computes at a time
    gradient_checkpointing: bool = False
    shard: bool = False  # split weights, gradients and moments over the processes
    device: str = "auto"  # auto, cuda, mps, cpu
    mixed_precision: str = "auto"
    checkpoint_steps: int = 1000
    sample_steps: int = 1000  # 0: none are painted
    sample_items: int = 2  # of each task
    probe_steps: int = 0  # between two looks at what pictures and words do; 0: none
    workers: int = 2  # processes that read ahead


@dataclass(frozen=True)
class TrainingConfig(Config):
    """What a run is told: files, the method's numbers, and how it is carried out."""

    data: str = ""
    root: str = ""
    features: str = ""
    model: str = ""
    output: str = ""
    seed: int = 43
    recipe: Recipe = Recipe()
    running: Running = Running()


ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-10
#: Settings that may differ between a run and its resumption.
FREE_SETTINGS = {
    "data", "root", "features", "model", "output", *Running.__dataclass_fields__,
}  # fmt: skip
#: Settings that may, as long as no rate has begun to fall.
LENGTH_SETTINGS = ("steps", "epochs", "cooldown")


def check_settings(config: TrainingConfig) -> None:
    """Raises UserError for settings that make no sense."""
    settings: Mapping[str, object] = config.settings()
    check_within(settings, BOUNDS)
    recipe = config.recipe
    if not recipe.parts or (unknown := set(recipe.parts) - set(PARTS)):
        what = f"names {min(unknown)!r}" if recipe.parts else "names nothing"
        raise UserError(f"--parts {what}; give some of {', '.join(PARTS)}")
    if twice := [name for name in PARTS if recipe.parts.count(name) > 1]:
        raise UserError(f"--parts names {twice[0]} more than once; give each part once")
    if recipe.lora_rank and not set(recipe.parts) & set(LORA_PARTS):
        raise UserError(
            f"--lora_rank is for {' and '.join(LORA_PARTS)}, and --parts names neither; leave it "
            "out"
        )
    if recipe.optimizer == "muon" and (conflict := _no_muon(config)):
        raise UserError(
            f"--optimizer muon is for whole matrices of the transformer: {conflict}, or give "
            "--optimizer adamw"
        )
    for name, rate in (
        ("learning_rate", recipe.rate), ("conditioning_rate", recipe.rate_of_conditioning)
    ):  # fmt: skip
        if rate <= 0:
            raise UserError(f"--{name} is 0, with which nothing is learned; give a positive one")


def _no_muon(config: TrainingConfig) -> str | None:
    """What to change, so that there are matrices which Muon can update; None: there are."""
    if "transformer" not in config.recipe.parts:
        return "add it to --parts"
    if config.recipe.lora_rank:
        return "leave --lora_rank out"
    return "leave out --shard, and FSDP's config" if config.running.shard else None
