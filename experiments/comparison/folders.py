"""The instance folders of a comparison, and the folder that it all goes to."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.comparison.learning import learning_config
from experiments.comparison.settings import FREE_SETTINGS, VARIANTS, Settings
from imagelab.errors import UserError
from imagelab.io.atomic import write_json


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
    import numpy as np

    from toybox.scenes.instances import look_alikes, read_looks, with_looks, write_folder
    from toybox.scenes.scenes import draw_scene

    alike, count = _sort(index)
    rng = np.random.default_rng((seed, index))
    looks = look_alikes(rng, count, alike, kinds)
    if not (folder / "scene.json").is_file():  # which is written last
        scene = with_looks(draw_scene(rng, count), looks)
        write_folder(folder, scene, seed, overwrite=True)
    elif read_looks(folder) != list(looks):
        raise UserError(f"{folder} holds other toys than --seed {seed} makes; give another --work")


def prepare(work: Path, settings: Settings) -> list[str]:
    """Check that ``work`` is this comparison's, and make its instance folders; their names."""
    from imagelab.io.folders import check_writable
    from imagelab.models.sources import check_folder, locate_model, model_digest
    from mifo.learning.checks import check_settings
    from toybox.stable_diffusion.architecture import trained_kinds

    check_writable(work, "work")
    model = locate_model(settings.model_path, offline=True)
    kinds = trained_kinds(model)
    now = {k: v for k, v in asdict(settings).items() if k not in FREE_SETTINGS}
    now["base model"] = model_digest(check_folder(model))[:12]
    path = work / "settings.json"
    then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    if differ := ", ".join(f"{key} {then.get(key)}" for key in now if then.get(key) != now[key]):
        raise UserError(
            f"{work} holds a comparison with other settings ({differ}); go on with those, or give "
            "another --work"
        )
    names = [folder_name(index) for index in range(settings.folders)]
    for index, name in enumerate(names):
        make_folder(work / "folders" / name, settings.seed, index, kinds)
    check_settings(learning_config(work, settings, VARIANTS["mifo"], names[0]))
    if not path.is_file():
        write_json(path, now)
    return names
