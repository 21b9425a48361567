"""Every number of what toybox's MIGE learns before its training, and what it means."""

from dataclasses import dataclass

from imagelab.settings import Config

BOUNDS = {
    "views": (2, 10_000_000),
    "vision_steps": (1, 10_000_000),
    "triplets": (1, 10_000_000),
    "stack_steps": (1, 10_000_000),
    "batch": (1, 100_000),
    "vision_rate": (0.0, 1.0),
    "stack_rate": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "warmup": (0, 10_000_000),
    "cooldown": (0.0, 1.0),
    "held_out": (2, 1_000_000),
    "workers": (0, 256),
}


@dataclass(frozen=True)
class BeginConfig(Config):
    """Every number; the last ones change nothing of what is learned but rounding."""

    seed: int = 0
    views: int = 16_000
    vision_steps: int = 2000
    vision_rate: float = 1e-3
    triplets: int = 4000
    stack_steps: int = 700
    stack_rate: float = 1e-3
    batch: int = 32
    weight_decay: float = 0.01
    warmup: int = 100
    cooldown: float = 0.3
    held_out: int = 512
    device: str = "auto"
    workers: int = 0


HELP = {
    "seed": "fixes the pictures and every draw",
    "views": "pictures that the vision encoder learns from",
    "vision_steps": "steps of the vision encoder",
    "vision_rate": "its learning rate",
    "triplets": "triplets that the other parts learn from",
    "stack_steps": "steps of Q-Former, fusion, T5 and patch embedding",
    "stack_rate": "their learning rate",
    "batch": "pictures or triplets a step",
    "weight_decay": "AdamW's, of all parts",
    "warmup": "steps over which a rate rises",
    "cooldown": "share of the steps over which it falls at the end, as a cosine, to a hundredth",
    "held_out": "triplets of the split test that measure what was learned",
    "device": "auto (cuda > mps > cpu), cuda, mps or cpu",
    "workers": "processes that render; 0: this one alone",
}
#: Settings that may differ between a run and its resumption.
FREE = ("device", "workers", "held_out")
