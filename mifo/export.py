"""Learned folders in the formats of other programs, each read back by diffusers and compared."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagelab.errors import UserError
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from mifo.learned import (
    LORA,
    MANIFEST,
    PIPELINE,
    LearnedFolder,
    check_writable,
    load_learned,
    portable,
    recover,
    replacing,
    write_pipeline,
)
from imagelab.prompts import encode_ids
from mifo.tokens import view_prompt
from mifo_lora import kohya_metadata, lora_state_dict, save_lora, to_kohya

TOLERANCE = 1e-4  # largest difference of two noise predictions, of the largest prediction
TIMESTEP = 500  # at which the predictions are compared
EMBEDDINGS = "embeddings"
#: What ``--finetune`` must have been for each format.
LEARNED_AS = {
    "kohya": ("lora",),
    "diffusers": ("lora",),
    "embeddings": ("lora", "none"),
    "pipeline": ("lora", "none", "full"),
}


class Export(NamedTuple):
    """An export: where it is, and how far diffusers' prediction is from the learned model's."""

    path: Path
    difference: float


def export(
    learned: LearnedFolder,
    output_path: Path,
    formats: Sequence[str],
    overwrite: bool = False,
    model_path: str | None = None,
    offline: bool = False,
) -> list[Export]:
    """Write a learned folder in some formats to ``output_path/<its name>``: all of them or none.

    Raises:
        UserError: a format that this folder cannot have, or an export that is there already.
        FloatingPointError: diffusers reads an export and predicts another noise than the learned
            model does; everything is as it was before.
    """
    formats = [name for name in WRITERS if name in formats]
    name = learned.path.resolve().name
    folder = output_path / name
    targets = {form: folder / _file_name(form, name) for form in formats}
    check_formats(learned, formats)
    check_writable(folder, "output_path")
    for target in targets.values():
        recover(target)
        if target.exists() and not overwrite:
            raise UserError(f"{target} is there already; give --overwrite to replace it")
    base, _ = load_learned(learned, model_path, offline)
    prompt = view_prompt(tuple(learned.assets))
    wanted = predict_noise(base, prompt)
    exports = []
    with _aside(folder) as fresh:
        for form, target in targets.items():
            WRITERS[form](fresh / target.name, learned, base)
        del base  # before another one is loaded
        read = _reader(learned, model_path, offline, formats)
        for form, target in targets.items():
            found = predict_noise(read(form, fresh / target.name), prompt)
            exports.append(Export(target, _checked_difference(form, found, wanted)))
        folder.mkdir(parents=True, exist_ok=True)
        for target in targets.values():
            _place(fresh / target.name, target)
    return exports


def check_formats(learned: LearnedFolder, formats: Sequence[str]) -> None:
    """Raises UserError for a format that a learned folder cannot have, or that peft is lacking."""
    finetune = learned.manifest["settings"]["finetune"]
    if finetune == "lora" and not (learned.path / LORA).is_file():
        finetune = "none"  # learned with no step of stage 2
    for form in formats:
        if finetune not in LEARNED_AS[form]:
            fitting = [name for name, ways in LEARNED_AS.items() if finetune in ways]
            reason = {"none": "has no LoRA", "full": "is a whole fine-tuned model"}[finetune]
            raise UserError(
                f"{learned.path} {reason}, so there is no {form} export of it; "
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


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` to write into, gone in the end."""
    aside = folder.with_name(f".{folder.name}.export")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _place(fresh: Path, target: Path) -> None:
    """Move a checked export, a file or a folder, to its place."""
    if fresh.is_file():
        os.replace(fresh, target)
        return
    with replacing(target) as folder:
        for path in fresh.iterdir():
            os.replace(path, folder / path.name)


# ----------------------------------------------------------------------------------------------
# writing


def _write_kohya(path: Path, learned: LearnedFolder, base: StableDiffusion) -> None:
    tensors = {
        **to_kohya(lora_state_dict(base.unet), "unet"),
        **to_kohya(lora_state_dict(base.text_encoder), "text_encoder"),
    }
    metadata = kohya_metadata(tensors, architecture(base), path.stem)
    save_lora(path, tensors, {**metadata, "mifo": json.dumps(portable(learned.manifest))})


def _write_diffusers(path: Path, learned: LearnedFolder, base: StableDiffusion) -> None:
    """A learned folder keeps its LoRA in this format."""
    shutil.copyfile(learned.path / LORA, path)


def _write_embeddings(path: Path, learned: LearnedFolder, base: StableDiffusion) -> None:
    """A learned folder keeps its tokens in this format."""
    path.mkdir()
    for asset in learned.assets:
        shutil.copyfile(
            learned.path / f"asset{asset}.safetensors", path / f"asset{asset}.safetensors"
        )


def _write_pipeline(path: Path, learned: LearnedFolder, base: StableDiffusion) -> None:
    """The LoRA is merged into ``base`` for good."""
    write_pipeline(path, base)
    text = json.dumps(portable(learned.manifest), indent=2) + "\n"
    (path / MANIFEST).write_text(text, encoding="utf-8")


#: The formats in the order of writing: the pipeline comes last, as it changes the model.
WRITERS: dict[str, Callable[[Path, LearnedFolder, StableDiffusion], None]] = {
    "kohya": _write_kohya,
    "diffusers": _write_diffusers,
    "embeddings": _write_embeddings,
    "pipeline": _write_pipeline,
}


def architecture(base: StableDiffusion) -> str:
    """The base model's kind in the words of the modelspec, told from its configs."""
    if not base.unet.config.use_linear_projection:
        return "stable-diffusion-v1"
    velocity = base.scheduler.config.prediction_type == "v_prediction"
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
    learned: LearnedFolder, model_path: str | None, offline: bool, formats: Sequence[str]
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
        pipeline = StableDiffusionPipeline(
            vae=plain.vae,
            text_encoder=copy.deepcopy(plain.text_encoder),  # tokens cannot be taken out again
            tokenizer=copy.deepcopy(plain.tokenizer),
            unet=plain.unet,
            scheduler=plain.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        tokens = path if form == "embeddings" else learned.path
        for asset in learned.assets:
            pipeline.load_textual_inversion(tokens / f"asset{asset}.safetensors")
        lora = path if form in ("kohya", "diffusers") else learned.path / LORA
        if lora.is_file():
            pipeline.unload_lora_weights()  # of the call before
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name, local_files_only=True)
        return pipeline

    return read
