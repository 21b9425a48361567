"""What is painted of a learned folder, and what its pictures show: one row a task, as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from experiments.judge import find_instances, judge_boxes
from imagelab.io.atomic import written_aside
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import preset_boxes
from mifo.synthesis.paint import paint, prepare
from mifo.synthesis.scene import Scene, make_scene
from mifo.tokens import view_prompt
from toybox.classifier.network import Classifier
from toybox.scenes.toys import Look

BATCH = 4


@dataclass(frozen=True)
class Task:
    """Pictures of some assets of a learned folder, in the preset boxes or without any.

    The first has the seed ``seed``, every next one the next.
    """

    name: str
    assets: tuple[int, ...]
    has_boxes: bool
    images: int
    seed: int = 0


class TaskPainter:
    """Paints the tasks of one learned folder, whose model it keeps in memory.

    Args:
        folder: the learned folder.
        looks: of all instances of its photo.
        settings: of synthesis, by name, in place of its defaults.
    """

    def __init__(
        self,
        folder: Path,
        looks: Sequence[Look],
        classifier: Classifier,
        device: str,
        settings: dict | None = None,
    ):
        self.folder, self.looks, self.classifier, self.device = folder, looks, classifier, device
        self._settings = settings or {}
        self._base = None

    def scene(self, task: Task) -> Scene:
        """The checked request of a task."""
        config = SynthesisConfig.from_settings(
            models_dir=str(self.folder.parent), model_id=self.folder.name,
            prompt=view_prompt(task.assets), seed=task.seed, num_images=task.images,
            box_control=task.has_boxes, **self._settings,
        )  # fmt: skip
        scene = make_scene(config, preset_boxes, device=self.device, base=self._base)
        self._base = scene.base
        return scene

    def run(self, task: Task, output: Path) -> dict:
        """Paint a task's pictures into a folder, and replace those that are there; its row.

        Returns a dict with

            prompt, seed; boxes [subjects][4], empty without box control
            pictures: paths below ``output``'s parent
            there: [pictures][instances of the photo] whether each is anywhere in the picture
            judged: [pictures][subjects] what is in each box, see ``experiments.judge.Judged``
        """
        scene = self.scene(task)
        text = prepare(scene)
        images: list[Image.Image] = []
        for start in range(0, task.images, BATCH):
            images += paint(scene, range(start, min(start + BATCH, task.images)), text)
        output.mkdir(parents=True, exist_ok=True)
        paths = [output / f"{index:02d}.png" for index in range(task.images)]
        for path, image in zip(paths, images, strict=True):
            with written_aside(path) as aside:
                image.save(aside, "PNG")
        judged = []
        if task.has_boxes:
            judged = [
                [
                    asdict(each)
                    for each in judge_boxes(
                        self.classifier, image, scene.boxes, task.assets, self.looks
                    )
                ]
                for image in images
            ]
        return {
            "task": task.name,
            "prompt": scene.config.prompt,
            "assets": list(task.assets),
            "seed": task.seed,
            "boxes": [[round(side, 4) for side in box] for box in scene.boxes],
            "pictures": [str(path.relative_to(output.parent)) for path in paths],
            "there": find_instances(self.classifier, images, self.looks).tolist(),
            "judged": judged,
        }
