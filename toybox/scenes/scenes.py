"""Toy scenes with exact masks and captions, unlimited and reproducible from a seed.

A :class:`Scene` is a description in fractions of the picture, so that one scene renders at any
size: :func:`draw_scene` invents one, :func:`caption` words it, :func:`render` paints it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagelab.errors import UserError
from toybox.scenes.toys import HUES, KINDS, SPRITE_SIDE, Look, toy

COUNT_ODDS = (5, 3, 2)  # of one toy, two and three in a scene
#: Grounds that a caption can name: (phrase, base colour, amplitude and grain of its texture).
GROUNDS = {
    "on the grass": ((96, 158, 70), 26, (24, 24)),
    "in the snow": ((232, 238, 246), 10, (5, 5)),
    "on the sand": ((222, 196, 146), 14, (18, 18)),
    "on a wooden table": ((158, 108, 66), 22, (22, 3)),
    "in the sky": ((140, 192, 236), 26, (4, 3)),
    "on the road": ((112, 112, 118), 10, (26, 26)),
}


@dataclass(frozen=True)
class Placement:
    """A toy in a scene: centre (x, y) and side of its square sprite, as fractions; mirrored?"""

    look: Look
    x: float
    y: float
    size: float
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    """Toys from back to front, over a named ground or (``ground`` None) a flat colour."""

    toys: tuple[Placement, ...]
    ground: str | None
    colour: tuple[int, int, int]
    texture_seed: int


# ----------------------------------------------------------------------------------------------
# invention


def _placements(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Random (x, y, size) of toys that hardly touch; sizes shrink until all find room."""
    low, high = {1: (0.45, 0.75), 2: (0.36, 0.52), 3: (0.30, 0.42)}[count]
    while True:
        spots: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            size = rng.uniform(low, high)
            x, y = rng.uniform(size / 2, 1 - size / 2, 2)
            if all(max(abs(x - u), abs(y - v)) > 0.45 * (size + s) for u, v, s in spots):
                spots.append((float(x), float(y), float(size)))
            if len(spots) == count:
                return spots
        low, high = 0.9 * low, 0.9 * high


def distinct_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds without repetitions; a UserError unless they fill a scene of three toys."""
    distinct = tuple(dict.fromkeys(kinds))
    if len(distinct) < 3:
        raise UserError(f"scenes need three kinds of toys or more, not {', '.join(distinct)}")
    return distinct


def draw_scene(
    rng: np.random.Generator,
    count: int | None = None,
    kinds: Sequence[str] = KINDS,
    odds: Sequence[float] = COUNT_ODDS,
    shares: Sequence[float] | None = None,
) -> Scene:
    """Invent a scene of ``count`` toys (default: 1 to 3, drawn with these odds) of some kinds.

    A quarter of the scenes of several toys repeat one kind; half of all have a named ground.
    ``shares``: how probable each of the kinds is, 1 in all (default: all alike).
    """
    if count is None:
        count = int(rng.choice([1, 2, 3], p=np.divide(odds, sum(odds))))
    chosen = rng.choice(len(kinds), size=count, replace=False, p=shares)
    if count > 1 and rng.random() < 0.25:
        chosen[:] = chosen[0]
    angles = list(HUES.values())
    toys = tuple(
        Placement(
            Look(kinds[kind], angles[rng.integers(len(angles))]), x, y, size, rng.random() < 0.5
        )
        for kind, (x, y, size) in zip(chosen, _placements(rng, count), strict=True)
    )
    ground = str(rng.choice(list(GROUNDS))) if rng.random() < 0.5 else None
    colour = tuple(int(v) for v in rng.integers(90, 246, 3))
    return Scene(toys, ground, colour, int(rng.integers(2**31)))


class Caption(NamedTuple):
    """A text, the toys in the order it names them, and the word position of each one's noun."""

    text: str
    toys: tuple[int, ...]
    nouns: tuple[int, ...]


def caption(
    scene: Scene,
    rng: np.random.Generator,
    bare: float = 0.0,
    learned: Collection[int] = (),
    near: float = 0.0,
) -> Caption:
    """Word a scene in Stable Diffusion's manner, every word of it true.

    Toys in random order; a third without colours; "a photo of" before a third; a named ground is
    mentioned half of the time (so in a quarter of all captions). ``bare`` is the share of captions
    without articles, in which a toy may stand right after "of", as learned assets do.

    The toys in ``learned`` are not worded but called <asset0>, <asset1>, …, without an article,
    and such a caption begins with "a photo of" twice as often. A hue is named where a named one
    lies within ``near`` degrees of it.
    """
    with_article = not bare or rng.random() >= bare
    with_colour = rng.random() >= 1 / 3
    order = tuple(int(index) for index in rng.permutation(len(scene.toys)))
    words = ["a", "photo", "of"] if rng.random() < (2 / 3 if learned else 1 / 3) else []
    nouns, assets = [], 0
    for index in order:
        words += ["and"] * bool(nouns)
        if index in learned:
            words.append(f"<asset{assets}>")
            assets += 1
        else:
            look = scene.toys[index].look
            noun, colour = look.kind.replace("_", " "), look.colour_within(near)
            name = f"{colour} {noun}" if with_colour and colour else noun
            words += ["an" if name[0] in "aeiou" else "a"] * with_article + name.split()
        nouns.append(len(words) - 1)
    if scene.ground and rng.random() < 0.5:
        words += scene.ground.split()
    return Caption(" ".join(words), order, tuple(nouns))


# ----------------------------------------------------------------------------------------------
# painting


def _background(scene: Scene, width: int, height: int) -> Image.Image:
    if scene.ground is None:
        return Image.new("RGB", (width, height), scene.colour)
    colour, amplitude, (columns, rows) = GROUNDS[scene.ground]
    noise = np.random.default_rng(scene.texture_seed).normal(size=(rows, columns))
    texture = Image.fromarray(noise.astype(np.float32)).resize((width, height), Image.BICUBIC)
    shade = np.linspace(-0.5, 0.5, height)[:, None] + 0.5 * np.asarray(texture)
    pixels = np.asarray(colour, dtype=np.float32) + amplitude * shade[..., None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def render(
    scene: Scene, width: int, height: int | None = None, sprites: int = SPRITE_SIDE
) -> tuple[Image.Image, np.ndarray]:
    """Paint a scene; ``sprites`` is the side in pixels at which toys are recoloured.

    Returns the RGB picture and the toys' visible masks, bool [toys, height, width]: pixels that a
    toy covers by at least half and that no toy in front of it does, so masks are disjoint.
    """
    height = width if height is None else height
    picture = _background(scene, width, height)
    masks = np.zeros((len(scene.toys), height, width), dtype=bool)
    for index, placed in enumerate(scene.toys):
        side = max(2, round(placed.size * min(width, height)))
        sprite = toy(placed.look, sprites).resize((side, side), Image.LANCZOS, reducing_gap=2.0)
        if placed.flip:
            sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
        left = round(placed.x * width - side / 2)
        top = round(placed.y * height - side / 2)
        layer = Image.new("RGBa", (width, height))
        layer.paste(sprite, (left, top))
        layer = layer.convert("RGBA")
        picture.paste(layer, (0, 0), layer)
        covered = np.asarray(layer.getchannel("A")) > 127
        masks[:index] &= ~covered
        masks[index] = covered
    return picture, masks
