"""Evidence: do the pictures show the right instance in the right box?

Pictures are painted with fixed seeds and measured one by one. Each leaves a JSON line in
``records.jsonl``, so that an evaluation that was stopped goes on where it was.

identity   a box's crop against the reference crops of all instances, in a feature space: a crop is
           right when it is nearest to its own instance; the margin is how much nearer
layout     objects are what differs in colour from the background outside the boxes; IoU of the
           bounding box of a box's object with the box
leakage    share of the objects' pixels outside all boxes
prompt     cosine of picture and text, in a space that has both
diversity  mean distance (1 − cosine) of the pictures of one prompt over seeds
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imagelab.boxes import Box
from imagelab.errors import UserError
from imagelab.evaluation.features import FeatureSpace, load_features
from imagelab.evaluation.measures import (
    crop,
    layout,
    objects_by_colour,
    outside_of,
    reference_crops,
)
from imagelab.io.atomic import written_aside
from imagelab.io.folders import check_name
from imagelab.models.device import choose_precision
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learned import Learned, learned_names, read_learned_folder
from mifo.learning.instance import Instance, read_instance
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.paint import Scene, asset_names, check_numbers, make_scene, paint, prepare
from mifo.tokens import ASSET, view_prompt

RECORDS = "records.jsonl"
PICTURES = "pictures"
REFERENCE_SIDE = 512  # pixels of the short side of the photo that reference crops are cut from


@dataclass(frozen=True)
class Case:
    """One learned folder with one prompt: what is painted, and what it is compared with."""

    learned: Learned
    config: SynthesisConfig
    instance: Instance
    assets: tuple[int, ...]  # of the prompt, in its order
    boxes: tuple[Box, ...]  # of these

    def key(self, index: int, spaces: Sequence[FeatureSpace], device: str) -> str:
        """What a record of picture ``index`` depends on, in short."""
        precision = str(choose_precision(self.config.mixed_precision, device))
        settings = asdict(self.config)
        settings |= {"seed": self.config.seed + index, "mixed_precision": precision}
        for name in ("num_images", "batch_size", "models_dir", "output_path", "offline", "device"):
            del settings[name]
        facts = [settings, self.boxes, self.learned.manifest, self.instance.image_hash]
        sources = [(space.name, space.source) for space in spaces]
        text = json.dumps([facts, sources], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    picture: Image.Image, case: Case, spaces: Sequence[FeatureSpace], references: dict[str, Tensor]
) -> dict:
    """Everything that is measured of one picture, for JSON.

    references: by the space's name, features of the reference crops [instances, d].
    """
    found: dict = {"own": list(case.assets), "spaces": {}}
    crops = [crop(picture, box) for box in case.boxes]
    for space in spaces:
        whole = (space.scenes or space.images)([picture])[0]
        inside = space.images(crops)
        result = {
            "similarities": (inside @ references[space.name].T).tolist(),
            "features": [round(value, 5) for value in whole.tolist()],
        }
        if space.text:
            result["prompt"] = (whole @ space.text(spoken(case.config.prompt))).item()
        found["spaces"][space.name] = result
    found["iou"], found["leakage"] = layout(objects_by_colour(picture, case.boxes), case.boxes)
    return found


def spoken(prompt: str) -> str:
    """A prompt in words that a text encoder knows: assets become "object"."""
    return ASSET.sub("object", prompt)


# ----------------------------------------------------------------------------------------------
# records


class Records:
    """The finished pictures by key, in a file of one JSON line each."""

    def __init__(self, path: Path):
        """Read what is there; a last line that was cut off is dropped."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self.found = {line["key"]: line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no record of an evaluation; move it away or give another --output_path"
            ) from error

    def add(self, record: dict) -> None:
        """One write, on the disk when this returns."""
        line = json.dumps(record).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self.found[record["key"]] = record


# ----------------------------------------------------------------------------------------------
# the run


def list_learned(models_dir: Path, names: Sequence[str]) -> list[str]:
    """The learned folders that are meant; ``all`` stands for every one there is."""
    if list(names) != ["all"]:
        for name in names:
            check_name(name, "model_id")
        return list(dict.fromkeys(names))
    found = learned_names(models_dir)
    if not found:
        raise UserError(f"--model_id all: {models_dir} holds no learned folder; give --models_dir")
    return found


def choose_spaces(
    specs: Sequence[str], cases: Sequence[Case], offline: bool = False
) -> list[FeatureSpace]:
    """The feature spaces that are asked for; unasked, toybox's for what was learned with it."""
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


def plan_cases(
    config: SynthesisConfig,
    model_ids: Sequence[str],
    prompts: Sequence[str],
    folder_path: str | None,
    get_boxes: Callable[[int], Sequence[Box]],
    boxes: Sequence[Box] | None = None,
) -> list[Case]:
    """All pairs of learned folders and prompts, checked; without prompts, all assets at once.

    Args:
        config: how pictures are painted; its model_id and prompt do not matter.
        folder_path: folder of the instance folders; None: the one that was learned from.
        get_boxes: preset layout for so many assets, where ``boxes`` is None.

    Raises:
        UserError: something is not there, or a photo is not the one that was learned from.
    """
    check_numbers(config)
    cases = []
    for model_id in model_ids:
        learned = read_learned_folder(Path(config.models_dir) / model_id)
        instance = _instance(learned, folder_path)
        for prompt in prompts or [view_prompt(tuple(learned.assets))]:
            assets = _prompt_assets(prompt, learned)
            placed = tuple(boxes or get_boxes(len(assets)))
            if len(placed) != len(assets):
                raise UserError(
                    f"there are {len(placed)} boxes and {len(assets)} assets in the prompt "
                    f"{prompt!r}; give one box for each"
                )
            outside_of(placed, (64, 64))  # there has to be some background
            full = replace(config, model_id=model_id, prompt=prompt)
            cases.append(Case(learned, full, instance, assets, placed))
    return cases


def _instance(learned: Learned, folder_path: str | None) -> Instance:
    """What a learned folder was learned from."""
    settings = learned.manifest["settings"]
    folder = Path(folder_path or settings["folder_path"]) / settings["instance"]
    instance = read_instance(folder, REFERENCE_SIDE, 1)
    hashes = learned.manifest["image_sha256"], tuple(learned.manifest["mask_sha256"])
    if hashes != (instance.image_hash, instance.mask_hashes):
        raise UserError(
            f"{learned.where} was learned from another photo or other masks than {folder} holds; "
            "give the folder of its instance folder with --folder_path"
        )
    return instance


def _prompt_assets(prompt: str, learned: Learned) -> tuple[int, ...]:
    """The assets that a prompt names, in its order."""
    names = asset_names(prompt, learned)
    if not names:
        raise UserError(
            f"the prompt {prompt!r} must name assets of {learned.where}: "
            f"{', '.join(learned.tokens)}"
        )
    return tuple(learned.tokens.index(name) for name in names)


def evaluate(
    cases: Sequence[Case], spaces: Sequence[FeatureSpace], output: Path, device: str
) -> list[list[dict]]:
    """Paint and measure every picture that has no record yet; the records of each case."""
    records = Records(output / RECORDS)
    keys = [[case.key(i, spaces, device) for i in range(case.config.num_images)] for case in cases]
    done = sum(key in records.found for row in keys for key in row)
    learned = scene = None
    (output / PICTURES).mkdir(exist_ok=True)
    with tqdm(total=sum(map(len, keys)), initial=done, desc="pictures", unit="picture") as bar:
        for case, row in zip(cases, keys, strict=True):
            missing = [index for index, key in enumerate(row) if key not in records.found]
            if not missing:  # no model is loaded for none
                continue
            if case.learned is not learned:  # its prompts follow each other
                learned, scene = case.learned, None  # one model in memory at a time
            scene = _scene(case, device, scene and scene.base)
            references = {s.name: s.images(reference_crops(case.instance)) for s in spaces}
            for index, picture in _painted(scene, missing):
                path = output / PICTURES / f"{case.config.model_id}-{row[index]}.png"
                with written_aside(path) as aside:
                    picture.save(aside, "PNG")
                facts = {"key": row[index], "model_id": case.config.model_id, "picture": path.name}
                facts |= {"prompt": case.config.prompt, "seed": case.config.seed + index}
                records.add(facts | measure(picture, case, spaces, references))
                bar.update(1)
    return [[records.found[key] for key in row] for row in keys]


def _scene(case: Case, device: str, base: StableDiffusion | None) -> Scene:
    """What is painted of a case; ``base``: the model with what was learned, if it is there."""
    boxed = replace(case.config, box_control=True)
    scene = make_scene(boxed, None, case.boxes, device=device, base=base)
    # Without box control, the boxes are only where it is measured.
    return scene if case.config.box_control else replace(scene, tokens=None)


def _painted(scene: Scene, indices: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """The pictures of these indices."""
    text = prepare(scene)
    size = scene.config.batch_size
    for start in range(0, len(indices), size):
        batch = indices[start : start + size]
        yield from zip(batch, paint(scene, batch, text), strict=True)
