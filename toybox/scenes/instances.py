"""Write instance folders: toys that look alike, in one picture, with exact masks.

Without ``--count`` the five folders of ``example/`` are written; with it, new ones from a seed.
A folder holds ``img.jpg``, ``mask0.png``, ``mask1.png``, …, ``instance.json``, which says what kind
of thing each toy is, as a person would, and ``scene.json``, which records how each looks; learning
never reads that. The hues lie halfway between the hues that have names, so that no caption toybox
was trained on describes these toys exactly: something is left to learn.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import write_json, written_aside
from imagelab.io.folders import check_writable
from imagelab.settings import check_within
from toybox.scenes.scenes import Scene, draw_scene, render
from toybox.scenes.toys import HUES, KINDS, Look

#: Hues halfway between neighbouring named ones, in degrees.
_NAMED = sorted(HUES.values())
BETWEEN = tuple(
    (low + high) / 2 % 360 for low, high in zip(_NAMED, [*_NAMED[1:], 360 + _NAMED[0]], strict=True)
)
#: Kinds that resemble one another.
FAMILIES = (
    ("car", "taxi", "van", "truck", "bus"),
    ("fish", "tropical_fish", "pufferfish", "shark"),
    ("lizard", "crocodile", "turtle", "frog"),
    ("bear", "cat", "dog", "fox"),
)
ALIKE = ("kind", "hue")
BOUNDS = {"count": (1, 100_000), "size": (32, 16_384)}  # in less pixels no toy can be seen


@dataclass(frozen=True)
class Example:
    """A folder of ``example/``: its toys from back to front, their ground, the layout's seed."""

    looks: tuple[Look, ...]
    ground: str | None
    seed: int


EXAMPLES = {
    "toy_car": Example(
        (Look("car", 199), Look("car", 247.5), Look("car", 149)), "on a wooden table", 0
    ),
    "balloon": Example((Look("balloon", 14), Look("balloon", 342.5)), "in the sky", 3),
    "fish": Example((Look("fish", 247.5), Look("fish", 300)), "on the sand", 3),
    "lizard": Example((Look("lizard", 86), Look("lizard", 149)), "on the road", 3),
    "creature": Example(
        (Look("bear", 300), Look("cat", 300, 0.85), Look("fox", 300, 0.85)), "on the grass", 2
    ),
}


def example_scene(example: Example) -> Scene:
    """The scene of a folder of ``example/``."""
    scene = draw_scene(np.random.default_rng(example.seed), len(example.looks))
    return with_looks(replace(scene, ground=example.ground), example.looks)


def look_alikes(
    rng: np.random.Generator,
    count: int,
    alike: str | None = None,
    kinds: Sequence[str] = KINDS,
    apart: tuple[float, float] | None = None,
) -> tuple[Look, ...]:
    """Invent ``count`` toys that differ in little, of some of the ``kinds``.

    ``alike`` is what they share: ``"kind"`` (their hues are neighbours) or ``"hue"`` (their kinds
    are of one of the :data:`FAMILIES`); None draws one that is possible. Hues are neighbours in
    :data:`BETWEEN`, or begin anywhere and lie ``apart``, between so many degrees. Saturation and
    value differ by up to a fifth.
    """
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"there is no toy of kind {min(unknown)!r}; choose from {', '.join(KINDS)}")
    if not 1 <= count <= 3:
        raise UserError(f"a folder cannot have {count} instances; ask for 1, 2 or 3")
    families = [[kind for kind in family if kind in kinds] for family in FAMILIES]
    families = [family for family in families if len(family) >= count]
    if alike == "hue" and not families:
        raise UserError(
            f"no {count} of the kinds {', '.join(kinds)} resemble one another; "
            "give more --kinds or --alike kind"
        )
    if alike is None:
        alike = str(rng.choice(ALIKE)) if families else "kind"
    hues = _neighbours(rng, count, apart)
    if alike == "kind":
        chosen = [str(rng.choice(list(kinds)))] * count
    else:
        family = families[rng.integers(len(families))]
        chosen = [str(kind) for kind in rng.permutation(family)[:count]]
        hues = hues[:1] * count
    gains = rng.uniform(0.8, 1.0, (count, 2)).round(2)
    return tuple(
        Look(kind, hue, float(saturation), float(value))
        for kind, hue, (saturation, value) in zip(chosen, hues, gains, strict=True)
    )


def _neighbours(
    rng: np.random.Generator, count: int, apart: tuple[float, float] | None
) -> list[float]:
    """Hues in degrees, each next to the one before."""
    if apart is None:
        first = int(rng.integers(len(BETWEEN)))
        return [BETWEEN[(first + i) % len(BETWEEN)] for i in range(count)]
    steps = [rng.uniform(0, 360), *rng.uniform(*apart, count - 1)]
    return [round(round(float(hue), 1) % 360, 1) for hue in np.cumsum(steps)]


def with_looks(scene: Scene, looks: tuple[Look, ...]) -> Scene:
    """A scene whose toys look otherwise, in the same places."""
    toys = zip(scene.toys, looks, strict=True)
    return replace(scene, toys=tuple(replace(placed, look=look) for placed, look in toys))


def write_folder(
    folder: Path, scene: Scene, seed: int, size: int = 512, overwrite: bool = False
) -> None:
    """Write ``img.jpg`` (RGB), ``mask{i}.png`` (0 or 255), ``instance.json`` and ``scene.json``.

    An existing folder is an error unless ``overwrite``; then these files are replaced, surplus
    masks are removed, and whatever else lies there stays.
    """
    check_target(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    picture, masks = render(scene, size)
    description = {"size": size, "seed": seed, "ground": scene.ground}
    description["instances"] = [asdict(placed) for placed in scene.toys]

    def put(name: str, write) -> None:
        with written_aside(folder / name) as aside:
            write(aside)

    put("img.jpg", lambda path: picture.save(path, "JPEG", quality=95))
    for index, mask in enumerate(masks):
        image = Image.fromarray(mask.astype(np.uint8) * 255)
        put(f"mask{index}.png", lambda path, image=image: image.save(path, "PNG", optimize=True))
    classes = [placed.look.kind.replace("_", " ") for placed in scene.toys]
    alike = len(set(classes)) == 1
    write_json(folder / "instance.json", {"class": classes[0] if alike else classes})
    write_json(folder / "scene.json", description)
    for path in folder.glob("mask*.png"):
        if path.stem[4:].isdigit() and int(path.stem[4:]) >= len(masks):
            path.unlink()


def check_target(folder: Path, overwrite: bool) -> None:
    """Raises UserError where an instance folder exists already, or cannot be written."""
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists already; choose another --output or add --overwrite")
    check_writable(folder, "output")


def read_looks(folder: Path) -> list[Look]:
    """How the toys of a folder look, in the order of their masks."""
    description = json.loads((folder / "scene.json").read_text(encoding="utf-8"))
    return [Look(**placed["look"]) for placed in description["instances"]]


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m toybox.scenes.instances", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("example"), help="where they go")
    parser.add_argument("--size", type=int, default=512, help="side of a picture in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace folders that exist")
    new = parser.add_argument_group("new folders instead of the examples")
    new.add_argument("--count", type=int, help="how many, named set000, set001, …")
    new.add_argument("--seed", type=int, default=0, help="fixes looks and places")
    new.add_argument("--instances", type=int, choices=(1, 2, 3), help="a folder (default: 2 or 3)")
    new.add_argument("--alike", choices=ALIKE, help="what they share (default: either)")
    new.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help="to choose from (default: all)"
    )
    return parser, parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that make no sense."""
    if args.count is None and (args.seed or args.instances or args.alike or args.kinds):
        raise UserError("the five examples are fixed; add --count to write new folders")
    check_within(vars(args), BOUNDS)
    if args.count is not None:
        from imagelab.training.seeds import check_seed  # which takes its time: it imports torch

        check_seed(args.seed)


def scenes_to_write(args: argparse.Namespace) -> dict[str, tuple[Scene, int]]:
    """Folder name → scene and seed."""
    if args.count is None:
        return {name: (example_scene(made), made.seed) for name, made in EXAMPLES.items()}
    scenes = {}
    for index in range(args.count):
        rng = np.random.default_rng((args.seed, index))
        count = args.instances or int(rng.integers(2, 4))
        looks = look_alikes(rng, count, args.alike, args.kinds or KINDS)
        scenes[f"set{index:03d}"] = with_looks(draw_scene(rng, len(looks)), looks), args.seed
    return scenes


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with report_errors(parser):
        check_options(args)
        scenes = scenes_to_write(args)
        for name in scenes:
            check_target(args.output / name, args.overwrite)
        for name, (scene, seed) in scenes.items():
            write_folder(args.output / name, scene, seed, args.size, args.overwrite)
            looks = (f"{toy.look.kind} {toy.look.hue:g}°" for toy in scene.toys)
            print(f"{args.output / name}: {', '.join(looks)}")


if __name__ == "__main__":
    main()
