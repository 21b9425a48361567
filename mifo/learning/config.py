"""Every setting of semantic learning and its default, where no model brings it (mifo.defaults)."""

from dataclasses import dataclass

from imagelab.errors import UserError
from imagelab.models.device import PRECISIONS
from imagelab.models.sources import DEFAULT_MODEL
from imagelab.settings import Config

#: What settings that are words may be.
CHOICES = {
    "attention_loss": ("mifo", "break_a_scene", "reward", "penalty", "none"),
    "finetune": ("lora", "full", "none"),
    "mixed_precision": PRECISIONS,
    "optimizer": ("adamw", "adamw8bit"),
    "resize": ("aspect", "squash"),
}
#: The authors' prompt of the class images, for whatever is learned.
CLASS_PROMPT = "a photo of a chair"


@dataclass(frozen=True)
class Recipe:
    """The method's own numbers (arXiv 2511.00542, section 3)."""

    # stage 1: the asset rows alone
    train_steps: int = 600
    reward_steps: int = 200  # of the train_steps, the first ones
    learning_rate: float | None = None  # None: the model's own, or the paper's
    warmup_steps: int = 10

    # stage 2: LoRA or the full model as well
    finetune: str = "lora"
    finetune_steps: int = 400
    finetune_learning_rate: float | None = None  # None: likewise, by the kind of fine-tuning
    lora_rank: int = 16
    prior_weight: float = 1.0
    class_prompt: str | None = None  # None: of the class that the instance folder names
    num_class_images: int | None = None  # None: the model's own, or the paper's

    # both
    attention_loss: str = "mifo"
    attention_weight: float = 1.0  # times the method's own
    initializer_tokens: tuple[str, ...] = ()  # empty: the rows start at random
    initializer_scale: float | None = None  # None: the model's own, or 1
    initialize_from_class: bool = False  # from the class that the instance folder names
    resize: str = "aspect"
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0

    @property
    def steps(self) -> dict[int, int]:
        """Steps of the stages that have any, by the stage's number."""
        steps = {1: self.train_steps, 2: 0 if self.finetune == "none" else self.finetune_steps}
        return {stage: count for stage, count in steps.items() if count}

    @property
    def turns(self) -> dict[str, int]:
        """The steps, counted from the first, at which the loss changes by design."""
        turns = {"stage 1 → 2": self.train_steps} if set(self.steps) == {1, 2} else {}
        if self.attention_loss == "mifo" and 0 < self.reward_steps < self.train_steps:
            turns["reward → penalty"] = self.reward_steps
        return turns

    @property
    def needs_class_images(self) -> bool:
        """Whether stage 2 preserves what the class looks like."""
        return bool(self.prior_weight) and 2 in self.steps

    def attention_term(self, stage: int, step: int) -> str | None:
        """The key of ``ATTENTION_LOSSES`` that regularises a step; None for none.

        MIFO's own: the reward in the first ``reward_steps`` of stage 1, then the penalty.
        """
        if self.attention_loss == "none" or (self.attention_loss == "reward" and stage == 2):
            return None
        if self.attention_loss != "mifo":
            return self.attention_loss
        return "reward" if stage == 1 and step < self.reward_steps else "penalty"

    def attention_steps(self, stage: int) -> dict[str | None, int]:
        """How many steps of a stage each :meth:`attention_term` has, in the terms' order."""
        steps = self.steps.get(stage, 0)
        first, counts = min(self.reward_steps, steps), {}
        for step, count in ((0, first), (first, steps - first)):
            term = self.attention_term(stage, step)
            if count:
                counts[term] = counts.get(term, 0) + count
        return counts


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out; it changes nothing of what is learned but rounding."""

    device: str = "auto"  # auto, cuda, mps, cpu
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    offline: bool = False
    checkpoint_steps: int = 100


@dataclass(frozen=True)
class LearningConfig(Config):
    """What is learned, from where to where, by which recipe, on what."""

    instance: str = "toy_car"
    folder_path: str = "example"
    mask_label: tuple[str, ...] = ()  # what is inside of masks with several labels: for all, each
    model_path: str = DEFAULT_MODEL
    output_dir: str = "Model_ours"
    seed: int | None = None  # None: drawn by the command, which prints it
    class_images: str | None = None  # a folder of the user's own, in place of generated ones
    save_pipeline: bool = False
    recipe: Recipe = Recipe()
    runtime: Runtime = Runtime()


def check_choice(name: str, value: str) -> None:
    """Raises UserError unless a setting is one of its :data:`CHOICES`."""
    if value not in CHOICES[name]:
        raise UserError(f"--{name} is {value!r}; give {', '.join(CHOICES[name])}")
