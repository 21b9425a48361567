"""The folders that the page may use, and what is in them to choose and to see.

Every name that comes from the page is checked to be that of a folder right below one of them.
"""

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from mifo.config import LearningConfig, SynthesisConfig
from mifo.figures import learning_curves
from mifo.instance import list_instances, read_picture
from mifo.learned import check_name, learned_names
from mifo.plan import CHECKPOINT, work_folder

LOSSES = ("loss", "reconstruction", "attention")


@dataclass(frozen=True)
class Places:
    """The folders that the page may read and write, and what its commands run on."""

    folder_path: str = LearningConfig.folder_path
    models_dir: str = LearningConfig.output_dir
    output_path: str = SynthesisConfig.output_path
    model_path: str = LearningConfig.model_path
    device: str = LearningConfig.device
    offline: bool = LearningConfig.offline


def folder_in(root: str | Path, name: str | None, option: str) -> Path:
    """The folder of a plain name right below ``root``, there or not; ValueError for another."""
    if not name or not name.strip():
        raise ValueError("no name is given; choose one, or write one such as my_things")
    if name == "all" or not name.isprintable():
        raise ValueError(f"{name!r} is no name for a folder; give one such as my_things")
    check_name(name, option)
    path = Path(root) / name
    if path.resolve() != Path(root).resolve() / name:
        raise ValueError(f"{path} leads out of {root}; move the folder itself there")
    return path


def instances(places: Places) -> list[str]:
    """Names of the instance folders."""
    return list_instances(Path(places.folder_path)) if Path(places.folder_path).is_dir() else []


def learned(places: Places) -> list[str]:
    """Names of the learned folders."""
    return learned_names(Path(places.models_dir))


def curves(places: Places, instance: str) -> Image.Image | None:
    """Loss curves of the unfinished run as of its last checkpoint, else those of the result."""
    target = folder_in(places.models_dir, instance, "instance")
    config = LearningConfig(instance=instance, output_dir=places.models_dir)
    try:
        with safe_open(work_folder(config) / CHECKPOINT, framework="np") as file:
            losses = {name: file.get_tensor(f"losses.{name}").tolist() for name in LOSSES}
            settings = json.loads(file.metadata()["mifo"])["facts"]["settings"]
    except (OSError, SafetensorError):  # there is none, or it has just become the result
        path = target / "learning.png"
        return read_picture(path) if path.is_file() else None
    steps = {1: settings["train_steps"], 2: settings["finetune_steps"]}
    stages = [(stage, count) for stage, count in steps.items() if count]
    picture = BytesIO()
    learning_curves(picture, losses, stages, settings["reward_steps"])
    return Image.open(picture)


def attention_maps(places: Places, instance: str) -> Image.Image | None:
    """Each asset's attention beside its mask, once the instance is learned."""
    path = folder_in(places.models_dir, instance, "instance") / "attention.png"
    return read_picture(path) if path.is_file() else None


def pictures(places: Places, model_id: str, most: int = 40) -> list[tuple[str, str]]:
    """(path, caption with its seed) of the latest pictures of a learned folder, newest first."""
    folder = folder_in(places.output_path, model_id, "model_id")
    paths = sorted(folder.glob("*.png"), key=lambda path: (-path.stat().st_mtime, path.name))
    return [(str(path), _caption(path)) for path in paths[:most]]


def _caption(path: Path) -> str:
    facts = path.with_suffix(".json")
    if not facts.is_file():
        return path.name
    return f"{path.name}, seed {json.loads(facts.read_text())['settings']['seed']}"


def stamps(places: Places, instance: str | None, model_id: str | None) -> dict[str, tuple]:
    """What changes when there is something new to choose ("names"), of learning, of pictures."""
    found = {"names": (instances(places), learned(places))}
    if instance:
        result = folder_in(places.models_dir, instance, "instance")
        config = LearningConfig(instance=instance, output_dir=places.models_dir)
        traces = work_folder(config) / CHECKPOINT, result / "learning.png"
        found["learning"] = (instance, *map(_modified, traces))
    if model_id:
        folder = folder_in(places.output_path, model_id, "model_id")
        found["pictures"] = (model_id, _modified(folder))
    return found


def _modified(path: Path) -> int:
    """When it was written, in nanoseconds; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
