"""What was learned from single files in place of a learned folder: one LoRA, and tokens.

A LoRA file has the keys of kohya (A1111, ComfyUI) or of diffusers. A token file is a textual
inversion with one vector, for ``<assetN>`` if the file is called assetN.safetensors, or else by its
key. Files of semantic_export.py carry the manifest, and so name their base model.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from imagelab.errors import UserError
from imagelab.io.tensors import parse_json, read_tensors
from mifo.learned import Base, Learned, LoraFile
from mifo.tokens import asset_token

ASSET_STEM = re.compile(r"asset(\d{1,9})")
FORM = {"base_model": {"source": str, "sha256": str}}


def read_learned_files(
    lora: str | None, tokens: Sequence[str], model_path: str | None = None
) -> Learned:
    """What the files of --lora and --tokens hold; a UserError says what is wrong with them."""
    lora_file, rows, row_files, bases = None, {}, {}, []
    if lora is not None:
        lora_file = LoraFile(Path(lora), *_read(Path(lora), "lora"))
        bases += _base_of(Path(lora), lora_file.metadata)
    for path in map(Path, tokens):
        tensors, metadata = _read(path, "tokens")
        asset, row = _token(path, tensors)
        if asset in rows:
            raise UserError(
                f"{row_files[asset]} and {path} both hold {asset_token(asset)}; leave one out, or "
                "rename it, such as asset7.safetensors for <asset7>"
            )
        rows[asset], row_files[asset] = row, path
        bases += _base_of(path, metadata)
    if not (model_path or bases):
        raise UserError(
            f"{lora or tokens[0]} does not say which base model it was made for; give it with "
            "--model_path"
        )
    return Learned(rows, row_files, lora_file, tuple(bases), where="--tokens")


def _read(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and metadata of a safetensors file."""
    tensors, metadata = read_tensors(path, f"give --{option} a .safetensors file")
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
    number = ASSET_STEM.fullmatch(path.stem) or ASSET_STEM.fullmatch(key.strip("<>"))
    if number is None:
        raise UserError(
            f"{path} holds {key!r}, and neither that nor the file's name is an asset's; rename the "
            "file, such as asset0.safetensors for <asset0>"
        )
    return int(number[1]), rows[0]


def _base_of(path: Path, metadata: dict[str, str]) -> list[Base]:
    """The base model of the manifest in a file's metadata; nothing if there is no manifest."""
    if "mifo" not in metadata:
        return []
    name = f"the manifest in the metadata of {path}"
    base = parse_json(metadata["mifo"], FORM, name, "export it again with semantic_export.py")
    model = base["base_model"]
    return [Base(path, model["source"], model["sha256"], model.get("configs"))]
