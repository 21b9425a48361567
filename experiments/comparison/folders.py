"""The instance folders of a comparison, and the jobs that learn and paint them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.comparison.settings import (
    FREE_SETTINGS,
    LOSSES,
    Settings,
    Variant,
    folder_seed,
)
from experiments.study import Job
from experiments.tasks import Task
from imagelab.errors import UserError
from imagelab.io.atomic import write_json
from imagelab.io.folders import check_writable
from imagelab.io.tensors import read_json
from imagelab.models.digests import weights_digest
from imagelab.models.sources import check_folder, locate_model
from imagelab.models.stable_diffusion import LOADERS
from imagelab.sampling import check_steps
from mifo.learning.checks import check_settings
from mifo.learning.config import LearningConfig
from toybox.scenes.instances import look_alikes, read_looks, with_looks, write_folder
from toybox.scenes.scenes import draw_scene
from toybox.stable_diffusion.architecture import trained_kinds

APART = (25.0, 50.0)  # degrees between the hues of toys of one kind


def folder_name(index: int) -> str:
    """Such as kind2_000: look-alikes of one kind, two of them."""
    alike, count = _sort(index)
    return f"{alike}{count}_{index:03d}"


def _sort(index: int) -> tuple[str, int]:
    """What a folder's toys share, and how many they are; all four sorts in four folders.

    In this order the work of two processes is alike.
    """
    return (("kind", 2), ("kind", 3), ("hue", 3), ("hue", 2))[index % 4]


def make_folder(folder: Path, seed: int, index: int, kinds: Sequence[str]) -> None:
    """Write instance folder ``index``, unless it is there.

    Raises UserError for one that is there and shows other toys.
    """
    alike, count = _sort(index)
    rng = np.random.default_rng((seed, index))
    looks = look_alikes(rng, count, alike, kinds, APART)
    if not (folder / "scene.json").is_file():  # which is written last
        scene = with_looks(draw_scene(rng, count), looks)
        write_folder(folder, scene, seed, overwrite=True)
    elif read_looks(folder) != list(looks):
        raise UserError(f"{folder} holds other toys than --seed {seed} makes; give another --work")


def prepare(work: Path, settings: Settings, bases: Sequence[str]) -> list[str]:
    """Check that ``work`` is this comparison's, and make its instance folders; their names."""
    check_writable(work, "work")
    models = {base: locate_model(base, offline=True) for base in bases}
    kinds = trained_kinds(models[bases[0]])
    now = {k: v for k, v in asdict(settings).items() if k not in FREE_SETTINGS}
    digests = {base: weights_digest(check_folder(path))[:12] for base, path in models.items()}
    path = work / "settings.json"
    then = read_json(path, {}, "give another --work") if path.is_file() else now | digests
    differ = [key for key in now if then.get(key) != now[key]]
    differ += [key for key in digests if then.get(key, digests[key]) != digests[key]]
    if differ:
        shown = ", ".join(f"{key} {then.get(key)}" for key in differ)
        raise UserError(
            f"{work} holds a comparison with other settings ({shown}); go on with those, or give "
            "another --work"
        )
    names = [folder_name(settings.first + index) for index in range(settings.folders)]
    last = names[-1]  # whose seed is the largest
    check_settings(learning_config(work, settings, Variant(bases[0], "random", "mifo"), last))
    for model in models.values():
        check_steps(settings.num_inference_steps, LOADERS["scheduler"](model / "scheduler"))
    for index, name in enumerate(names):
        make_folder(work / "folders" / name, settings.seed, settings.first + index, kinds)
    if then | digests != then or not path.is_file():
        write_json(path, then | digests)
    return names


def learning_config(work: Path, settings: Settings, variant: Variant, name: str) -> LearningConfig:
    """How a folder is learned in a variant; the class images show its kinds."""
    return LearningConfig.from_settings(
        instance=name,
        folder_path=work / "folders",
        model_path=variant.base,
        output_dir=work / "learned" / variant.name,
        seed=folder_seed(settings.seed, name),
        train_steps=settings.train_steps,
        reward_steps=settings.train_steps // 3,
        learning_rate=settings.learning_rate,
        finetune_steps=settings.finetune_steps,
        finetune_learning_rate=settings.finetune_learning_rate,
        initializer_scale=settings.initializer_scale,
        num_class_images=settings.num_class_images,
        initialize_from_class=variant.tokens == "kind",
        attention_loss=variant.loss,
        attention_weight=LOSSES[variant.loss] * settings.weight,
        mixed_precision=settings.mixed_precision,
        offline=True,
    )


def make_job(work: Path, settings: Settings, variant: Variant, name: str) -> Job:
    """A folder in a variant: all its assets with and without boxes, and each alone."""
    looks = tuple(read_looks(work / "folders" / name))
    every, seed = tuple(range(len(looks))), folder_seed(settings.seed, name)
    tasks = [
        Task("boxed", every, True, settings.pictures, seed),
        Task("unboxed", every, False, settings.pictures, seed),
        *(Task(f"alone {one}", (one,), False, settings.alone, seed) for one in every),
    ]
    about = {"base": variant.base_name, "tokens": variant.tokens, "loss": variant.loss}
    config = learning_config(work, settings, variant, name)
    return Job(variant.name, config, looks, tuple(tasks), about, painting_settings(settings))


def painting_settings(settings: Settings) -> dict:
    """Settings of synthesis, by name, in place of its defaults."""
    return {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "step_scale": 1.0,
        "guidance_steps": settings.guidance_steps,
        "mixed_precision": settings.mixed_precision,
    }
