"""Every setting of semantic synthesis and its default, where no model brings it (mifo.defaults)."""

from dataclasses import dataclass

from imagelab.settings import Config
from mifo.method.guidance import GuidanceConfig

DEFAULT_PROMPT = "a photo of <asset0>"


@dataclass(frozen=True)
class Runtime:
    """How pictures are computed; it changes nothing of them but rounding."""

    batch_size: int = 1
    device: str = "auto"  # auto, cuda, mps, cpu
    mixed_precision: str = "auto"
    offline: bool = False


@dataclass(frozen=True)
class SynthesisConfig(Config):
    """What is painted, from what was learned, how, and where it goes."""

    model_id: str = "toy_car"
    models_dir: str = "Model_ours"
    lora: str | None = None  # a LoRA file, in place of the learned folder
    lora_scale: float = 1.0  # what its strength is multiplied by
    tokens: tuple[str, ...] = ()  # token files, likewise
    model_path: str | None = None  # None: the base model that the manifest names
    output_path: str = "output"
    prompt: str = DEFAULT_PROMPT
    negative_prompt: str = ""
    num_images: int | None = None  # None: one batch
    seed: int | None = None  # None: drawn by the command, which prints it
    num_inference_steps: int = 50
    guidance_scale: float | None = None  # None: the model's own, or the paper's
    width: int | None = None  # pixels; None: the model's own
    height: int | None = None
    box_control: bool = True
    guidance: GuidanceConfig = GuidanceConfig()
    runtime: Runtime = Runtime()

    @property
    def picture_count(self) -> int:
        """How many pictures are painted."""
        return self.num_images or self.runtime.batch_size
