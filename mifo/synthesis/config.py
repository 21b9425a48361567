"""Every setting of semantic synthesis and its default: the only home of both."""

from dataclasses import asdict, dataclass, fields

from imagelab.settings import fit_settings
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
class SynthesisConfig:
    """What is painted, from what was learned, how, and where it goes."""

    model_id: str = "toy_car"
    models_dir: str = "Model_ours"
    lora: str | None = None  # a LoRA file, in place of the learned folder
    tokens: tuple[str, ...] = ()  # token files, likewise
    model_path: str | None = None  # None: the base model that the manifest names
    output_path: str = "output"
    prompt: str = DEFAULT_PROMPT
    negative_prompt: str = ""
    num_images: int | None = None  # None: one batch
    seed: int | None = None  # None: drawn by the command, which prints it
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    width: int | None = None  # pixels; None: the model's own
    height: int | None = None
    box_control: bool = True
    guidance: GuidanceConfig = GuidanceConfig()
    runtime: Runtime = Runtime()

    @classmethod
    def from_settings(cls, **settings) -> "SynthesisConfig":
        """A config from settings by name, whichever part they belong to.

        Raises UserError for a name that is no setting, and for a value of another type.
        """
        settings = fit_settings(settings, cls().settings())
        for name, part in {"guidance": GuidanceConfig, "runtime": Runtime}.items():
            mine = {f.name: settings.pop(f.name) for f in fields(part) if f.name in settings}
            settings[name] = part(**mine)
        return cls(**settings)

    def settings(self) -> dict:
        """All settings by name, of every part."""
        settings = asdict(self)
        guidance, runtime = settings.pop("guidance"), settings.pop("runtime")
        return settings | guidance | runtime
