"""Looks and places of the toys in triplets: nothing overlaps, is cut off or melts into its ground.

All lengths are fractions of the picture's side.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from toybox.scenes.scenes import GROUNDS, Placement, Scene
from toybox.scenes.toys import HUES, KINDS, Look, toy

EDGE = 0.02  # between a toy's square and the picture's edge
GAP = 0.02  # between the squares of two toys
OTHER_SIZE = 0.08  # least difference of a toy in a reference and in the target
LEAST_GAIN = 0.8  # of saturation and value
APART = 45.0  # degrees between two hues that words or a judge tell apart
#: Sides of a toy's square, by how many toys there are.
SIZES = {1: (0.45, 0.75), 2: (0.34, 0.48), 3: (0.28, 0.40)}
CONTRAST = 50.0  # between a toy's mean colour and its ground's, of 442 in RGB
CUT_OUT = (0, 0, 0), (255, 255, 255)  # grounds of toys that are shown alone, as a mask leaves them


def hue_distance(first: float, second: float) -> float:
    """Degrees between two hues, from 0 to 180."""
    return abs((first - second + 180) % 360 - 180)


# ----------------------------------------------------------------------------------------------
# looks


def draw_look(rng: np.random.Generator, kind: str) -> Look:
    """A toy in any hue; half of the hues have names."""
    hue = list(HUES.values())[rng.integers(len(HUES))]
    if rng.random() < 0.5:
        hue = round(float(rng.uniform(0, 360)), 1) % 360
    gains = rng.uniform(LEAST_GAIN, 1, 2).round(2)
    return Look(kind, float(hue), *map(float, gains))


def named_look(rng: np.random.Generator, kind: str) -> Look:
    """A toy that words describe: in a named hue, at full strength."""
    return Look(kind, float(list(HUES.values())[rng.integers(len(HUES))]))


def draw_kinds(rng: np.random.Generator, count: int, other: Sequence[str] = ()) -> list[str]:
    """Different kinds, also from ``other``, none of which is called as a part of another is."""
    kinds: list[str] = []
    taken = {kind.split("_")[-1] for kind in other}
    for index in rng.permutation(len(KINDS)):
        name = KINDS[index].split("_")[-1]  # a tropical fish is a fish
        if len(kinds) < count and name not in taken:
            kinds.append(KINDS[index])
            taken.add(name)
    return kinds


def draw_looks(rng: np.random.Generator, count: int, alike: float = 0.2) -> list[Look]:
    """Looks of a scene's toys, of different kinds; a share ``alike`` of scenes repeats one.

    The toys of a repeated kind have named hues, which are :data:`APART`.
    """
    looks = [draw_look(rng, kind) for kind in draw_kinds(rng, count)]
    if count > 1 and rng.random() < alike:
        first = replace(looks[0], hue=named_look(rng, looks[0].kind).hue)
        hues = [float(hue) for hue in HUES.values() if hue_distance(hue, first.hue) >= APART]
        looks[:2] = first, replace(first, hue=hues[rng.integers(len(hues))])
    return looks


# ----------------------------------------------------------------------------------------------
# places


def is_inside(toy: Placement) -> bool:
    """Whether nothing of a toy is cut off."""
    low, high = toy.size / 2 + EDGE, 1 - toy.size / 2 - EDGE
    return low - 1e-9 <= min(toy.x, toy.y) and max(toy.x, toy.y) <= high + 1e-9


def clearance(toy: Placement, others: Sequence[Placement]) -> float:
    """The least distance between a toy's square and those of others; negative if they overlap."""
    return min(
        (max(abs(toy.x - o.x), abs(toy.y - o.y)) - (toy.size + o.size) / 2 for o in others),
        default=1.0,
    )


def fits(toy: Placement, others: Sequence[Placement]) -> bool:
    """Whether a toy is in the picture and away from others."""
    return is_inside(toy) and clearance(toy, others) >= GAP - 1e-9


def place_toys(
    rng: np.random.Generator,
    looks: Sequence[Look],
    sizes: tuple[float, float] | None = None,
    taken: Sequence[Placement] = (),
) -> tuple[Placement, ...]:
    """Random places of toys, away from each other and from ``taken`` ones.

    Their sizes shrink until all find room.
    """
    low, high = sizes or SIZES[len(looks)]
    while True:
        placed: list[Placement] = []
        for _ in range(30 * len(looks)):
            size = float(rng.uniform(low, high))
            x, y = map(float, rng.uniform(size / 2 + EDGE, 1 - size / 2 - EDGE, 2))
            toy = Placement(looks[len(placed)], x, y, size, bool(rng.random() < 0.5))
            if fits(toy, [*placed, *taken]):
                placed.append(toy)
            if len(placed) == len(looks):
                return tuple(placed)
        low, high = 0.95 * low, 0.95 * high


@lru_cache(maxsize=4096)
def mean_colour(look: Look) -> np.ndarray:
    """A toy's mean RGB, [3]."""
    pixels = np.asarray(toy(look, 64), dtype=np.float64)
    return pixels[pixels[..., 3] > 127, :3].mean(0)


def stands_out(scene: Scene) -> bool:
    """Whether each toy is of another colour than the ground."""
    ground = GROUNDS[scene.ground][0] if scene.ground else scene.colour
    return all(
        np.linalg.norm(mean_colour(placed.look) - ground) >= CONTRAST for placed in scene.toys
    )


def on_ground(
    rng: np.random.Generator, toys: Sequence[Placement], named: float, other: str | None = None
) -> Scene:
    """A scene of toys on a ground from which they stand out.

    It has a name, not ``other``, in a share ``named`` of scenes, or a flat colour.
    """
    names = [name for name in GROUNDS if name != other]
    while True:
        ground = names[rng.integers(len(names))] if rng.random() < named else None
        colour = tuple(int(level) for level in rng.integers(90, 246, 3))
        scene = Scene(tuple(toys), ground, colour, int(rng.integers(2**31)))
        if stands_out(scene):
            return scene


def draw_reference(rng: np.random.Generator, toy: Placement, ground: str | None) -> Scene:
    """A scene of a toy alone, in another size, on another ground and, half of the time, mirrored.

    A quarter of them stand on black or white, as toys that were cut out of a picture do.
    """
    while True:
        (placed,) = place_toys(rng, [toy.look])
        if abs(placed.size - toy.size) >= OTHER_SIZE:
            break
    scene = on_ground(rng, [placed], 0.6, other=ground)
    if rng.random() < 0.25:
        flat = replace(scene, ground=None, colour=CUT_OUT[rng.integers(2)])
        scene = flat if stands_out(flat) else scene
    return scene
