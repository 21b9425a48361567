"""What was learned from single files in place of a learned folder: one LoRA, and tokens.

A LoRA file has the keys of kohya (A1111, ComfyUI) or of diffusers. A token file is a textual
inversion with one vector, for ``<assetN>`` if the file is called assetN.safetensors, or else by its
key. Files of semantic_export.py carry the manifest, and so name their base model.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from mifo.tokens import add_tokens, asset_token, write_rows
from mifo_lora import LoraError, from_file, inject_from, read_lora

log = logging.getLogger(__name__)

ASSET_STEM = re.compile(r"asset(\d+)")


@dataclass(frozen=True)
class LearnedFiles:
    """What the files hold, checked as far as it can be without the base model.

    lora: tensors and metadata of the LoRA file, or None.
    rows: the embedding [width] of each asset number, and paths: its file.
    bases: source and sha256 of the base model, for each file that says with which it was learned.
    """

    lora_path: Path | None
    lora: tuple[dict[str, Tensor], dict[str, str]] | None
    rows: dict[int, Tensor]
    paths: dict[int, Path]
    bases: dict[Path, dict[str, str]]

    where = "--tokens"  # what a sentence calls the place of the assets

    @property
    def assets(self) -> list[int]:
        return sorted(self.rows)

    @property
    def tokens(self) -> list[str]:
        return [asset_token(asset) for asset in self.assets]


def open_files(
    lora: str | None, tokens: Sequence[str], model_path: str | None = None
) -> LearnedFiles:
    """Read the files of --lora and --tokens; a UserError says what is wrong with them."""
    state, rows, paths, bases = None, {}, {}, {}
    if lora is not None:
        state = _read(Path(lora), "lora")
        bases |= _base_of(Path(lora), state[1])
    for path in map(Path, tokens):
        tensors, metadata = _read(path, "tokens")
        asset, row = _token(path, tensors)
        if asset in rows:
            raise UserError(
                f"{paths[asset]} and {path} both hold {asset_token(asset)}; leave one out, or "
                "rename it, such as asset7.safetensors for <asset7>"
            )
        rows[asset], paths[asset] = row, path
        bases |= _base_of(path, metadata)
    if not (model_path or bases):
        raise UserError(
            f"{lora or tokens[0]} does not say which base model it was made for; give it with "
            "--model_path"
        )
    return LearnedFiles(Path(lora) if state else None, state, rows, paths, bases)


def load_files(
    files: LearnedFiles, model_path: str | None = None, offline: bool = False
) -> tuple[StableDiffusion, list[int]]:
    """The base model with the LoRA and the tokens in it, and the ids of the tokens.

    Raises UserError when a file does not fit the base model; nothing of a file is left out. A base
    model that is of the same shape but not the one that a file was learned with is a warning if
    ``model_path`` names it, else an error.
    """
    source = model_path or next(iter(files.bases.values()))["source"]
    base = load_base(source, offline)
    _compare_bases(files, base, is_chosen=bool(model_path))
    width = base.text_encoder.config.hidden_size
    for asset, row in files.rows.items():
        if len(row) != width:
            raise UserError(
                f"{files.paths[asset]} holds {len(row)} numbers, and a token of {base.source} has "
                f"{width}; give --model_path the base model that it was made for"
            )
    ids = []
    if files.rows:
        ids = add_tokens(base.tokenizer, base.text_encoder, files.tokens)
        write_rows(base.text_encoder, ids, torch.stack([files.rows[i] for i in files.assets]))
    if files.lora:
        tensors, metadata = files.lora
        models = {"unet": base.unet, "text_encoder": base.text_encoder}
        try:
            for part, state in from_file(tensors, models, metadata).items():
                if state:
                    inject_from(models[part], state)
        except LoraError as error:
            raise UserError(f"{files.lora_path} on {base.source}: {error}") from error
    return base, ids


def _read(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and metadata of a safetensors file."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give --{option} a .safetensors file")
    try:
        tensors, metadata = read_lora(path)
    except LoraError as error:
        raise UserError(
            f"{path} cannot be read as safetensors, and pickles (.pt, .bin, .ckpt) are never "
            f"opened; give --{option} a .safetensors file"
        ) from error
    if not tensors:
        raise UserError(f"{path} is empty; give --{option} another file")
    return {key: tensor.float() for key, tensor in tensors.items()}, metadata


def _token(path: Path, tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
    """The asset number and the embedding [width] of a token file."""
    if len(tensors) != 1:
        raise UserError(
            f"{path} holds {len(tensors)} tensors, the first is {min(tensors)!r}, and a token of "
            "Stable Diffusion 1 or 2 is a single one; give --tokens textual-inversion files"
        )
    ((key, rows),) = tensors.items()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != 1:
        raise UserError(
            f"{path} holds a tensor of shape {list(rows.shape)}, and an asset is one vector; give "
            "--tokens textual inversions of one vector"
        )
    if not rows.isfinite().all():
        raise UserError(f"{path} holds NaN or infinity; give --tokens a sound file")
    number = ASSET_STEM.fullmatch(path.stem) or ASSET_STEM.fullmatch(key.strip("<>"))
    if number is None:
        raise UserError(
            f"{path} holds {key!r}, and neither that nor the file's name is an asset's; rename the "
            "file, such as asset0.safetensors for <asset0>"
        )
    return int(number[1]), rows[0]


def _base_of(path: Path, metadata: dict[str, str]) -> dict[Path, dict[str, str]]:
    """The base model of the manifest in a file's metadata; nothing if there is no manifest."""
    if "mifo" not in metadata:
        return {}
    try:
        base = json.loads(metadata["mifo"])["base_model"]
        return {path: {"source": str(base["source"]), "sha256": str(base["sha256"])}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the manifest in the metadata of {path} is not what semantic_export.py writes "
            f"({type(error).__name__}); export it again"
        ) from error


def _compare_bases(files: LearnedFiles, base: StableDiffusion, is_chosen: bool) -> None:
    for path, wanted in files.bases.items():
        if wanted["sha256"] == base.digest:
            continue
        told = (
            f"{path} was learned with {wanted['source']} (sha256 {wanted['sha256'][:12]}…), and "
            f"{base.source} is another model ({base.digest[:12]}…)"
        )
        if not is_chosen:
            raise UserError(f"{told}; give --model_path the base model to use")
        log.warning("%s: the pictures may differ from those of the learned folder", told)
        return
