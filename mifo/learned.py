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
from safetensors import SafetensorError
from torch import Tensor

from imagelab.errors import UserError
from imagelab.models.sources import check_folder, locate_model, model_digest
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from mifo.tokens import add_asset_tokens, asset_token, write_rows
from mifo_lora import (
    LoraError,
    from_diffusers,
    has_lora,
    inject_from,
    lora_state_dict,
    read_lora,
    remove,
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
        """Numbers of the assets, from 0 on."""
        return list(range(len(self.tokens)))

    @property
    def tokens(self) -> list[str]:
        """Names of the tokens, by asset: ``<asset0>`` and so on."""
        return self.manifest["tokens"]

    @property
    def where(self) -> str:
        """What a sentence calls the place of the assets."""
        return str(self.path)

    @property
    def base_source(self) -> str:
        """The base model that it was learned with: a path, a hub id or ``toybox``."""
        return self.manifest["base_model"]["source"]


def check_name(name: str, option: str) -> None:
    """Raises UserError unless a name is that of a folder right below another."""
    if Path(name).name != name or name.startswith("."):
        raise UserError(
            f"--{option} {name!r} is not the plain name of a folder; give the name alone, such as "
            "toy_car, and the folder above it by its own option"
        )


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError where a folder is not there and cannot be made, or cannot be written to."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, not a folder; give another --{option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the folder {there} cannot be written to; give another --{option}")


#: Settings that are paths, apart from the base model's, which is needed to find it again.
PATHS = {
    "folder_path", "output_dir", "class_images", "models_dir", "output_path", "lora", "tokens",
}  # fmt: skip


def portable(facts: dict) -> dict:
    """A manifest, or the facts of a picture, as files that travel carry them.

    Of absolute paths in the settings only the last part is kept, so they tell nobody's home.
    """

    def name(path):
        if isinstance(path, list | tuple):
            return [name(each) for each in path]
        return Path(path).name if path and Path(path).is_absolute() else path

    settings = facts["settings"]
    shortened = {key: name(settings[key]) for key in PATHS & settings.keys()}
    return facts | {"settings": settings | shortened}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``target`` at the end, or vanishes on an error."""
    recover(target)
    aside, old = target.with_name(f".{target.name}.new"), _old(target)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
    except BaseException:
        recover(target)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Put back an earlier result that :func:`replacing` had moved away when it was killed."""
    if _old(target).exists() and not target.exists():
        os.replace(_old(target), target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def write_learned(
    folder: Path, base: StableDiffusion, rows: Tensor, lora: bool, manifest: dict
) -> None:
    """Write asset rows [assets, width], the LoRA of the base's modules if any, the manifest."""
    words = {"mifo": json.dumps(portable(manifest))}
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


def merge_lora(base: StableDiffusion) -> None:
    """Merge a LoRA, if there is one, into the base model's weights for good."""
    for module in (base.unet, base.text_encoder):
        if has_lora(module):
            remove(module, keep_merged=True)


def write_pipeline(folder: Path, base: StableDiffusion) -> None:
    """Save the base model as it is now, as a pipeline that plain diffusers loads.

    A LoRA in it is merged into its weights for good.
    """
    from diffusers import StableDiffusionPipeline

    merge_lora(base)
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # In a group of processes transformers writes in the first alone; here each has its own folders.
    base.text_encoder.should_save_on_this_rank = bool
    try:
        pipeline.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(
            f"the pipeline could not be written ({error}); free some space and try again"
        ) from error
    check_folder(folder)


def learned_names(models_dir: Path) -> list[str]:
    """Names of the learned folders in a folder; names that begin with a dot are skipped."""
    return sorted(path.parent.name for path in models_dir.glob(f"[!.]*/{MANIFEST}"))


def open_learned(path: Path) -> LearnedFolder:
    """Check a learned folder and read its manifest; a UserError says what is wrong with it."""
    recover(path)
    if not path.is_dir():
        there = learned_names(path.parent)
        raise UserError(
            f"there is no learned folder {path}; learned so far: {', '.join(there) or 'none'} "
            "(semantic_learning.py makes them)"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        tokens, settings = manifest["tokens"], manifest["settings"]
        if not tokens or tokens != [asset_token(i) for i in range(len(tokens))]:
            raise UserError("tokens")
        has_lora = settings["finetune"] == "lora" and settings["finetune_steps"]
        manifest["base_model"]["source"], manifest["base_model"]["sha256"]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST} is missing or not what semantic_learning.py writes "
            f"({type(error).__name__}); learn the instance again with --overwrite"
        ) from error
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, and this version of mifo reads format {FORMAT}; use the "
            "version that wrote it, or learn the instance again with --overwrite"
        )
    wanted = [f"asset{i}.safetensors" for i in range(len(tokens))]
    wanted += [LORA] if has_lora else []
    wanted += [PIPELINE] if settings["finetune"] == "full" else []
    for name in wanted:
        if not (path / name).exists():
            raise UserError(f"{path} has no {name}; learn the instance again with --overwrite")
    return LearnedFolder(path, manifest)


def load_learned(
    learned: LearnedFolder, model_path: str | None = None, offline: bool = False
) -> tuple[StableDiffusion, list[int]]:
    """The base model with what was learned in it, and the ids of the asset tokens.

    Raises UserError when the base model is not the one that the folder was learned with.
    """
    if learned.manifest["settings"]["finetune"] == "full":
        if model_path:
            path = locate_model(model_path, offline)
            weights = {"single_file": path} if path.is_file() else check_folder(path)
            _check_base(learned, model_path, model_digest(weights))
        base = load_base(str(learned.path / PIPELINE), offline)
        return base, base.tokenizer.convert_tokens_to_ids(learned.manifest["tokens"])
    base = load_base(model_path or learned.base_source, offline)
    _check_base(learned, base.source, base.digest)
    rows = _read_rows(learned, base.text_encoder.config.hidden_size)
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, len(learned.assets))
    write_rows(base.text_encoder, ids, rows)
    if (learned.path / LORA).is_file():
        file, metadata = read_lora(learned.path / LORA)
        for part, module in (("unet", base.unet), ("text_encoder", base.text_encoder)):
            inject_from(module, from_diffusers(file, module, part, metadata))
    return base, ids


def _check_base(learned: LearnedFolder, source: str, digest: str) -> None:
    wanted = learned.manifest["base_model"]["sha256"]
    if digest != wanted:
        raise UserError(
            f"{learned.path} was learned with {learned.base_source} (sha256 {wanted[:12]}…), and "
            f"{source} is another model ({digest[:12]}…); give its own base model with --model_path"
        )


def _read_rows(learned: LearnedFolder, width: int) -> Tensor:
    """The embeddings of all assets, [assets, width]."""
    rows = []
    for index in learned.assets:
        path = learned.path / f"asset{index}.safetensors"
        try:
            row = read_lora(path)[0].get(asset_token(index))
        except LoraError:  # no safetensors file at all
            row = None
        if row is None or row.shape != (1, width) or not row.isfinite().all():
            raise UserError(
                f"{path} holds no {asset_token(index)} of {width} finite numbers; learn the "
                "instance again with --overwrite"
            )
        rows.append(row[0])
    return torch.stack(rows)
