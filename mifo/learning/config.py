"""Every setting of semantic learning and its default: the only home of both."""

from dataclasses import dataclass

from imagelab.errors import UserError
from imagelab.models.device import PRECISIONS
from imagelab.models.sources import DEFAULT_MODEL

#: What settings that are words may be.
CHOICES = {
    "attention_loss": ("mifo", "break_a_scene", "reward", "penalty", "none"),
    "finetune": ("lora", "full", "none"),
    "mixed_precision": PRECISIONS,
    "optimizer": ("adamw", "adamw8bit"),
    "resize": ("aspect", "squash"),
}


def check_choice(name: str, value: str) -> None:
    """Raises UserError unless a setting is one of its :data:`CHOICES`."""
    if value not in CHOICES[name]:
        raise UserError(f"--{name} is {value!r}; give {', '.join(CHOICES[name])}")


@dataclass(frozen=True)
class LearningConfig:
    """Settings of semantic learning (method: arXiv 2511.00542, section 3)."""

    instance: str = "toy_car"
    folder_path: str = "example"
    model_path: str = DEFAULT_MODEL
    output_dir: str = "Model_ours"
    seed: int | None = None  # None: drawn, and told

    # stage 1: the asset rows alone
    train_steps: int = 600
    reward_steps: int = 200  # of the train_steps, the first ones
    learning_rate: float = 5e-3
    warmup_steps: int = 10

    # stage 2: LoRA or the full model as well
    finetune: str = "lora"
    finetune_steps: int = 400
    finetune_learning_rate: float | None = None  # None: 1e-4 for lora, 2e-6 for full
    lora_rank: int = 16
    prior_weight: float = 1.0
    class_prompt: str = "a photo of a chair"
    num_class_images: int = 100
    class_images: str | None = None  # a folder of the user's own, in place of generated ones

    attention_loss: str = "mifo"
    attention_weight: float = 1.0  # times the method's own
    initializer_tokens: tuple[str, ...] = ()
    resize: str = "aspect"
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0

    device: str = "auto"  # auto, cuda, mps, cpu
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    offline: bool = False
    checkpoint_steps: int = 100
    save_pipeline: bool = False

    @property
    def stage_two_learning_rate(self) -> float:
        """The given one, or what suits the kind of fine-tuning."""
        default = {"lora": 1e-4, "full": 2e-6, "none": 0.0}[self.finetune]
        return default if self.finetune_learning_rate is None else self.finetune_learning_rate
