"""Train the classifier of toys on renders: python -m toybox.classifier.train.

It takes some ten minutes on one core, and saves the held-out accuracy beside the weights.
"""

import json
import os
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import write_json, written_aside
from imagelab.io.folders import check_writable
from imagelab.settings import check_within
from imagelab.training.seeds import check_seed
from toybox.classifier.network import (
    CELL,
    CROP,
    GROUPS,
    SCENE,
    WEIGHTS,
    Classifier,
    hue_distance,
    hue_names,
    load_classifier,
    to_input,
    to_tensor,
)
from toybox.scenes.scenes import draw_scene, render
from toybox.scenes.toys import KINDS

_DRAWN = 128  # side in pixels at which scenes are rendered
BOUNDS = {
    "scenes": (1, 10_000_000),
    "steps": (1, 10_000_000),
    "batch": (1, 100_000),
    "lr": (0.0, 1.0),
    "width": (GROUPS, 4096),
    "turned": (0.0, 1.0),
    "flooded": (0.0, 1.0),
}


@dataclass(frozen=True)
class ClassifierConfig:
    """Every number of the training."""

    seed: int = 0
    scenes: int = 6000
    steps: int = 6000
    batch: int = 32
    lr: float = 2e-3
    width: int = 96  # channels
    loose: tuple[float, float] = (0.7, 2.5)  # side of a view, in sides of a toy's sprite
    turned: float = 0.75  # share of views whose hues are turned by a random angle
    flooded: float = 0.5  # share of scenes on a flat ground of any colour, however strong


class Sample(NamedTuple):
    """A picture [h, w, 3] uint8 and its truth by cell: kinds [1 + k, r, c], hue [2, r, c]."""

    picture: np.ndarray
    kinds: np.ndarray
    hue: np.ndarray


class Scenes:
    """Rendered scenes, and random views of them.

    ``flooded``: share of those whose ground is flat and of any colour. Grounds of
    :func:`~toybox.scenes.scenes.draw_scene` are paler than those that guidance paints.
    """

    def __init__(self, seed: int, count: int, toys: int | None = None, flooded: float = 0.0):
        self.scenes, self.pictures, self.masks = [], [], []
        for index in tqdm(range(count), "scenes"):
            rng = np.random.default_rng((seed, index))
            scene = draw_scene(rng, toys)
            if rng.random() < flooded:
                scene = replace(scene, ground=None, colour=any_colour(rng))
            picture, masks = render(scene, _DRAWN)
            self.scenes.append(scene)
            self.pictures.append(picture)
            self.masks.append(masks)

    def view(self, index: int, toy: int, rng: np.random.Generator, loose: tuple[float, float]):
        """A square box around a toy, off centre, in pixels; ``loose``: sides in sprites."""
        placed = self.scenes[index].toys[toy]
        width = min(1.0, placed.size * np.exp(rng.uniform(*np.log(loose))))
        shift = rng.uniform(-0.15, 0.15, 2) * placed.size
        left, top = np.clip([placed.x, placed.y] + shift - width / 2, 0, 1 - width)
        return tuple(float(v * _DRAWN) for v in (left, top, left + width, top + width))

    def sample(self, index: int, box, side: int = CROP, turn=0.0, gains=(1.0, 1.0)) -> Sample:
        """A view of ``side`` pixels; hues turned (degrees), saturation and value multiplied."""
        picture = self.pictures[index].resize((side, side), Image.BILINEAR, box=box)
        cells = (side // CELL, side // CELL)
        if turn or gains != (1.0, 1.0):
            hsv = np.asarray(picture.convert("HSV")).astype(np.float32)
            hsv[..., 0] = (hsv[..., 0] + turn / 360 * 255) % 255
            hsv[..., 1:] *= gains
            hsv = np.rint(hsv.clip(0, 255)).astype(np.uint8)
            picture = Image.fromarray(hsv, "HSV").convert("RGB")
        kinds = np.zeros((1 + len(KINDS), *cells), dtype=np.float32)
        hue = np.zeros((2, *cells), dtype=np.float32)
        for placed, mask in zip(self.scenes[index].toys, self.masks[index], strict=True):
            grey = Image.fromarray(mask.astype(np.uint8) * 255)
            share = np.asarray(grey.resize(cells, Image.BOX, box=box)) / np.float32(255)
            angle = np.deg2rad(placed.look.hue + turn)
            kinds[1 + KINDS.index(placed.look.kind)] += share
            hue += share * np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)[:, None, None]
        kinds[0] = 1 - kinds.sum(axis=0)
        return Sample(np.asarray(picture), kinds, hue)


def any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Any hue, grey to pure, half dark to bright."""
    colour = hsv_to_rgb(rng.random(), rng.random(), rng.uniform(0.5, 1))
    return tuple(round(255 * value) for value in colour)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures in [-1, 1] and the truths, each [b, ...]."""
    pictures, kinds, hue = zip(*samples, strict=True)
    return to_tensor(pictures), *(torch.from_numpy(np.stack(part)) for part in (kinds, hue))


def augmented(scenes: Scenes, config: ClassifierConfig, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of a step: views turned in hue, some blurred, all a little noisy."""
    rng = np.random.default_rng((config.seed, step))
    samples = []
    for index in rng.integers(len(scenes.scenes), size=config.batch):
        toy = int(rng.integers(len(scenes.scenes[index].toys)))
        box = scenes.view(index, toy, rng, config.loose)
        turn = rng.uniform(0, 360) if rng.random() < config.turned else 0.0
        gains = tuple(rng.uniform((0.7, 0.8), (1.3, 1.1)))
        sample = scenes.sample(index, box, CROP, turn, gains)
        if rng.random() < 0.5:
            blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 2.0))
            picture = Image.fromarray(sample.picture).filter(blur)
            sample = sample._replace(picture=np.asarray(picture))
        samples.append(sample)
    pictures, kinds, hue = collate(samples)
    noise = rng.uniform(0, 0.1) * rng.standard_normal(pictures.shape, dtype=np.float32)
    return pictures + torch.from_numpy(noise), kinds, hue


def classifier_loss(logits: Tensor, vectors: Tensor, kinds: Tensor, hue: Tensor) -> Tensor:
    """Cross-entropy with the shares of the cells, plus the hue vectors' error where toys are."""
    toy = 1 - kinds[:, 0]
    error = ((toy[:, None] * vectors - hue) ** 2).sum(dim=1)
    return -(kinds * logits.log_softmax(dim=1)).sum(dim=1).mean() + error.sum() / toy.sum()


def train(config: ClassifierConfig) -> Classifier:
    """The classifier after the last step.

    AdamW with OneCycle: the rate rises over the first 30% of the steps, and falls over the others,
    both as cosines.
    """
    torch.manual_seed(config.seed)
    classifier = Classifier(config.width)
    scenes = Scenes(config.seed, config.scenes, flooded=config.flooded)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    progress = tqdm(range(config.steps), "classifier")
    for step in progress:
        pictures, kinds, hue = augmented(scenes, config, step)
        logits, vectors = classifier(pictures)
        loss = classifier_loss(logits, vectors, kinds, hue)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return classifier.eval().requires_grad_(False)


def accuracy(classifier: Classifier, seed: int, count: int) -> dict[str, float]:
    """Shares of right answers on ``count`` scenes of one toy, crops of it, and scenes of two.

    ``flooded_crop``: crops of one toy on flat grounds of any colour.
    """
    scenes, pairs = Scenes(seed, count, toys=1), Scenes(seed + 1, count, toys=2)
    result = _of_one_toy(classifier, scenes, seed, {"scene": SCENE, "crop": CROP})
    flooded = Scenes(seed + 2, count, toys=1, flooded=1)
    result |= _of_one_toy(classifier, flooded, seed, {"flooded_crop": CROP})
    seen = classifier.read(to_input(pairs.pictures, SCENE))
    truth = [{placed.look.kind for placed in scene.toys} for scene in pairs.scenes]
    result["pair_kinds"] = _share(seen.present(2), truth)
    return result


def _of_one_toy(
    classifier: Classifier, scenes: Scenes, seed: int, sides: dict[str, int]
) -> dict[str, float]:
    """Kinds and hues of whole scenes, which are to have the side SCENE, or of crops."""
    rng, count = np.random.default_rng(seed), len(scenes.scenes)
    boxes = [scenes.view(index, 0, rng, (0.9, 1.5)) for index in range(count)]
    crops = [p.crop(box) for p, box in zip(scenes.pictures, boxes, strict=True)]
    looks = [scene.toys[0].look for scene in scenes.scenes]
    result = {}
    for name, side in sides.items():
        pictures = scenes.pictures if side == SCENE else crops
        seen = classifier.read(to_input(pictures, side))
        kinds = [KINDS[index] for index in seen.kind().tolist()]
        far = hue_distance(seen.hue, torch.tensor([float(look.hue) for look in looks]))
        result[f"{name}_kind"] = _share(kinds, [look.kind for look in looks])
        result[f"{name}_hue"] = _share(hue_names(seen.hue), [look.colour for look in looks])
        result[f"{name}_hue_error_degrees"] = far.mean().item()
    return result


def _share(found: list, truth: list) -> float:
    """Share of equal entries."""
    return sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)


def check(config: ClassifierConfig, output: Path, overwrite: bool) -> None:
    """Raises UserError for settings that make no sense, and where the weights cannot be written."""
    check_seed(config.seed)
    check_within(asdict(config), BOUNDS)
    if config.width % GROUPS:
        raise UserError(f"--width is {config.width}; give a multiple of {GROUPS}")
    if output.suffix != WEIGHTS.suffix:
        raise UserError(f"--output is {output}; give a file that ends in {WEIGHTS.suffix}")
    check_writable(output.absolute().parent, "output")
    for path in (output, record_of(output)):
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a file; give another --output")
        if os.path.lexists(path) and not overwrite:
            raise UserError(
                f"{path} is there already; replace it with --overwrite, or give another --output"
            )


def record_of(weights: Path) -> Path:
    """Where the record of a training lies: beside the weights."""
    return weights.with_suffix(".json")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m toybox.classifier.train",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path(WEIGHTS.name), help="weights to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace weights, and their record, that are there"
    )
    for name, value in asdict(ClassifierConfig()).items():
        if not isinstance(value, tuple):
            parser.add_argument(
                f"--{name}", type=type(value), default=value, help="default: %(default)s"
            )
    arguments = vars(parser.parse_args(argv))
    output, overwrite = arguments.pop("output"), arguments.pop("overwrite")
    with report_errors(parser):
        config = ClassifierConfig(**arguments)
        check(config, output, overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        classifier = train(config)
        weights = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
        with written_aside(output) as aside:
            save_file(weights, aside)
        held_out = accuracy(load_classifier(output), config.seed + 999, 1000)
        record = {"train": asdict(config), "held_out": held_out}
        write_json(record_of(output), record)
        print(json.dumps(held_out, indent=2))


if __name__ == "__main__":
    main()
