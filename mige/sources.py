"""The files of a release: where they are, and how they are read.

Nothing of them runs: a torch file is opened as tensors alone, a vocabulary is written anew.
"""

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError, memory_errors, shorten, shown
from imagelab.io.tensors import DTYPES, read_json, read_tensors
from imagelab.models.loading import read_part
from imagelab.models.parts import read_config
from mige.folder import PARTS, read_tokenizer
from mige.release import State
from mige.vocabulary import read_spiece

PRETRAINED = "pretrained_models"
WEIGHTS = ("model.pth", "model.safetensors")
DEEPEST = 4  # folders below `pretrained_models` in which parts are looked for
SPIECE, TOKENIZER = "spiece.model", "tokenizer.json"
VAE_CLASS = "AutoencoderKL"
#: What the release scales latents by, whatever its autoencoder says.
SCALING = 0.18215
EXTRA_IDS = 100  # pieces that T5 has beyond those in its file
#: Names of an autoencoder's attention in older files of diffusers.
OLDER = {
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.",
}  # fmt: skip
ADVICE = "fetch the release again, or name another file or folder"


@dataclass(frozen=True)
class Sources:
    """The trained weights, the folder of the autoencoder, and that of T5's tokenizer."""

    weights: Path
    vae: Path
    text: Path


# ----------------------------------------------------------------------------------------------
# finding


def find_sources(
    release: Path, weights: Path | None = None, vae: Path | None = None, text: Path | None = None
) -> Sources:
    """The files of a release; those that are given in place of what is looked for.

    Raises:
        UserError: one is missing, or several may be meant.
    """
    if not release.is_dir():
        raise UserError(f"there is no folder {release}; give the release's own by --release")
    if weights is None:
        there = [release / name for name in WEIGHTS if (release / name).is_file()]
        if not there:
            raise UserError(
                f"there is neither {' nor '.join(WEIGHTS)} in {release}; give the file of the "
                "trained weights by --weights"
            )
        weights = there[0]
    elif not weights.is_file():
        raise UserError(f"there is no file {weights}; give another --weights")
    found = _folders(release / PRETRAINED)
    vae = vae or _only(
        [folder for folder in found if _says(folder, "_class_name", VAE_CLASS)],
        f"a folder whose config.json says {VAE_CLASS}", release, "--vae",
    )  # fmt: skip
    text = text or _only(
        _text_folders(found), f"a folder of T5 with {SPIECE} or {TOKENIZER}", release, "--t5"
    )
    for folder, option in ((vae, "--vae"), (text, "--t5")):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give another {option}")
    return Sources(weights, vae, text)


def _folders(top: Path) -> list[Path]:
    """A folder and those below it, sorted; hidden ones are left out."""
    found = []
    for path, below, _ in os.walk(top, followlinks=True):
        here = Path(path)
        found.append(here)
        deep = len(here.relative_to(top).parts) >= DEEPEST
        below[:] = [] if deep else [name for name in below if not name.startswith(".")]
    return sorted(found)


def _text_folders(folders: list[Path]) -> list[Path]:
    """Those with SentencePiece's file; if there is none, those of a T5 with a tokenizer."""
    pieces = [folder for folder in folders if (folder / SPIECE).is_file()]
    return pieces or [
        folder
        for folder in folders
        if (folder / TOKENIZER).is_file() and _says(folder, "model_type", "t5")
    ]


def _says(folder: Path, key: str, value: str) -> bool:
    """Whether a folder's config has this value."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return read_json(folder / "config.json", {}, ADVICE).get(key) == value
    except UserError:  # whatever it is, it is not what is looked for
        return False


def _only(found: list[Path], what: str, release: Path, option: str) -> Path:
    if not found:
        raise UserError(
            f"there is no such thing as {what} in {release / PRETRAINED}; give it by {option}"
        )
    if len(found) > 1:
        names = ", ".join(str(each) for each in found[:3])
        raise UserError(f"{len(found)} folders may be {what}: {names}; give one by {option}")
    return found[0]


# ----------------------------------------------------------------------------------------------
# tensors


def read_state(path: Path) -> State:
    """The tensors in a safetensors or torch file, which stay on the disk until they are used.

    Of a torch file with a ``state_dict`` this alone is taken.

    Raises:
        UserError: the file is damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path, ADVICE, finite=False)[0]
    found = _load_tensors(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no tensors by name; {ADVICE}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds {shown(name)}, which is no tensor; {ADVICE}")
        kept = tensor.layout == torch.strided and tensor.dtype in DTYPES
        if not kept or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
            raise UserError(
                f"{path} holds {shorten(name)} in a form that is not supported; {ADVICE}"
            )
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def _load_tensors(path: Path) -> object:
    """What a torch file holds, which runs no code."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; {ADVICE}")
    try:
        with memory_errors():
            # older files have to be read as a whole
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could run code: it is not "
            f"opened; {ADVICE}"
        ) from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise UserError(f"{path} cannot be read as a torch file ({reason}); {ADVICE}") from error


def read_vae(folder: Path) -> tuple[object, State]:
    """The autoencoder, on the meta device, and its tensors."""
    from diffusers import AutoencoderKL

    part = PARTS["vae"]
    files = [folder / f"{part.weights}{end}" for end in (".safetensors", ".bin")]
    there = [file for file in files if file.is_file()]
    if not there:
        raise UserError(f"there is neither {files[0]} nor {files[1].name}; give another --vae")
    state = {}
    for name, tensor in read_state(there[0]).items():
        for old, new in OLDER.items():
            name = name.replace(old, new) if ".attentions." in name else name
        state[name] = tensor
    config = read_config(
        folder / part.config, part, *(file for file in there[:1] if file.suffix != ".bin")
    )
    scaling = config.setdefault("scaling_factor", SCALING)
    if scaling != SCALING:
        raise UserError(
            f"the autoencoder {folder} scales latents by {shown(scaling)}, and MIGE's by "
            f"{SCALING}; give another --vae"
        )

    def make(_: Path):
        with torch.device("meta"):
            return AutoencoderKL.from_config(config)

    return read_part(make, folder, "--vae"), state


# ----------------------------------------------------------------------------------------------
# T5's tokenizer and config


def read_text_tokenizer(folder: Path):
    """T5's tokenizer, made anew out of a folder's vocabulary."""
    from transformers import T5Tokenizer

    path = folder / SPIECE
    if not path.is_file():
        if not (folder / TOKENIZER).is_file():
            raise UserError(f"there is neither {SPIECE} nor {TOKENIZER} in {folder}; {ADVICE}")
        return read_tokenizer(folder)
    vocabulary, charsmap = read_spiece(path)
    extra = _extra_ids(folder / "tokenizer_config.json")
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(extra))]
    return T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=charsmap, extra_ids=extra)


def _extra_ids(path: Path) -> int:
    """How many pieces a tokenizer has beyond its file."""
    found = read_json(path, {}, ADVICE, clip=True) if path.is_file() else {}
    extra = found.get("extra_ids", EXTRA_IDS)
    if type(extra) is not int or not 0 <= extra <= 1000:
        raise UserError(f"{path}: extra_ids is {shown(extra)}, and may be 0 to 1000; {ADVICE}")
    return extra


def check_text_config(folder: Path, config: dict) -> None:
    """Raises UserError where T5's own config says other than the trained weights."""
    path = folder / "config.json"
    found = read_json(path, {}, ADVICE) if path.is_file() else {}
    for key, value in config.items():
        if key != "is_encoder_decoder" and found.get(key, value) != value:
            raise UserError(
                f"{path} says that {key} is {shown(found[key])}, and the trained weights are of a "
                f"T5 with {value}; give another --t5"
            )
