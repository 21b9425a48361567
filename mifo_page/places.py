"""The folders that the page may use, and what they hold to choose from and to look at.

Every name that comes from the page is checked to be that of a folder right below one of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from imagelab.errors import UserError
from imagelab.figures import plot_losses
from imagelab.io.atomic import readable
from imagelab.io.folders import check_name
from imagelab.io.images import read_image
from imagelab.training.checkpoint import read_curves, read_facts
from mifo.learned import learned_names, read_manifest
from mifo.learning.config import LearningConfig, Runtime
from mifo.learning.instance import list_instances
from mifo.learning.places import CHECKPOINT, work_folder
from mifo.synthesis.config import SynthesisConfig
from mifo_page import MIGE_MODEL

#: Folder, among those of the learned ones, of what instructions have made.
INSTRUCTED = "mige"


@dataclass(frozen=True)
class Places:
    """The folders that the page may read and write, and what its commands run on."""

    folder_path: str = LearningConfig.folder_path
    models_dir: str = LearningConfig.output_dir
    output_path: str = SynthesisConfig.output_path
    model_path: str = LearningConfig.model_path
    device: str = Runtime.device
    offline: bool = Runtime.offline
    mige_model: str = MIGE_MODEL


def folder_in(root: str | Path, name: str | None, option: str) -> Path:
    """The folder of a plain name right below ``root``, there or not; UserError for another."""
    if not name or not name.strip():
        raise UserError("no name is given; choose one, or write one such as my_things")
    if name == "all" or not name.isprintable():
        raise UserError(f"{name!r} is no name for a folder; give one such as my_things")
    check_name(name, option)
    path = Path(root) / name
    if path.resolve() != Path(root).resolve() / name:
        raise UserError(f"{path} leads out of {root}; move the folder itself there")
    return path


def instances(places: Places) -> list[str]:
    """Names of the instance folders that the page takes."""
    root = Path(places.folder_path)
    return _taken(root, list_instances(root), "instance") if root.is_dir() else []


def learned(places: Places) -> list[str]:
    """Names of the learned folders that the page takes."""
    root = Path(places.models_dir)
    return _taken(root, learned_names(root), "model_id")


def _taken(root: Path, names: list[str], option: str) -> list[str]:
    """The names that :func:`folder_in` takes.

    A folder called `all` is left out: to the commands that name means every folder there is.
    """

    def is_taken(name: str) -> bool:
        try:
            folder_in(root, name, option)
        except UserError:
            return False
        return True

    return list(filter(is_taken, names))


def curves(places: Places, instance: str) -> Image.Image | None:
    """Loss curves of the unfinished run as of its last checkpoint, else those of the result."""
    target = folder_in(places.models_dir, instance, "instance")
    config = LearningConfig(instance=instance, output_dir=places.models_dir)
    try:
        checkpoint = work_folder(config) / CHECKPOINT
        curves, facts = read_curves(checkpoint), read_facts(checkpoint, {"settings": dict})
    except UserError:  # there is none, or it has just become the result
        path = readable(target) / "learning.png"
        return read_image(path) if path.is_file() else None
    picture = BytesIO()
    plot_losses(picture, curves, LearningConfig.from_settings(**facts["settings"]).recipe.turns)
    return Image.open(picture)


def attention_maps(places: Places, instance: str) -> Image.Image | None:
    """Each asset's attention beside its mask, once the instance is learned."""
    path = folder_in(places.models_dir, instance, "instance") / "attention.png"
    return read_image(path) if path.is_file() else None


def proportions(places: Places, model_id: str | None) -> dict[str, float]:
    """Width over height of a learned folder's assets in their photo, by name; of those known.

    Empty for a folder that cannot be read, which painting reports.
    """
    if not model_id:
        return {}
    try:
        manifest = read_manifest(folder_in(places.models_dir, model_id, "model_id"))
    except (UserError, OSError):
        return {}
    return dict(zip(manifest["tokens"], manifest.get("proportions", []), strict=False))


def pictures(places: Places, model_id: str, most: int = 40) -> list[tuple[str, str]]:
    """(path, caption with its seed) of the latest pictures of a learned folder, newest first."""
    paths = _output(places, model_id).glob("*.png")
    paths = [path for path in paths if path.is_file() and not path.is_symlink()]
    paths.sort(key=lambda path: (-_modified(path), path.name))
    return [(str(path), _caption(path)) for path in paths[:most]]


def instructed(places: Places) -> tuple[Image.Image | None, list[tuple[str, str]]]:
    """The newest sheet of what instructions have made, and its pictures, newest first."""
    sheets = sorted(_output(places, INSTRUCTED).glob("sheet_*.png"), key=_modified)
    found = pictures(places, INSTRUCTED)
    return (
        read_image(sheets[-1]) if sheets else None,
        [each for each in found if not Path(each[0]).name.startswith("sheet_")],
    )


def _output(places: Places, model_id: str) -> Path:
    return folder_in(places.output_path, model_id, "model_id")


def _caption(path: Path) -> str:
    """The name of a picture, and its seed if that is in the picture."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if "mige" in picture.info:
                seed = json.loads(picture.info["mige"])["seed"]
            else:
                seed = json.loads(picture.info["mifo"])["settings"]["seed"]
    except Exception:  # of another program or damaged: Pillow raises almost anything
        return path.name
    return f"{path.name}, seed {seed}"


def stamps(places: Places, instance: str | None, model_id: str | None) -> dict[str, object]:
    """What changes when there is something new: names to choose, learning, pictures.

    Where one cannot be found out, its stamp is the error in words: that is new too.
    """
    found = {
        "names": lambda: (instances(places), learned(places)),
        "instructed": lambda: (_modified(_output(places, INSTRUCTED)),),
    }
    if instance:
        found["learning"] = lambda: (instance, *map(_modified, _traces(places, instance)))
    if model_id:
        found["pictures"] = lambda: (model_id, _modified(_output(places, model_id)))
    return {key: _or_failure(part) for key, part in found.items()}


def _or_failure(part: Callable[[], tuple]) -> tuple | str:
    try:
        return part()
    except Exception as error:  # reported when this part is shown
        return repr(error)


def _traces(places: Places, instance: str) -> tuple[Path, Path]:
    """The files that change with learning: of an unfinished run, of a result."""
    result = folder_in(places.models_dir, instance, "instance")
    config = LearningConfig(instance=instance, output_dir=places.models_dir)
    return work_folder(config) / CHECKPOINT, result / "learning.png"


def _modified(path: Path) -> int:
    """When it was written, in nanoseconds; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
