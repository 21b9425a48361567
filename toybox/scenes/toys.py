"""Toys of 24 kinds in any hue.

Sprites are Microsoft's Fluent 3D emoji (MIT, see ``sprites/LICENSE``). Recolouring turns the hues
of a sprite until the commonest one is the wanted angle; eight angles have names.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagelab.errors import UserError

SPRITES = Path(__file__).parent / "sprites"
KINDS = tuple(sorted(path.stem for path in SPRITES.glob("*.webp")))
#: Names of a toy's hue, in degrees on the HSV circle.
HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 52,
    "green": 120,
    "teal": 178,
    "blue": 220,
    "purple": 275,
    "pink": 325,
}
SPRITE_SIDE = 256  # of the sprites as they are stored, in pixels
_HUE_SPREAD, _MEAN_SATURATION, _MEAN_VALUE = 50, 0.55, 0.75


@dataclass(frozen=True)
class Look:
    """How one toy looks: its kind, dominant hue in degrees, and gains of saturation and value."""

    kind: str
    hue: float
    saturation: float = 1.0
    value: float = 1.0

    @property
    def nearest_colour(self) -> str:
        """The name of the hue that is nearest on the circle."""
        return min(HUES, key=lambda name: abs((HUES[name] - self.hue + 180) % 360 - 180))

    @property
    def colour(self) -> str | None:
        """The hue's name, or None for a hue between the named ones."""
        return self.colour_within(0)

    def colour_within(self, degrees: float) -> str | None:
        """The name of the nearest named hue, or None where it is further away than this."""
        name = self.nearest_colour
        away = abs((HUES[name] - self.hue + 180) % 360 - 180)
        return name if away <= degrees else None


class _Sprite(NamedTuple):
    """What recolouring a sprite needs of it; arrays are [side, side]."""

    hues: np.ndarray  # apart from the commonest one, in degrees
    saturation: np.ndarray  # of colours strong enough to have a name
    value: np.ndarray
    gain: float  # what brightens a dark sprite
    alpha: Image.Image


@cache
def _sprite(kind: str, side: int) -> _Sprite:
    path = SPRITES / f"{kind}.webp"
    if not path.is_file():
        raise UserError(f"there is no toy of kind {kind!r}; choose one of {', '.join(KINDS)}")
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    if side != picture.width:  # premultiplied, so that no colour of clear pixels bleeds in
        picture = picture.convert("RGBa").resize((side, side), Image.LANCZOS).convert("RGBA")
    alpha = picture.getchannel("A")
    hsv = np.asarray(picture.convert("RGB").convert("HSV"), dtype=np.float64) / 255
    inside = np.asarray(alpha) > 127
    weight = hsv[..., 1] * hsv[..., 2]
    counts, edges = np.histogram(hsv[..., 0][inside], 36, (0, 1), weights=weight[inside])
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    commonest = edges[int(np.argmax(smooth))] + 0.5 / 36
    apart = np.sin(2 * np.pi * (hsv[..., 0] - commonest)) * hsv[..., 1] / (hsv[..., 1] + 0.15)
    gain = max(1.0, _MEAN_SATURATION / hsv[..., 1][inside].mean())
    brighter = max(1.0, _MEAN_VALUE / hsv[..., 2][inside].mean())
    saturation = np.maximum(gain * hsv[..., 1], 0.2)
    return _Sprite(_HUE_SPREAD * apart, saturation, hsv[..., 2], brighter, alpha)


@lru_cache(maxsize=1024)
def toy(look: Look, side: int = SPRITE_SIDE) -> Image.Image:
    """The recoloured sprite, RGBA of ``side`` pixels with premultiplied colours (mode ``RGBa``).

    The commonest hue becomes ``look.hue``; the others stay within 50 degrees of it, and grey and
    dark sprites gain saturation and value, so that a colour's name is true of every kind.
    """
    sprite = _sprite(look.kind, side)
    hue = (look.hue + sprite.hues) / 360 % 1
    saturation = look.saturation * sprite.saturation
    value = look.value * sprite.gain * sprite.value
    pixels = np.clip(np.stack([hue, saturation, value], -1), 0, 1)
    picture = Image.fromarray(np.rint(pixels * 255).astype(np.uint8), "HSV").convert("RGB")
    picture.putalpha(sprite.alpha)
    return picture.convert("RGBa")
