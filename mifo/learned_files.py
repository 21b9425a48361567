"""What was learned from single files in place of a learned folder: one LoRA, and tokens.

A LoRA file has the keys of kohya (A1111, ComfyUI), of diffusers or of peft; see
:mod:`mifo.foreign_lora`. A token file is a textual inversion with one vector, for ``<assetN>`` if
the file is called assetN.safetensors, or else by its key. A LoRA file may bring tokens, too. Files
of semantic_export.py carry the manifest, and so name their base model.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import parse_json, read_tensors, tensor_names
from mifo.foreign_lora import BUNDLED, check_kind, plain_lora
from mifo.learned import Base, Learned, LoraFile
from mifo.tokens import asset_token

log = logging.getLogger(__name__)

ASSET_STEM = re.compile(r"asset(\d{1,9})")
FORM = {"base_model": {"source": str, "sha256": str}}


def read_learned_files(
    lora: str | None, tokens: Sequence[str], model_path: str | None = None
) -> Learned:
    """What the files of --lora and --tokens hold; a UserError says what is wrong with them."""
    lora_file, rows, row_files, bases = None, {}, {}, []
    if lora is not None:
        lora_file, rows = _read_lora(Path(lora))
        row_files = dict.fromkeys(rows, Path(lora))
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
    where = "--tokens" if tokens else str(lora)
    return Learned(rows, row_files, lora_file, tuple(bases), where)


def _read_lora(path: Path) -> tuple[LoraFile, dict[int, Tensor]]:
    """A LoRA file in the keys that are read, and the assets' embeddings that it brings."""
    check_kind(path, tensor_names(path, "give --lora a .safetensors file"))
    tensors, metadata = _read(path, "lora")
    bundled = {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLED)}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in bundled}
    if not tensors:
        raise UserError(f"{path} holds embeddings and no LoRA; give --lora another file")
    return LoraFile(path, *plain_lora(path, tensors, metadata)), _bundled_rows(path, bundled)


def _bundled_rows(path: Path, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Embeddings [width] of assets in a LoRA file; others are told, and left out.

    Their keys are `bundle_emb.<name>.string_to_param.*`, or end otherwise.
    """
    rows, others = {}, []
    for key, tensor in tensors.items():
        name = key.removeprefix(BUNDLED).split(".")[0]
        number = ASSET_STEM.fullmatch(name.strip("<>"))
        row = tensor[None] if tensor.ndim == 1 else tensor
        if number and row.ndim == 2 and len(row) == 1 and int(number[1]) not in rows:
            rows[int(number[1])] = row[0]
        else:
            others.append(shorten(name))
    if others:
        log.warning(
            "%s brings embeddings that are left out, as they are no assets of one vector: %s%s",
            path,
            ", ".join(others[:5]),
            ", …" if len(others) > 5 else "",
        )
    return rows


def _read(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and metadata of a safetensors file."""
    tensors, metadata = read_tensors(path, f"give --{option} a .safetensors file")
    if not tensors:
        raise UserError(f"{path} is empty; give --{option} another file")
    return {key: tensor.float() for key, tensor in tensors.items()}, metadata


def _token(path: Path, tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
    """The asset number and the embedding [width] of a token file."""
    if any("lora_" in key for key in tensors):
        raise UserError(f"{path} is a LoRA; give it with --lora, and --tokens its token files")
    if len(tensors) != 1:
        raise UserError(
            f"{path} holds {len(tensors)} tensors, the first is {shorten(min(tensors))!r}, and a "
            "token of Stable Diffusion 1 or 2 is a single one; give --tokens textual inversions"
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
            f"{path} holds {shorten(key)!r}, and neither that nor the file's name is an asset's; "
            "rename the file, such as asset0.safetensors for <asset0>"
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
