"""What was learned: embeddings of asset tokens, a LoRA, and the base model that they belong to.

A learned folder, which appears only when it is whole:

    assetN.safetensors                  one token each, a textual-inversion file
    pytorch_lora_weights.safetensors    diffusers' LoRA of UNet and text encoder
    pipeline/                           a whole pipeline (--finetune full, --save_pipeline)
    manifest.json  masks.png  learning.png  attention.png
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError, shorten
from imagelab.io.atomic import folder_names, readable
from imagelab.io.folders import check_only
from imagelab.io.tensors import (
    disk_errors,
    misfit,
    read_json,
    read_tensors,
    tensors_digest,
    write_tensors,
)
from imagelab.models.digests import weights_digest
from imagelab.models.sources import OWN as MODEL_OWN
from imagelab.models.sources import check_folder, locate_model
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from mifo.defaults import FILE as MODEL_NUMBERS
from mifo.defaults import read_own, write_own
from mifo.tokens import add_tokens, asset_token, write_rows
from mifo_lora import (
    LoraError,
    from_file,
    has_lora,
    inject_from,
    lora_state_dict,
    merge_from,
    remove,
    to_diffusers,
)

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LORA = "pytorch_lora_weights.safetensors"
PIPELINE = "pipeline"
ASSETS = ("asset[0-9].safetensors", "asset[0-9][0-9].safetensors")
OWN = (*ASSETS, LORA, PIPELINE, MANIFEST, "masks.png", "learning.png", "attention.png")
FORMAT = 1
FINETUNES = ("lora", "full", "none")
#: What may be in a pipeline that is written here.
PIPELINE_OWN = (*MODEL_OWN, MODEL_NUMBERS, MANIFEST)
#: What is read of a manifest of this format; see :func:`imagelab.io.tensors.misfit`.
FORM = {
    "base_model": {"source": str, "sha256": str},
    "tokens": [str],
    "image_sha256": str,
    "mask_sha256": [str],
    "settings": {"instance": str, "folder_path": str, "finetune": str, "finetune_steps": int},
    "separation": [float],
}
#: What folders have that were written since it is kept.
ALSO = {"proportions": [float]}
LEARN_AGAIN = "learn the instance again with --overwrite"


@dataclass(frozen=True)
class Base:
    """The base model that a file was learned with, as that file says.

    ``source``: where it was; ``sha256``: of its weights; ``configs``: of what its configs say, None
    where that was not kept.
    """

    file: Path
    source: str
    sha256: str
    configs: str | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in the keys that mifo_lora reads: float32 tensors by key, and the metadata.

    ``scale``: what its strength is multiplied by.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learned, checked as far as it can be without the base model.

    Attributes:
        rows: the embedding, float32 [width], of each asset by its number.
        row_files: where each of them is from.
        lora: None if there is none.
        bases: the base model, as each file names it that does. What a learned folder holds goes
            with that model alone; for single files the user may choose another.
        where: what a message calls the place of the assets.
        folder: the learned folder, None for single files; ``manifest``: how it was learned.
        pipeline: a whole fine-tuned model that includes the rows, in place of a LoRA.
    """

    rows: dict[int, Tensor]
    row_files: dict[int, Path]
    lora: LoraFile | None
    bases: tuple[Base, ...]
    where: str
    folder: Path | None = None
    manifest: dict = field(default_factory=dict)
    pipeline: Path | None = None

    @property
    def assets(self) -> list[int]:
        """Numbers of the assets, in their order."""
        return sorted(self.rows)

    @property
    def tokens(self) -> list[str]:
        """Names of the tokens, by asset: ``<asset0>`` and so on."""
        return [asset_token(asset) for asset in self.assets]

    @property
    def proportions(self) -> dict[str, float]:
        """Width over height of assets in their photo, by name; of those that are known."""
        return dict(zip(self.tokens, self.manifest.get("proportions", []), strict=False))

    @cached_property
    def digest(self) -> str:
        """sha256 of what was learned, wherever it lies."""
        facts = [self.manifest, [[base.sha256, base.configs] for base in self.bases]]
        tensors = {str(asset): row for asset, row in self.rows.items()}
        if self.lora:
            facts += [self.lora.metadata, self.lora.scale]
            tensors |= self.lora.tensors
        if self.pipeline:
            facts.append(weights_digest(check_folder(self.pipeline)))
        facts.append(tensors_digest(tensors))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def base_source(self) -> str:
        """The base model to load unless the user names one: a path, a hub id or ``toybox``."""
        return self.bases[0].source

    def load(
        self, model_path: str | None = None, offline: bool = False
    ) -> tuple[StableDiffusion, list[int]]:
        """The base model with what was learned in it, and the ids of the asset tokens.

        Args:
            model_path: the base model; None: the one that ``bases`` name first.

        Raises:
            UserError: something does not fit the base model, or another one was learned with. For
                single files and a chosen ``model_path`` the latter is a warning.
        """
        if self.pipeline:
            return self._load_pipeline(model_path, offline)
        model = self._load_base(model_path, offline)
        self._check_base(model.source, model.digest, bool(model_path), model.configs)
        self._check_width(model)
        ids = []
        if self.rows:
            ids = add_tokens(model.tokenizer, model.text_encoder, self.tokens)
            write_rows(model.text_encoder, ids, torch.stack([self.rows[i] for i in self.assets]))
        if self.lora:
            self._inject_lora(model)
        return model, ids

    def _load_base(self, model_path: str | None, offline: bool) -> StableDiffusion:
        if model_path:
            return load_base(model_path, offline)
        try:
            return load_base(self.base_source, offline)
        except UserError as error:
            source = shorten(self.base_source)
            raise UserError(f"{self.where} was learned with {source}: {error}") from error

    def _load_pipeline(
        self, model_path: str | None, offline: bool
    ) -> tuple[StableDiffusion, list[int]]:
        if model_path:
            path = locate_model(model_path, offline)
            weights = {"single_file": path} if path.is_file() else check_folder(path)
            self._check_base(model_path, weights_digest(weights), True)
        model = load_base(str(self.pipeline), offline)
        return model, model.tokenizer.convert_tokens_to_ids(self.tokens)

    def _check_base(
        self, source: str, digest: str, is_chosen: bool, configs: str | None = None
    ) -> None:
        """Raises UserError, or warns, where a model is not the one that was learned with."""
        for base in self.bases:
            theirs = shorten(base.source)
            if base.sha256 != digest:
                difference = (
                    f"{base.file} was learned with {theirs} (sha256 {base.sha256[:12]}…), and "
                    f"{source} is another model ({digest[:12]}…)"
                )
            elif None not in (configs, base.configs) and base.configs != configs:
                difference = (
                    f"{base.file} was learned with {theirs}, and {source} has the same "
                    "weights, but other configs: another schedule of noise, or scale of latents"
                )
            else:
                continue
            if self.folder or not is_chosen:
                raise UserError(f"{difference}; give its own base model with --model_path")
            log.warning("%s: what is learned may look different with it", difference)
            return

    def _check_width(self, model: StableDiffusion) -> None:
        width = model.text_encoder.config.hidden_size
        for asset, row in self.rows.items():
            if len(row) != width:
                raise UserError(
                    f"{self.row_files[asset]} holds {len(row)} numbers, and a token of "
                    f"{model.source} has {width}; give --model_path the base model that it was "
                    "made for"
                )

    def _inject_lora(self, model: StableDiffusion) -> None:
        parts = {"unet": model.unet, "text_encoder": model.text_encoder}
        add = inject_from if self.folder else merge_from  # files of others may hold convolutions
        try:
            for part, state in from_file(self.lora.tensors, parts, self.lora.metadata).items():
                if state:
                    add(parts[part], _scaled(state, self.lora.scale))
        except LoraError as error:
            raise UserError(f"{self.lora.path} on {model.source}: {error}") from error


def _scaled(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A LoRA's state of another strength: B times ``scale``, as an alpha is never below 0."""
    return {key: scale * each if key.endswith(".lora_B") else each for key, each in state.items()}


# ----------------------------------------------------------------------------------------------
# reading a folder


def learned_names(models_dir: Path) -> list[str]:
    """Names of the learned folders in a folder; hidden ones are left out."""
    return folder_names(models_dir, MANIFEST)


def read_manifest(path: Path) -> dict:
    """How a learned folder was learned; a UserError says what is wrong with it."""
    folder = readable(path)
    if not folder.is_dir():
        there = ", ".join(learned_names(path.parent)) or "none"
        raise UserError(
            f"there is no learned folder {path}; learned so far: {there} "
            "(semantic_learning.py makes them)"
        )
    file = folder / MANIFEST
    manifest = read_json(file, {"format": int}, LEARN_AGAIN)
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path} has format {manifest['format']}, and this version of mifo reads format "
            f"{FORMAT}; use the version that wrote it, or {LEARN_AGAIN}"
        )
    wrong = misfit(manifest, FORM | {key: form for key, form in ALSO.items() if key in manifest})
    if not wrong and manifest["settings"]["finetune"] not in FINETUNES:
        wrong = f"settings.finetune is {manifest['settings']['finetune']!r}"
    tokens = manifest["tokens"] if not wrong else []
    if not wrong and tokens != [asset_token(i) for i in range(max(1, len(tokens)))]:
        wrong = f"tokens is {tokens}"
    shapes = manifest.get("proportions", [1] * len(tokens)) if not wrong else []
    if not wrong and (len(shapes) != len(tokens) or min(shapes) <= 0):
        wrong = f"proportions is {shapes}"
    if wrong:
        raise UserError(f"{file}: {wrong}; {LEARN_AGAIN}")
    return manifest


def read_learned_folder(path: Path) -> Learned:
    """What a learned folder holds; a UserError says what is wrong with it."""
    manifest = read_manifest(path)
    settings, base = manifest["settings"], manifest["base_model"]
    folder = readable(path)
    files = {i: folder / f"asset{i}.safetensors" for i in range(len(manifest["tokens"]))}
    has_lora = settings["finetune"] == "lora" and settings["finetune_steps"]
    wanted = [*files.values()]
    wanted += [folder / LORA] if has_lora else []
    wanted += [folder / PIPELINE] if settings["finetune"] == "full" else []
    for file in wanted:
        if not file.exists():
            raise UserError(f"{path} has no {file.name}; {LEARN_AGAIN}")
    lora = LoraFile(folder / LORA, *read_tensors(folder / LORA, LEARN_AGAIN)) if has_lora else None
    if lora and not lora.tensors:
        raise UserError(f"{path / LORA} is empty; {LEARN_AGAIN}")
    return Learned(
        rows={i: _read_row(file, asset_token(i)) for i, file in files.items()},
        row_files=files,
        lora=lora,
        bases=(Base(path, base["source"], base["sha256"], base.get("configs")),),
        where=str(path),
        folder=path,
        manifest=manifest,
        pipeline=folder / PIPELINE if settings["finetune"] == "full" else None,
    )


def _read_row(file: Path, token: str) -> Tensor:
    """The embedding [width] of a token."""
    row = read_tensors(file, LEARN_AGAIN)[0].get(token)
    if row is None or row.ndim != 2 or len(row) != 1 or not row.is_floating_point():
        raise UserError(f"{file} holds no embedding of {token}; {LEARN_AGAIN}")
    return row[0].float()


# ----------------------------------------------------------------------------------------------
# writing a folder


#: Settings that are paths, apart from the base model's, which is needed to find it again.
PATHS = {
    "folder_path", "output_dir", "class_images", "models_dir", "output_path", "lora", "tokens",
}  # fmt: skip


def portable(facts: dict) -> dict:
    """A manifest, or the facts of a picture, as files that travel carry them.

    Of absolute paths in the settings only the last part is kept, as the rest may name a person.
    """

    def name(path):
        if isinstance(path, list | tuple):
            return [name(each) for each in path]
        return Path(path).name if path and Path(path).is_absolute() else path

    settings = facts["settings"]
    shortened = {key: name(settings[key]) for key in PATHS & settings.keys()}
    return facts | {"settings": settings | shortened}


def write_learned(
    folder: Path, model: StableDiffusion, rows: Tensor, has_lora: bool, manifest: dict
) -> None:
    """Fill a learned folder.

    Args:
        folder: is there and empty.
        model: its modules hold the LoRA, if there is one.
        rows: embeddings of the assets, [assets, width].
    """
    words = {"mifo": json.dumps(portable(manifest))}
    for index, row in enumerate(rows):
        tensors = {asset_token(index): row.detach().float().cpu()[None]}
        write_tensors(folder / f"asset{index}.safetensors", tensors, words)
    if has_lora:
        state = {
            **to_diffusers(lora_state_dict(model.unet), "unet"),
            **to_diffusers(lora_state_dict(model.text_encoder), "text_encoder"),
        }
        write_tensors(folder / LORA, state, words)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def merge_lora(model: StableDiffusion) -> None:
    """Merge a LoRA, if there is one, into the model's weights for good."""
    for module in (model.unet, model.text_encoder):
        if has_lora(module):
            remove(module, keep_merged=True)


def check_own(folder: Path) -> None:
    """Raises UserError where a learned folder, which is to be replaced, holds files of the user's.

    See :func:`imagelab.io.folders.check_only`.
    """
    check_only(folder, OWN)
    if (folder / PIPELINE).is_dir():
        check_only(folder / PIPELINE, PIPELINE_OWN)


def write_pipeline(folder: Path, model: StableDiffusion) -> None:
    """Save a model as it is now, as a pipeline that plain diffusers loads.

    A LoRA in it is merged into its weights for good. The numbers that the base model brings go
    along.
    """
    merge_lora(model)
    # In a group of processes transformers writes in the first alone; here each has its own folders.
    model.text_encoder.should_save_on_this_rank = bool
    with disk_errors(folder):
        model.to_pipeline().save_pretrained(folder)
    write_own(folder, read_own(model.source, offline=True))
    check_folder(folder)
