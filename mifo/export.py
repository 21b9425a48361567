"""Learned folders in the formats of other programs, each read back by diffusers and compared."""

import copy
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, put, recover, scratch_folder, write_json
from imagelab.io.folders import check_only, check_writable
from imagelab.io.tensors import write_tensors
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from imagelab.prompts import encode_ids
from mifo.learned import (
    ASSETS,
    LORA,
    MANIFEST,
    PIPELINE,
    PIPELINE_OWN,
    Learned,
    portable,
    write_pipeline,
)
from mifo.tokens import view_prompt
from mifo_lora import kohya_metadata, lora_state_dict, to_kohya

TOLERANCE = 1e-4  # largest difference of two noise predictions, of the largest prediction
TIMESTEP = 500  # at which the predictions are compared
LATENT_CHANNELS = 4  # of Stable Diffusion
EMBEDDINGS = "embeddings"
#: What ``--finetune`` must have been for each format.
LEARNED_AS = {
    "kohya": ("lora",),
    "diffusers": ("lora",),
    "embeddings": ("lora", "none"),
    "pipeline": ("lora", "none", "full"),
}
#: What is in the exports that are folders.
FOLDERS = {"embeddings": ASSETS, "pipeline": PIPELINE_OWN}


class Export(NamedTuple):
    """An export: where it is, and how far diffusers' prediction is from the learned model's."""

    path: Path
    difference: float


def export(
    learned: Learned,
    output_path: Path,
    formats: Sequence[str],
    overwrite: bool = False,
    model_path: str | None = None,
    offline: bool = False,
) -> list[Export]:
    """Write a learned folder in some formats to ``output_path/<its name>``.

    All are made before the first takes its place; each appears whole. A crash in between leaves
    some of the new ones beside former ones.

    Raises:
        UserError: a format that this folder cannot have, or an export that is there already.
        FloatingPointError: diffusers reads an export and predicts another noise than the learned
            model does; everything is as it was before.
    """
    formats = [form for form in WRITERS if form in formats]
    name = learned.folder.resolve().name
    folder = output_path / name
    targets = {form: folder / _file_name(form, name) for form in formats}
    check_formats(learned, formats)
    check_writable(folder, "output_path")
    with folder_lock(folder, "--output_path"):
        for form, target in targets.items():
            recover(target)
            if target.exists() and not overwrite:
                raise UserError(f"{target} is there already; give --overwrite to replace it")
            _check_replaced(form, target)
        with scratch_folder(folder) as scratch:
            fresh = {form: scratch / target.name for form, target in targets.items()}
            differences = _write_and_compare(learned, fresh, model_path, offline)
            folder.mkdir(parents=True, exist_ok=True)
            for form, target in targets.items():  # once more: that took a while
                _check_replaced(form, target)
            for form, target in targets.items():
                put(fresh[form], target)
    return [Export(target, differences[form]) for form, target in targets.items()]


def _check_replaced(form: str, target: Path) -> None:
    """Raises UserError where what would be replaced is, or holds, something of the user's."""
    if not target.is_dir():
        return
    if form not in FOLDERS:
        raise UserError(f"{target} is a folder, where a file is to be; move it elsewhere")
    check_only(target, FOLDERS[form])


def check_formats(learned: Learned, formats: Sequence[str]) -> None:
    """Raises UserError for a format that a learned folder cannot have, or that needs peft."""
    finetune = "full" if learned.pipeline else "lora" if learned.lora else "none"
    for form in formats:
        if finetune not in LEARNED_AS[form]:
            fitting = [name for name, ways in LEARNED_AS.items() if finetune in ways]
            reason = {"none": "has no LoRA", "full": "is a whole fine-tuned model"}[finetune]
            raise UserError(
                f"{learned.where} {reason}, so there is no {form} export of it; "
                f"give --format {' '.join(fitting)}"
            )
    if finetune == "lora" and set(formats) != {"pipeline"} and find_spec("peft") is None:
        raise UserError(
            f"diffusers needs peft to read the {formats[0]} export back; install it: "
            "pip install peft"
        )


def _file_name(form: str, name: str) -> str:
    return {
        "kohya": f"{name}.safetensors",
        "diffusers": LORA,
        "embeddings": EMBEDDINGS,
        "pipeline": PIPELINE,
    }[form]


def _write_and_compare(
    learned: Learned, paths: dict[str, Path], model_path: str | None, offline: bool
) -> dict[str, float]:
    """Write exports, by format; how far each of them is from the learned model."""
    model, _ = learned.load(model_path, offline)
    prompt = view_prompt(tuple(learned.assets))
    wanted = predict_noise(model, prompt)
    for form, path in paths.items():
        WRITERS[form](path, learned, model)
    del model  # before another one is loaded
    read = _reader(learned, model_path, offline, paths)
    return {
        form: _checked_difference(form, predict_noise(read(form, path), prompt), wanted)
        for form, path in paths.items()
    }


# ----------------------------------------------------------------------------------------------
# writing


def _write_kohya(path: Path, learned: Learned, model: StableDiffusion) -> None:
    tensors = {
        **to_kohya(lora_state_dict(model.unet), "unet"),
        **to_kohya(lora_state_dict(model.text_encoder), "text_encoder"),
    }
    metadata = kohya_metadata(tensors, architecture(model), path.stem)
    write_tensors(path, tensors, {**metadata, "mifo": json.dumps(portable(learned.manifest))})


def _write_diffusers(path: Path, learned: Learned, model: StableDiffusion) -> None:
    """A learned folder keeps its LoRA in this format."""
    shutil.copyfile(learned.lora.path, path)


def _write_embeddings(path: Path, learned: Learned, model: StableDiffusion) -> None:
    """A learned folder keeps its tokens in this format."""
    path.mkdir()
    for file in learned.row_files.values():
        shutil.copyfile(file, path / file.name)


def _write_pipeline(path: Path, learned: Learned, model: StableDiffusion) -> None:
    """The LoRA is merged into ``model`` for good."""
    write_pipeline(path, model)
    write_json(path / MANIFEST, portable(learned.manifest))


#: The formats in the order of writing: the pipeline comes last, as it changes the model.
WRITERS: dict[str, Callable[[Path, Learned, StableDiffusion], None]] = {
    "kohya": _write_kohya,
    "diffusers": _write_diffusers,
    "embeddings": _write_embeddings,
    "pipeline": _write_pipeline,
}


def architecture(model: StableDiffusion) -> str:
    """The base model's kind in the words of the modelspec, by its configs.

    One with latents of its own, such as toybox, is none of those that others know.
    """
    if model.latent_channels != LATENT_CHANNELS:
        return f"latent-diffusion-of-{model.latent_channels}-channels"
    if not model.unet.config.use_linear_projection:
        return "stable-diffusion-v1"
    velocity = model.scheduler.config.prediction_type == "v_prediction"
    return "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"


# ----------------------------------------------------------------------------------------------
# reading back


@torch.no_grad()
def predict_noise(model, prompt: str) -> Tensor:
    """The UNet's output [1, c, h, w] for a fixed latent and a prompt.

    ``model`` is a :class:`StableDiffusion` or a pipeline of diffusers, in float32 on the CPU.
    """
    config = model.unet.config
    size = config.sample_size
    rows, columns = size if isinstance(size, list | tuple) else (size, size)
    shape = (1, config.in_channels, rows, columns)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    text = model.text_encoder(encode_ids(model.tokenizer, prompt)[None]).last_hidden_state
    return model.unet(latents, torch.tensor([TIMESTEP]), text).sample


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, as a share of the largest value that is wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _checked_difference(form: str, found: Tensor, wanted: Tensor) -> float:
    difference = relative_difference(found, wanted)
    if not difference <= TOLERANCE:  # true of NaN, too
        raise FloatingPointError(
            f"the {form} export, read back by diffusers, differs from the learned model by "
            f"{difference:.2g} of its prediction, which is more than {TOLERANCE:g}; nothing was "
            "written: leave it out of --format, or try another version of diffusers"
        )
    return difference


def _reader(
    learned: Learned, model_path: str | None, offline: bool, formats: Collection[str]
) -> Callable[[str, Path], object]:
    """A function from a format and a path to diffusers' pipeline with that export in it.

    What the export lacks of tokens or LoRA comes from the learned folder. A pipeline is good until
    the next call.
    """
    from diffusers import StableDiffusionPipeline

    plain = None
    if set(formats) != {"pipeline"}:
        plain = load_base(model_path or learned.base_source, offline)

    def read(form: str, path: Path) -> StableDiffusionPipeline:
        if form == "pipeline":
            return StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
        fresh = replace(  # tokens cannot be taken out again
            plain,
            text_encoder=copy.deepcopy(plain.text_encoder),
            tokenizer=copy.deepcopy(plain.tokenizer),
        )
        pipeline = fresh.to_pipeline()
        for file in learned.row_files.values():
            pipeline.load_textual_inversion(path / file.name if form == "embeddings" else file)
        if learned.lora:
            lora = path if form in ("kohya", "diffusers") else learned.lora.path
            pipeline.unload_lora_weights()  # of the call before
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name, local_files_only=True)
        return pipeline

    return read
