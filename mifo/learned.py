"""A learned folder: asset rows, LoRA, manifest, pictures. Written aside, then renamed.

assetN.safetensors                  one token each, a textual-inversion file
pytorch_lora_weights.safetensors    diffusers' LoRA of UNet and text encoder
pipeline/                           a whole pipeline (--finetune full, --save_pipeline)
manifest.json  learning.png  attention.png
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mifo.instance import asset_token
from mifo.models import BaseModel, load_base
from mifo.tokens import add_asset_tokens, write_rows
from mifo_lora import (
    from_diffusers,
    inject_from,
    lora_state_dict,
    read_lora,
    save_lora,
    to_diffusers,
)

MANIFEST = "manifest.json"
LORA = "pytorch_lora_weights.safetensors"
PIPELINE = "pipeline"
FORMAT = 1


@dataclass(frozen=True)
class LearnedFolder:
    """What a learned folder says of itself; nothing heavy is read yet."""

    path: Path
    manifest: dict

    @property
    def assets(self) -> list[int]:
        return list(range(len(self.manifest["tokens"])))

    @property
    def base_source(self) -> str:
        return self.manifest["base_model"]["source"]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``target`` at the end, or vanishes on an error."""
    aside = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(aside, target)
    shutil.rmtree(old, ignore_errors=True)


def write_learned(folder: Path, base: BaseModel, rows: Tensor, lora: bool, manifest: dict) -> None:
    """Write asset rows [assets, width], the LoRA of the base's modules if any, the manifest."""
    words = {"mifo": json.dumps(manifest)}
    for index, row in enumerate(rows):
        tensors = {asset_token(index): row.detach().float().cpu()[None]}
        save_lora(folder / f"asset{index}.safetensors", tensors, words)
    if lora:
        state = {
            **to_diffusers(lora_state_dict(base.unet), "unet"),
            **to_diffusers(lora_state_dict(base.text_encoder), "text_encoder"),
        }
        save_lora(folder / LORA, state, words)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_pipeline(folder: Path, base: BaseModel) -> None:
    """Save the base model as it is now, as a pipeline that plain diffusers loads."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def open_learned(path: Path) -> LearnedFolder:
    """Check a learned folder and read its manifest; a ValueError says what is wrong with it."""
    if not path.is_dir():
        there = sorted(p.parent.name for p in path.parent.glob(f"*/{MANIFEST}"))
        raise ValueError(
            f"there is no learned folder {path}; learned so far: {', '.join(there) or 'none'} "
            "(semantic_learning.py makes them)"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        tokens = manifest["tokens"]
        manifest["base_model"]["source"], manifest["base_model"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / MANIFEST} is missing or not what semantic_learning.py writes "
            f"({type(error).__name__}); learn the instance again with --overwrite"
        ) from error
    wanted = [f"asset{i}.safetensors" for i in range(len(tokens))]
    wanted += [LORA] if manifest["settings"]["finetune"] == "lora" else []
    wanted += [PIPELINE] if manifest["settings"]["finetune"] == "full" else []
    for name in wanted:
        if not (path / name).exists():
            raise ValueError(f"{path} has no {name}; learn the instance again with --overwrite")
    return LearnedFolder(path, manifest)


def load_learned(
    learned: LearnedFolder, model_path: str | None = None, offline: bool = False
) -> tuple[BaseModel, list[int]]:
    """The base model with what was learned in it, and the ids of the asset tokens.

    Raises ValueError when the base model is not the one that the folder was learned with.
    """
    full = learned.manifest["settings"]["finetune"] == "full"
    if full:
        base = load_base(str(learned.path / PIPELINE), offline)
        return base, base.tokenizer.convert_tokens_to_ids(learned.manifest["tokens"])
    base = load_base(model_path or learned.base_source, offline)
    wanted = learned.manifest["base_model"]["sha256"]
    if base.digest != wanted:
        raise ValueError(
            f"{learned.path} was learned with {learned.base_source} (sha256 {wanted[:12]}…), and "
            f"{base.source} is another model ({base.digest[:12]}…); give its own base model with "
            "--model_path"
        )
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, len(learned.assets))
    rows = [
        read_lora(learned.path / f"asset{i}.safetensors")[0][asset_token(i)][0]
        for i in learned.assets
    ]
    write_rows(base.text_encoder, ids, torch.stack(rows))
    if (learned.path / LORA).is_file():
        file, metadata = read_lora(learned.path / LORA)
        for part, module in (("unet", base.unet), ("text_encoder", base.text_encoder)):
            inject_from(module, from_diffusers(file, module, part, metadata))
    return base, ids
