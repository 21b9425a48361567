"""A small classifier of toys: which kinds are in a picture, how much of it, and of what hue.

It answers for every cell of 8×8 pixels, so that one network judges crops of 64 pixels and whole
scenes of 96, finds the toys in them, and compares them. ``python -m toybox.classifier.classifier`` trains
it on renders, in some ten minutes on one core, and saves its held-out accuracy beside the weights.

Axes: b batch, k kinds, r rows and c columns of cells.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import write_json, written_aside
from imagelab.io.folders import check_writable
from toybox.scenes.scenes import HUES, KINDS, draw_scene, render

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
CROP, SCENE, CELL = 64, 96, 8  # sides in pixels: a crop, a whole scene, a cell
_DRAWN = 128  # side at which training scenes are rendered
_PRESENT = 0.01  # share of a picture that a toy covers at least


@dataclass(frozen=True)
class ClassifierConfig:
    """Every number of the training."""

    seed: int = 0
    scenes: int = 4000
    steps: int = 1600
    batch: int = 32
    lr: float = 2e-3
    width: int = 96  # channels
    loose: tuple[float, float] = (0.7, 2.0)  # side of a view, in sides of a toy's sprite
    turned: float = 0.75  # share of views whose hues are turned by a random angle


class Reading(NamedTuple):
    """What the classifier sees.

    Attributes:
        areas: [b, k] share of the picture that each kind covers, in :data:`~toybox.scenes.scenes.KINDS`'
            order.
        hues: [b, k] hue of that kind's toys, in degrees.
        hue: [b] hue of all toys together, in degrees.
    """

    areas: Tensor
    hues: Tensor
    hue: Tensor

    def among(self, kinds: Sequence[str]) -> "Reading":
        """The same with no area for any kind but these: what it sees if there can be no other."""
        possible = torch.tensor([kind in kinds for kind in KINDS], device=self.areas.device)
        return self._replace(areas=self.areas * possible)

    def kind(self) -> Tensor:
        """[b] index of the kind that covers most."""
        return self.areas.argmax(dim=1)

    def present(self, count: int) -> list[set[str]]:
        """Names of the up to ``count`` kinds that cover most, and enough to be seen."""
        top = self.areas.topk(count, dim=1)
        return [
            {KINDS[index] for area, index in zip(*row, strict=True) if area > _PRESENT}
            for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def hue_distance(first: Tensor, second: Tensor) -> Tensor:
    """Angle between hues, in degrees from 0 to 180."""
    return ((first - second + 180) % 360 - 180).abs()


def hue_names(hues: Tensor) -> list[str]:
    """The nearest named hue of each, [b] in degrees."""
    named = torch.tensor(list(HUES.values()), dtype=hues.dtype, device=hues.device)
    nearest = hue_distance(hues[:, None], named).argmin(dim=1)
    return [list(HUES)[index] for index in nearest.tolist()]


def to_input(pictures: list[Image.Image], side: int) -> Tensor:
    """RGB pictures of any size as [b, 3, side, side] in [-1, 1].

    ``side`` is :data:`CROP` for crops around one toy, :data:`SCENE` for whole scenes.
    """
    resized = [np.asarray(p.convert("RGB").resize((side, side), Image.BILINEAR)) for p in pictures]
    return to_tensor(resized)


def to_tensor(pictures: Sequence) -> Tensor:
    """RGB pictures of one size as float [b, 3, h, w] in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Classifier(nn.Module):
    """Convolutions from pictures [b, 3, 8·r, 8·c] to cells."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 4, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            *(_Residual(width) for _ in range(3)),
            nn.GroupNorm(8, width),
            nn.SiLU(),
        )
        self.kinds = nn.Conv2d(width, 1 + len(KINDS), 1)  # the first is the background
        self.hue = nn.Conv2d(width, 2, 1)  # cosine and sine

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, 1 + k, r, c] and hue vectors [b, 2, r, c]."""
        hidden = self.body(pictures)
        return self.kinds(hidden), self.hue(hidden)

    @torch.inference_mode()
    def read(self, pictures: Tensor) -> Reading:
        """Kinds and hues in pictures, [b, 3, h, w] in [-1, 1] (see :func:`to_input`)."""
        answers = zip(*(self(part) for part in pictures.split(64)), strict=True)
        logits, vectors = (torch.cat(parts) for parts in answers)
        shares = logits.softmax(dim=1)[:, 1:].flatten(2)  # [b, k, n], n = r·c
        cosine, sine = torch.einsum("bkn,bvn->vbk", shares, vectors.flatten(2))
        hues = torch.atan2(sine, cosine).rad2deg() % 360
        hue = torch.atan2(sine.sum(1), cosine.sum(1)).rad2deg() % 360
        return Reading(shares.mean(dim=2), hues, hue)


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier, float32, on the CPU."""
    if not path.is_file():
        raise UserError(
            f"there are no weights at {path}; train them: "
            f"python -m toybox.classifier.classifier --output {path}"
        )
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    classifier = Classifier(weights["kinds.weight"].shape[1])
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------
# training


class Sample(NamedTuple):
    """A picture [h, w, 3] uint8 and its truth by cell: kinds [1 + k, r, c], hue [2, r, c]."""

    picture: np.ndarray
    kinds: np.ndarray
    hue: np.ndarray


class Scenes:
    """Rendered scenes, and random views of them."""

    def __init__(self, seed: int, count: int, toys: int | None = None):
        self.scenes, self.pictures, self.masks = [], [], []
        for index in tqdm(range(count), "scenes"):
            scene = draw_scene(np.random.default_rng((seed, index)), toys)
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
        sample = scenes.sample(index, box, CROP, turn, tuple(rng.uniform((0.7, 0.8), 1.1)))
        if rng.random() < 0.5:
            blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))
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
    """Adam with one cosine; the classifier after the last step."""
    torch.manual_seed(config.seed)
    classifier = Classifier(config.width)
    scenes = Scenes(config.seed, config.scenes)
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
    """Shares of right answers on ``count`` scenes of one toy, crops of it, and scenes of two."""
    scenes, pairs = Scenes(seed, count, toys=1), Scenes(seed + 1, count, toys=2)
    rng = np.random.default_rng(seed)
    boxes = [scenes.view(index, 0, rng, (0.9, 1.5)) for index in range(count)]
    crops = [p.crop(box) for p, box in zip(scenes.pictures, boxes, strict=True)]
    looks = [scene.toys[0].look for scene in scenes.scenes]
    result = {}
    for name, pictures, side in (("scene", scenes.pictures, SCENE), ("crop", crops, CROP)):
        seen = classifier.read(to_input(pictures, side))
        kinds = [KINDS[index] for index in seen.kind().tolist()]
        far = hue_distance(seen.hue, torch.tensor([float(look.hue) for look in looks]))
        result[f"{name}_kind"] = _share(kinds, [look.kind for look in looks])
        result[f"{name}_hue"] = _share(hue_names(seen.hue), [look.colour for look in looks])
        result[f"{name}_hue_error_degrees"] = far.mean().item()
    seen = classifier.read(to_input(pairs.pictures, SCENE))
    truth = [{placed.look.kind for placed in scene.toys} for scene in pairs.scenes]
    result["pair_kinds"] = _share(seen.present(2), truth)
    return result


def _share(found: list, truth: list) -> float:
    """Share of equal entries."""
    return sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m toybox.classifier.classifier",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path(WEIGHTS.name), help="weights to write")
    for name, value in asdict(ClassifierConfig()).items():
        if not isinstance(value, tuple):
            parser.add_argument(
                f"--{name}", type=type(value), default=value, help="default: %(default)s"
            )
    arguments = vars(parser.parse_args(argv))
    output = arguments.pop("output")
    with report_errors(parser):
        check_writable(output.parent, "output")
        output.parent.mkdir(parents=True, exist_ok=True)
        config = ClassifierConfig(**arguments)
        classifier = train(config)
        weights = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
        with written_aside(output) as aside:
            save_file(weights, aside)
        held_out = accuracy(load_classifier(output), config.seed + 999, 1000)
        record = {"train": asdict(config), "held_out": held_out}
        write_json(output.with_suffix(".json"), record)
        print(json.dumps(held_out, indent=2))


if __name__ == "__main__":
    main()
