"""MIFO for people: learn a folder, load what was learned, paint; a notebook shows the results."""

import html
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

from PIL import Image

from imagelab.boxes import Box, draw_boxes, parse_box
from imagelab.cli import random_seed_if_none
from imagelab.errors import UserError, memory_errors
from imagelab.io.atomic import readable
from imagelab.io.pictures import Tile, contact_sheet, encode_png, next_number
from imagelab.models.device import choose_device
from mifo.learned import read_manifest
from mifo.learning.checks import check_target
from mifo.learning.config import LearningConfig
from mifo.learning.places import target_folder
from mifo.learning.plan import make_plan
from mifo.learning.resume import resumed
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.kept import KeptModel
from mifo.synthesis.layouts import preset_boxes
from mifo.synthesis.paint import describe, paint_all, prepare, save_painting
from mifo.synthesis.scene import check_numbers

#: A box: four numbers, a text such as "10%,20%,50%,60%", or an object of an annotation tool.
AnyBox = Sequence[float] | str | Mapping
SHEET_SIDE = 256  # pixels of a picture in a notebook
#: Options of the commands that are no settings from Python, and what stands for them.
NOT_OF_LEARNING = dict.fromkeys(
    ("instance", "folder_path"), "the first argument is the instance folder"
)
NOT_OF_PAINTING = {
    "output_path": "save the pictures with save(folder)",
    **dict.fromkeys(("model_id", "models_dir"), "get another learned folder with mifo.load"),
}


def learn(
    folder: str | Path,
    *,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings,
) -> "LearnedInstance":
    """Learn the instances of one photo; the options of semantic_learning.py, as a function.

    Args:
        folder: the instance folder, with ``img.jpg`` and ``mask0.png``, ``mask1.png``, …
        seed: fixes every random draw; None draws one, which the manifest keeps.
        resume: go on with an unfinished run.
        overwrite: replace an earlier result.
        settings: any field of :class:`~mifo.learning.config.LearningConfig` or of its parts, such
            as ``model_path="toybox"``, ``output_dir="mine"``, ``train_steps=600``.

    Returns:
        What was learned; it is also in ``output_dir/<name of the folder>``.

    Raises:
        UserError: something does not fit, with what to do. Nothing has been written then.
        KeyboardInterrupt: Ctrl-C; the run is saved, ``resume=True`` goes on with it.
    """
    from mifo.learning.run import learn as run

    _refuse(settings, NOT_OF_LEARNING)
    folder = Path(folder)
    if not folder.name or folder.name == "..":  # such as ".": its name is needed
        folder = folder.resolve()
    places = {"folder_path": str(folder.parent), "instance": folder.name}
    config = LearningConfig.from_settings(**settings, **places, seed=seed)
    check_target(config, resume, overwrite)
    if resume:
        config = resumed(config)
    elif seed is None:
        config = replace(config, seed=random_seed_if_none(None))
    run(make_plan(config, choose_device(config.runtime.device)), resume, overwrite=overwrite)
    return LearnedInstance(target_folder(config))


def load(name: str | Path, models_dir: str | Path = "Model_ours") -> "LearnedInstance":
    """What was learned before, by its name in ``models_dir`` or by the path of its folder.

    Raises UserError where there is no such learned folder.
    """
    path = Path(name)
    return LearnedInstance(path if len(path.parts) > 1 else Path(models_dir) / path)


class LearnedInstance:
    """The assets of one photo, ready to paint. A notebook shows their attention and the curves.

    Attributes:
        folder: the learned folder.
        manifest: how it was learned.
        tokens: names of the assets, for prompts.
        separation: of each asset's attention on the instances, the share on its own, 0 to 1.
        painted: the pictures of the last :meth:`paint` so far, which Ctrl-C or a failure leaves.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.tokens: list[str] = self.manifest["tokens"]
        self.separation: list[float] = self.manifest["separation"]
        self.painted = Paintings(())
        self._model = KeptModel()

    @property
    def curves(self) -> Image.Image:
        """The losses over the steps."""
        return Image.open(readable(self.folder) / "learning.png")

    @property
    def attention(self) -> Image.Image:
        """Each asset's attention over the photo, beside its mask."""
        return Image.open(readable(self.folder) / "attention.png")

    def paint(
        self,
        prompt: str,
        boxes: Mapping[str, AnyBox | Sequence[AnyBox]] | Sequence[AnyBox] | None = None,
        *,
        seed: int | None = None,
        num_images: int = 1,
        box_format: str | None = None,
        **settings,
    ) -> "Paintings":
        """Paint a prompt that names assets, each inside its box.

        Args:
            prompt: such as ``"a photo of <asset0> and <asset1> in the snow"``.
            boxes: by asset, one box or a list of boxes where the prompt names it several times; or
                a list in the order of the prompt; None: a preset layout. A box is x0, y0, x1, y1
                in fractions from the top left; see docs/boxes.md for others.
            seed: picture i has the seed ``seed + i``; None draws one.
            num_images: how many pictures.
            box_format: what four numbers of a box are: "corners", "xywh" or "cxcywh".
            settings: any field of :class:`~mifo.synthesis.config.SynthesisConfig` or of its parts,
                such as ``guidance_scale=3``, ``width=768``, ``box_control=False``.

        Raises:
            UserError: something does not fit, with what to do.
            FloatingPointError: a number was not finite.
            MemoryError: there was not enough memory, on the device or off it.
            KeyboardInterrupt: Ctrl-C; the pictures that are done are in ``painted``.
        """
        _refuse(settings, NOT_OF_PAINTING)
        config = SynthesisConfig.from_settings(
            **settings, prompt=prompt, num_images=num_images, seed=random_seed_if_none(seed),
            models_dir=str(self.folder.parent), model_id=self.folder.name,
        )  # fmt: skip
        device = choose_device(config.runtime.device)
        size = (config.width, config.height) if config.width and config.height else None
        check_numbers(config)
        placed = _parse_boxes(boxes, size, box_format)
        with memory_errors():
            scene = self._model.make_scene(config, preset_boxes, placed, device)
            text = prepare(scene)
            self.painted = Paintings(())
            for index, image in paint_all(scene, range(config.picture_count), text):
                painting = Painting(image, scene.boxes, scene.names, describe(scene, index))
                self.painted = Paintings([*self.painted, painting])
        return self.painted

    def __repr__(self) -> str:
        scores = ", ".join(f"{score:.2f}" for score in self.separation)
        return f"LearnedInstance({str(self.folder)!r}: {', '.join(self.tokens)}; {scores})"

    def _repr_html_(self) -> str:
        shown = "".join(_img(picture) for picture in (self.attention, self.curves))
        return f"<p>{html.escape(repr(self))}</p>{shown}"


@dataclass(frozen=True)
class Painting:
    """One picture, with the boxes of its subjects and the facts that make it again."""

    image: Image.Image
    boxes: tuple[Box, ...]
    names: tuple[str, ...]
    facts: dict

    def with_boxes(self) -> Image.Image:
        """The picture with its boxes drawn over it."""
        return draw_boxes(self.image, self.boxes, self.names) if self.boxes else self.image

    def _repr_png_(self) -> bytes:
        return encode_png(self.with_boxes())


class Paintings(Sequence):
    """The pictures of one prompt. A notebook shows them side by side, with their boxes."""

    def __init__(self, paintings: Sequence[Painting]):
        self._paintings = tuple(paintings)

    def __len__(self) -> int:
        return len(self._paintings)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Paintings(self._paintings[index])
        return self._paintings[index]

    def sheet(self) -> Image.Image:
        """A contact sheet, with the boxes; a UserError where there is no picture."""
        if not self:
            raise UserError("there are no pictures yet; paint some first")
        tiles = [Tile(p.image, boxes=p.boxes, labels=p.names) for p in self._paintings]
        return contact_sheet(tiles, side=SHEET_SIDE)

    def save(self, folder: str | Path) -> list[Path]:
        """Write numbered PNGs with their facts beside them; no file is replaced. The paths."""
        folder = Path(folder)
        if folder.is_file():
            raise UserError(f"{folder} is a file; give the name of a folder")
        folder.mkdir(parents=True, exist_ok=True)
        first = next_number(folder)
        return [
            save_painting(folder, first + index, painting.image, painting.facts)
            for index, painting in enumerate(self._paintings)
        ]

    def _repr_png_(self) -> bytes | None:
        return encode_png(self.sheet()) if self else None


def _refuse(settings: Mapping[str, object], names: Mapping[str, str]) -> None:
    """Raises UserError for a setting of these names, with what stands for it."""
    for name, advice in names.items():
        if name in settings:
            raise UserError(f"{name} is no setting here; {advice}")


def _parse_boxes(
    boxes, size: tuple[int, int] | None, box_format: str | None
) -> list[Box] | dict[str, list[Box]] | None:
    """Boxes as make_scene takes them; ``size``: width and height, for boxes in pixels."""

    def parse_all(given) -> list[Box]:
        return [parse_box(box, size, box_format=box_format) for box in _list_boxes(given)]

    if boxes is None:
        return None
    if not isinstance(boxes, Mapping):
        return parse_all(boxes)
    return {name: parse_all(given) for name, given in boxes.items()}


def _list_boxes(given) -> list:
    """The boxes in a list of boxes, or in one box."""
    if isinstance(given, str | Mapping):
        return [given]
    try:
        given = list(given)
    except TypeError:
        raise UserError(f"{given!r} is no box; give x0, y0, x1, y1, or a list of boxes") from None
    return [given] if all(isinstance(part, Real) for part in given) else given


def _img(picture: Image.Image) -> str:
    """A picture as HTML."""
    return f'<img src="data:image/png;base64,{b64encode(encode_png(picture)).decode()}">'
