"""What a training reads and writes in folders: its settings, its record, samples, the pipeline."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from imagelab.errors import UserError
from imagelab.figures import plot_losses
from imagelab.io.atomic import folder_lock, readable, replacing, write_json
from imagelab.io.folders import check_only, check_writable, foreign
from imagelab.io.pictures import Tile, contact_sheet
from imagelab.models.sources import OWN as MODEL_OWN
from toybox.stable_diffusion.architecture import save_half
from toybox.stable_diffusion.training import Course, Run

SETTINGS, MODEL = "settings.json", "model"  # in the work folder
INDEX, RECORD, CURVES = "model_index.json", "record.json", "training.png"
#: Names in the folder of a pipeline that this trainer writes.
OWN = (*MODEL_OWN, RECORD, CURVES)


def choose_output(output: Path | None, run: Run, start: Path | None, overwrite: bool) -> Path:
    """Where the pipeline goes; None is the folder ``model`` of the work folder.

    Raises UserError where it cannot be written, or something else is. A model that is there needs
    ``overwrite``, unless it is the work folder's own, of this training.
    """
    if output is None:
        output = run.work / MODEL
        overwrite = overwrite or (run.work / SETTINGS).is_file()
    check_output(output, [run.work, *([start] if start else [])], overwrite)
    return Path(os.path.abspath(output))  # "." has no name to write aside of


def check_output(output: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """Raises UserError where a pipeline cannot be written, or something else is.

    Args:
        sources: folders that it must not replace.
    """
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output {output} holds {source}; give another folder")
    check_writable(output.absolute().parent, "output")
    there = readable(output)
    is_folder = there.is_dir()
    if not os.path.lexists(there) or (is_folder and not any(foreign(there))):
        return
    if not (is_folder and (there / INDEX).is_file() and (there / RECORD).is_file()):
        raise UserError(
            f"{output} is no model that this trainer wrote, so it is not replaced; give another "
            "--output"
        )
    if not overwrite:
        raise UserError(
            f"{output} holds a model; replace it with --overwrite, or give another --output"
        )
    check_only(there, OWN)


def check_work(run: Run, start: Path | None, fresh: Sequence[str] = ()) -> None:
    """Make the work folder, or raise UserError where it holds a training of another kind.

    The number of the UNet's steps may change, for more of them or an earlier cool-down, and how
    often it draws samples.
    """
    facts = {k: v for k, v in asdict(run.config).items() if k not in ("steps", "sample_steps")}
    facts |= {"begin_from": str(start), "fresh": list(fresh), "shape": asdict(run.shape)}
    facts = json.loads(json.dumps(facts))
    path = run.work / SETTINGS
    check_writable(run.work, "work")
    run.work.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, facts)
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    if differ := ", ".join(key for key in facts if then.get(key) != facts[key]):
        raise UserError(
            f"{run.work} holds a training with other settings ({differ}); give another --work"
        )


def copy_vocabulary(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer's vocabulary from one folder to another."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, target / name)


def read_record(folder: Path) -> dict:
    """How the model in a pipeline folder was trained."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--begin_from {folder} has no readable {RECORD} ({type(error).__name__}); "
            "give a folder that this trainer wrote"
        ) from error


def read_scale(folder: Path) -> float:
    """The factor of latents that the UNet of a pipeline folder knows."""
    return AutoencoderKL.load_config(folder / "vae")["scaling_factor"]


def sample_grid(pipeline, path: Path, seed: int = 0) -> None:
    """Twelve fixed prompts, guidance 5, 25 steps."""
    prompts = [
        "a red car",
        "a photo of a purple lizard",
        "a teal fish on the grass",
        "a yellow balloon in the sky",
        "a green robot in the snow",
        "an orange cat",
        "a blue teapot on a wooden table",
        "a pink dog",
        "a photo of a purple lizard and a yellow balloon",
        "a red car and a blue car on the road",
        "a fox and a bear in the snow",
        "a teal chair and an orange duck",
    ]
    draw = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pictures = pipeline(prompts, num_inference_steps=25, guidance_scale=5.0, generator=draw).images
    contact_sheet([Tile(picture) for picture in pictures], gap=0).save(path)


def write_pipeline(
    pipeline, output: Path, work: Path, courses: Mapping[str, Course], record: dict
) -> None:
    """The pipeline folder, with the learning curves of the stages and how they were trained.

    It appears when it is whole.
    """
    check = partial(check_only, own=OWN)
    with folder_lock(output, "--output"), replacing(output, check) as folder:
        save_half(pipeline, folder)
        copy_vocabulary(work, folder / "tokenizer")
        if curves := {name: course.losses for name, course in courses.items() if course.losses}:
            plot_losses(folder / CURVES, curves)
        write_json(folder / RECORD, record)
