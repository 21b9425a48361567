"""Evidence: do the pictures show the right instance in the right box?

The cases of :mod:`imagelab.evaluation`: learned folders, each with each prompt, painted as
semantic_synthesis.py does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

import mifo
from imagelab.boxes import Box
from imagelab.errors import UserError, shorten
from imagelab.evaluation import runner
from imagelab.evaluation.features import FeatureSpace, load_features
from imagelab.evaluation.measures import mask_crops, outside_of
from imagelab.evaluation.runner import Case
from imagelab.io.folders import check_name
from imagelab.models.device import choose_precision
from mifo.learned import Learned, learned_names, read_learned_folder
from mifo.learning.instance import Instance, read_instance
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.kept import KeptModel
from mifo.synthesis.layouts import GetBoxes
from mifo.synthesis.paint import paint, prepare
from mifo.synthesis.placing import check_placed, place_boxes
from mifo.synthesis.scene import (
    NEGATIVE,
    asset_names,
    check_numbers,
    lay_out,
    read_grid,
    settle_synthesis,
)
from mifo.tokens import ASSET, asset_token, view_prompt

REFERENCE_SIDE = 512  # pixels of the short side of the photo that reference crops are cut from
#: Settings on which no picture depends, or that the index of the picture stands for.
IRRELEVANT = (
    "num_images", "batch_size", "models_dir", "output_path", "offline", "device", "lora_scale",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LearnedCase(Case):
    """A learned folder with one prompt; ``config``: how its pictures are painted."""

    learned: Learned
    config: SynthesisConfig


def list_learned(models_dir: Path, names: Sequence[str]) -> list[str]:
    """The learned folders of these names; ``all`` stands for every one there is."""
    if list(names) != ["all"]:
        for name in names:
            check_name(name, "model_id")
        return list(dict.fromkeys(names))
    found = learned_names(models_dir)
    if not found:
        raise UserError(f"--model_id all: {models_dir} holds no learned folder; give --models_dir")
    return found


def choose_spaces(
    specs: Sequence[str], cases: Sequence[LearnedCase], offline: bool = False
) -> list[FeatureSpace]:
    """The feature spaces of --features; without any, toybox's for what was learned with toybox."""
    if not specs and {case.learned.base_source for case in cases} == {"toybox"}:
        specs = ["toybox"]
    if not specs:
        raise UserError(
            "not all of these were learned with toybox itself: give --features, such as clip "
            "dinov2, or toybox for another model of toys"
        )
    names = [spec.partition("=")[0] for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"--features {' '.join(specs)} names one twice; give each once")
    return [load_features(spec, offline) for spec in specs]


# ----------------------------------------------------------------------------------------------
# cases


def plan_cases(
    config: SynthesisConfig,
    model_ids: Sequence[str],
    prompts: Sequence[str],
    folder_path: str | None,
    get_boxes: GetBoxes,
    boxes: Sequence[Box] | None = None,
) -> list[LearnedCase]:
    """All pairs of learned folders and prompts, checked; without prompts, all assets at once.

    Args:
        config: how pictures are painted; each case puts in its model_id and prompt.
        folder_path: folder of the instance folders; None: the one that was learned from.
        get_boxes: the layout of so many assets, where ``boxes`` is None.
        boxes: of each prompt's assets, in its order; the same for all prompts.

    Raises:
        UserError: something is missing, or a photo is not the one that was learned from.
    """
    check_numbers(config)
    cases = []
    for model_id in model_ids:
        learned = read_learned_folder(Path(config.models_dir) / model_id)
        instance = _instance(learned, folder_path)
        named = replace(config, model_id=model_id)
        settled, _ = settle_synthesis(named, learned, config.runtime.offline)
        asset_names(config.negative_prompt, learned, NEGATIVE)
        grid = read_grid(named, learned)
        for prompt in dict.fromkeys(prompts) or [view_prompt(tuple(learned.assets))]:
            own = _prompt_assets(prompt, learned)
            names = [asset_token(asset) for asset in own]
            layout = partial(lay_out, names, learned, get_boxes, grid or (1, 1))
            placed = tuple(place_boxes(names, boxes, layout))
            check_placed(placed, names, grid)
            outside_of(placed, (64, 64))  # layout is measured against some background
            full = replace(settled, prompt=prompt)
            cases.append(_case(full, learned, instance, own, placed))
    return cases


def _case(
    config: SynthesisConfig,
    learned: Learned,
    instance: Instance,
    own: tuple[int, ...],
    boxes: tuple[Box, ...],
) -> LearnedCase:
    photo = Image.fromarray(instance.image)
    return LearnedCase(
        name=config.model_id,
        prompt=config.prompt,
        caption=ASSET.sub("object", config.prompt),
        photo=photo,
        references=tuple(mask_crops(photo, instance.masks)),
        labels=tuple(map(asset_token, learned.assets)),
        own=own,
        boxes=boxes,
        seeds=tuple(range(config.seed, config.seed + config.picture_count)),
        about={
            "model_id": config.model_id,
            "box_control": config.box_control,
            "settings": learned.manifest["settings"],
        },
        learned=learned,
        config=config,
    )


def _instance(learned: Learned, folder_path: str | None) -> Instance:
    """The instance folder that a learned folder was learned from."""
    settings = learned.manifest["settings"]
    folder = Path(folder_path or settings["folder_path"]) / settings["instance"]
    labels = settings.get("mask_label", ())
    instance = read_instance(folder, REFERENCE_SIDE, 1, labels=labels)
    hashes = learned.manifest["image_sha256"], tuple(learned.manifest["mask_sha256"])
    if hashes != (instance.image_hash, instance.mask_hashes):
        raise UserError(
            f"{learned.where} was learned from another photo or other masks than {folder} holds; "
            "give the folder of its instance folder with --folder_path"
        )
    return instance


def _prompt_assets(prompt: str, learned: Learned) -> tuple[int, ...]:
    """Numbers of the assets that a prompt names, in its order."""
    names = asset_names(prompt, learned)
    if not names:
        raise UserError(
            f"the prompt {shorten(prompt)!r} must name assets of {learned.where}: "
            f"{', '.join(learned.tokens)}"
        )
    return tuple(learned.tokens.index(name) for name in names)


# ----------------------------------------------------------------------------------------------
# painting


def evaluate(
    cases: Sequence[LearnedCase], spaces: Sequence[FeatureSpace], output: Path, device: str
) -> list[list[dict]]:
    """Paint and measure every picture that has no record yet; the records of each case."""
    return runner.evaluate(cases, spaces, output, CasePainter(device))


class CasePainter:
    """The :class:`~imagelab.evaluation.runner.Painter` of learned folders.

    It keeps one model in memory, since the prompts of a learned folder follow each other.
    """

    def __init__(self, device: str):
        self.device = device
        self._model = KeptModel()

    def facts(self, case: LearnedCase, index: int) -> dict:
        """Everything, for JSON, that picture ``index`` depends on."""
        config = case.config
        precision = str(choose_precision(config.runtime.mixed_precision, self.device))
        settings = config.settings() | {"seed": case.seeds[index], "mixed_precision": precision}
        for name in IRRELEVANT:
            del settings[name]
        return {
            "settings": settings, "learned": case.learned.digest, "version": mifo.__version__
        }  # fmt: skip

    def paint(self, case: LearnedCase, indices: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Pictures of these indices, each with its index."""
        boxed = replace(case.config, box_control=True)
        scene = self._model.make_scene(boxed, None, case.boxes, self.device)
        if not case.config.box_control:
            scene = replace(scene, tokens=None)  # the boxes only say where to measure
        text = prepare(scene)
        size = case.config.runtime.batch_size
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            yield from zip(batch, paint(scene, batch, text), strict=True)
