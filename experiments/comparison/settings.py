"""The settings of a comparison, and its variants: the only home of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mifo.learning.config import Recipe


@dataclass(frozen=True)
class Settings:
    """What all variants share.

    Steps are fewer than the method's, to fit into the time. The rates and the guidance are
    toybox's own, see its README.
    """

    folders: int = 12
    seeds: int = 4
    seed: int = 0
    model_path: str = "toybox"

    words: str = "phrase"
    train_steps: int = 240
    finetune_steps: int = 150
    learning_rate: float = 1e-3
    lora_learning_rate: float = 1e-3
    full_learning_rate: float = 1e-4
    num_class_images: int = 8

    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    guidance_steps: int = 8
    guidance_iterations: int = 5
    step_size: float = 2.0
    final_step_size: float = 0.5
    batch_size: int = 4

    device: str = "auto"
    mixed_precision: str = "auto"


LONG = Settings()
SHORT = replace(LONG, folders=4, seeds=2)
WORDS = ("phrase", "kind")
HELP = {
    "folders": "instance folders",
    "seeds": "pictures of each folder and variant, from seeds of the folder's own",
    "seed": "fixes the folders, the learning and the noise",
    "words": "tokens start from a phrase (purple fox), or from the kind alone (fox)",
    "model_path": "base model: toybox, or a folder that toybox.stable_diffusion.train wrote",
    "train_steps": "steps of stage 1, the first third of them with the reward",
    "finetune_steps": "steps of stage 2",
    "learning_rate": "of stage 1",
    "lora_learning_rate": "of stage 2 with a LoRA",
    "full_learning_rate": "of stage 2 with the whole model",
    "num_class_images": "class images, which all variants share",
    "num_inference_steps": "DDIM steps",
    "guidance_scale": "weight of classifier-free guidance",
    "guidance_steps": "denoising steps with box guidance",
    "guidance_iterations": "at most, in each of them",
    "step_size": "size of the guidance's updates at the first step",
    "final_step_size": "size toward which they fall",
    "batch_size": "pictures painted at a time",
    "device": "auto (cuda > mps > cpu), cuda, mps or cpu",
    "mixed_precision": "precision of the UNet: auto, no, fp16 or bf16",
}
#: Settings that a learned folder does not depend on: they may change between runs in one --work.
FREE_SETTINGS = {
    "folders", "seeds", "num_inference_steps", "guidance_scale", "guidance_steps",
    "guidance_iterations", "step_size", "final_step_size", "batch_size", "device",
}  # fmt: skip
#: Settings of learning that stage 1 does not depend on.
STAGE_2_SETTINGS = {
    "finetune", "finetune_steps", "finetune_learning_rate", "lora_rank", "prior_weight",
    "class_prompt", "num_class_images",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One row of the table: how it differs from MIFO, and which folder below learned/ it uses."""

    name: str
    text: str
    learned: str
    learning: Mapping = field(default_factory=dict)
    painting: Mapping = field(default_factory=dict)


def _variants() -> dict[str, Variant]:
    rank = Recipe().lora_rank
    rows = [Variant("mifo", f"MIFO (LoRA of rank {rank}, boxes, refined regions)", "mifo")]
    for name, text, learning in (
        ("break_a_scene", "attention loss of Break-a-Scene", {"attention_loss": "break_a_scene"}),
        ("none", "no attention loss", {"attention_loss": "none"}),
        ("reward", "reward only", {"attention_loss": "reward"}),
        ("penalty", "penalty only", {"attention_loss": "penalty"}),
        ("rank4", "LoRA of rank 4", {"lora_rank": 4}),
        ("rank64", "LoRA of rank 64", {"lora_rank": 64}),
        ("full", "whole model fine-tuned", {"finetune": "full"}),
        ("tokens", "tokens alone, no fine-tuning", {"finetune": "none"}),
        ("random", "tokens drawn at random", {"initializer_tokens": ()}),
        ("no_prior", "no class images", {"prior_weight": 0.0}),
    ):
        rows.append(Variant(name, text, name, learning))
    rows += [
        Variant("no_boxes", "MIFO, no box control", "mifo", {}, {"box_control": False}),
        Variant("unrefined", "MIFO, boxes as regions throughout", "mifo", {}, {"refine_every": 0}),
    ]
    return {row.name: row for row in rows}


VARIANTS = _variants()
SHORT_VARIANTS = ("mifo", "break_a_scene", "none", "no_boxes")


def folder_seed(seed: int, name: str) -> int:
    """A folder's own seed, so that folders are independent draws."""
    return seed + 1000 * int(name.rpartition("_")[2])
