"""Every setting of painting with MIGE and its default."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_type_hints

from imagelab.settings import Config, check_within

BOUNDS = {
    "num_images": (1, 1_000_000),
    "steps": (1, 1000),
    "text_scale": (0.0, 1e6),
    "image_scale": (0.0, 1e6),
    "width": (1, 16_384),
    "height": (1, 16_384),
    "batch_size": (1, 10_000),
}


@dataclass(frozen=True)
class Guidance:
    """How a task is sampled: steps, and the weights of text and source (the paper's)."""

    steps: int
    text_scale: float
    image_scale: float = 1.0


GUIDANCE_KINDS = get_type_hints(Guidance)
DEFAULTS = {
    "subject": Guidance(50, 7.0),
    "edit": Guidance(60, 5.0),
    "subject_edit": Guidance(60, 5.0),
}


@dataclass(frozen=True)
class Runtime:
    """How pictures are computed; it changes nothing of them but rounding."""

    batch_size: int = 1
    device: str = "auto"  # auto, cuda, mps, cpu
    mixed_precision: str = "auto"
    offload: bool = False


@dataclass(frozen=True)
class PaintingConfig(Config):
    """What fixes the pictures of a request; None: what the task or the model takes."""

    seed: int | None = None  # None: drawn by the command, which prints it
    num_images: int = 1
    steps: int | None = None
    text_scale: float | None = None
    image_scale: float | None = None
    width: int | None = None  # pixels
    height: int | None = None
    runtime: Runtime = Runtime()

    def guidance(self, usual: Guidance) -> Guidance:
        """The numbers that a task is sampled with, whose usual ones are given."""
        given = {name: getattr(self, name) for name in GUIDANCE_KINDS}
        return replace(usual, **{k: value for k, value in given.items() if value is not None})


def check_numbers(settings: Mapping[str, object]) -> None:
    """Raises UserError for a number out of its bounds."""
    check_within(settings, BOUNDS)
