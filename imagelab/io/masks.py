"""Masks as people's tools write them: which pixels of a file are inside (docs/masks.md).

A value is a grey level or a colour as a number, 0xRRGGBB. An area is a value that fills some place
and not only an edge: what a file shows is told by its areas. Arrays are [height, width].
"""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagelab.errors import UserError

FEW = 64  # values: with more they are soft shades, and those that are near are one
AREA = 2e-4  # of the picture: a value that equals its four neighbours in so much is an area
STRAY = 1e-3  # of the picture: fewer transparent pixels than this say nothing
NEAR = 1 / 16  # of the highest level
BLACK = 16  # of 255: no channel of a black colour is above this
LABEL = re.compile(r"#[0-9a-fA-F]{6}|[0-9]{1,5}")
WHITE_ON_BLACK = "paint the instance white on black"
FLATTEN = "save it without transparency, the instance white on black"


def read_inside(
    image: Image.Image, name: str, label: str | None = None, is_exact: bool = True
) -> np.ndarray:
    """True [h, w] inside.

    Args:
        name: what a message calls the file.
        label: what is inside: a palette's index, a grey level or a colour such as "#800000"; None
            for a file that shows one thing alone.
        is_exact: the values are those that were painted, as in a PNG.

    Raises:
        UserError: nothing is inside, or there are two ways to read the file.
    """
    if label is not None:
        return _labelled(image, name, label, is_exact)
    alpha = alpha_of(image)
    inside = None if alpha is None else _opaque(image, alpha, name)
    if inside is not None:
        return inside
    if greys := _greys(image):
        return _lighter(image, *greys, name, is_exact)
    return _coloured(image, name, is_exact)


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture may be transparent somewhere."""
    return "A" in image.getbands() or "transparency" in image.info


def alpha_of(image: Image.Image) -> np.ndarray | None:
    """How opaque each pixel is, uint8 [h, w]; None for a picture without transparency."""
    if not has_alpha(image):
        return None
    if image.mode.startswith("I"):  # 16-bit greys, of which one level is transparent
        is_opaque = np.asarray(image) != image.info["transparency"]
        return np.where(is_opaque, 255, 0).astype(np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


# ----------------------------------------------------------------------------------------------
# values and areas


def _greys(image: Image.Image) -> tuple[np.ndarray, int] | None:
    """The levels of a picture without colours, and the highest possible one; None with colours."""
    if image.mode.startswith("I"):  # 16 bits
        return np.asarray(image).astype(np.uint16), 65_535
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), 255
    rgb = np.asarray(image.convert("RGB"))
    if (rgb == rgb[..., :1]).all():
        return rgb[..., 0], 255
    return None


def _colours(image: Image.Image) -> np.ndarray:
    """0xRRGGBB, transparent or not."""
    if image.mode.startswith("I"):
        return (np.asarray(image) // 256).astype(np.uint32) * 0x010101
    rgb = np.asarray(image.convert("RGB")).astype(np.uint32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _channels(colours: Sequence[int]) -> np.ndarray:
    """Levels [n, 3] of colours."""
    return np.asarray(colours, int)[:, None] >> np.array([16, 8, 0]) & 255


def _distinct(values: np.ndarray) -> list[int] | None:
    """The values that are there, from the lowest on; None if they are more than `FEW`."""
    flat = values.ravel()
    for some in (flat[:: 1 + flat.size // 100_000], flat):  # a photo shows itself at once
        if len(found := np.unique(some)) > FEW:
            return None
    return found.tolist()


def _commonest(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def _areas(values: np.ndarray, where: np.ndarray | None = None, is_soft: bool = False) -> list[int]:
    """The values that fill areas, from the lowest on.

    Args:
        where: look there alone.
        is_soft: of those that are near each other take the commonest alone.
    """
    middle = values[1:-1, 1:-1]
    is_flat = np.ones(middle.shape, bool) if where is None else where[1:-1, 1:-1].copy()
    for neighbours in (values[:-2, 1:-1], values[2:, 1:-1], values[1:-1, :-2], values[1:-1, 2:]):
        is_flat &= middle == neighbours
    found, counts = np.unique(middle[is_flat], return_counts=True)
    is_wide = counts >= AREA * values.size
    found, counts = found[is_wide].astype(int), counts[is_wide]
    if not is_soft:
        return found.tolist()
    cuts = np.flatnonzero(np.diff(found) > NEAR * int(values.max())) + 1
    groups = zip(np.split(found, cuts), np.split(counts, cuts), strict=True)
    return [int(group[count.argmax()]) for group, count in groups if len(group)]


# ----------------------------------------------------------------------------------------------
# transparency


def _opaque(image: Image.Image, alpha: np.ndarray, name: str) -> np.ndarray | None:
    """What is inside by transparency; None if that says nothing."""
    highest = int(alpha.max())
    if not highest:
        raise UserError(
            f"{name} is transparent everywhere, and what lies under that may or may not be meant; "
            f"{FLATTEN}"
        )
    if (alpha <= highest / 2).mean() < STRAY:
        return None
    inside = alpha > _alpha_limit(alpha, highest, name)
    _check_opaque_part(image, inside, name)
    return inside


def _alpha_limit(alpha: np.ndarray, highest: int, name: str) -> float:
    """Half of the opacity that the inside is painted with."""
    painted = [level for level in _areas(alpha, is_soft=True) if level > highest / 8]
    ground = 0
    if len(painted) == 2 and painted[0] <= highest / 2 and alpha.min() > highest / 8:
        ground = painted.pop(0)  # a veil over all the rest
    if not painted or painted[0] > highest / 2 or _is_one_brush(painted):
        return (ground + (painted[0] if painted else highest)) / 2
    degrees = ", ".join(f"{level / 2.55:.0f}%" for level in painted)
    raise UserError(
        f"{name} is opaque in several degrees ({degrees}): all of that may be inside, or its most "
        "opaque part alone; paint the instance with full opacity, and nothing else"
    )


def _is_one_brush(levels: Sequence[int]) -> bool:
    """Whether one translucent brush paints these levels, where up to five strokes of it overlap."""
    through = 1 - levels[0] / 255
    strokes = [255 * (1 - through**count) for count in range(1, 6)]
    return all(min(abs(level - stroke) for stroke in strokes) <= 4 for level in levels)


def _check_opaque_part(image: Image.Image, inside: np.ndarray, name: str) -> None:
    """Raises UserError where the colours say something else than the transparency does."""
    colours = _colours(image)
    there = _distinct(colours[inside])
    if there is None and (not _greys(image) or _is_photo(colours[inside] & 255)):
        return  # a thing cut out of its photo
    if there is None:
        areas = [level * 0x010101 for level in _areas(colours & 255, inside, is_soft=True)]
    else:
        areas = _areas(colours, inside)
    shown = _channels(areas or [_commonest(colours[inside])])
    if len(areas) > 1 and np.ptp(shown, 0).max() > BLACK:
        raise UserError(
            f"{name} is transparent in part, and the rest has several colours "
            f"({_holdings(image, inside)}): all of that may be inside, or one colour alone; "
            f"{FLATTEN}"
        )
    if shown.max() > BLACK:
        return
    if _channels([_commonest(colours[~inside])]).min() >= 255 - BLACK:
        raise UserError(
            f"{name} is black where it is opaque ({inside.mean():.0%} of the picture) and white "
            f"where it is transparent, and either may be inside; {FLATTEN}"
        )


# ----------------------------------------------------------------------------------------------
# greys and colours


def _lighter(
    image: Image.Image, levels: np.ndarray, full: int, name: str, is_exact: bool
) -> np.ndarray:
    """What is inside by luminance: the lighter of two areas.

    Args:
        image: what the levels are of.
        full: the highest level that is possible.
    """
    there = _distinct(levels)
    darkest, lightest = int(levels.min()), int(levels.max())
    areas = there if there and len(there) == 2 else _areas(levels, is_soft=not (there and is_exact))
    if is_exact and lightest < FEW / 2:  # labels, even where they are thin
        areas = there
    if len(areas) > 2:
        raise _several(image, name)
    is_clear = len(areas) == 2
    dark, light = areas if is_clear else (darkest, lightest)
    if 8 * dark > 7 * full:
        return np.ones(levels.shape, bool)
    if dark > full / 2:
        raise UserError(
            f"{name} is light everywhere (its luminance is {dark} to {light} of {full}): the whole "
            f"picture may be inside, or a part of it; {WHITE_ON_BLACK}"
        )
    # dark colours on black are masks, too; but what is nearly black in a JPEG is noise
    is_told = is_clear and dark <= NEAR * light and (is_exact or 8 * light > full)
    if light <= full / 2 and not is_told:
        raise UserError(
            f"{name} is empty (its highest luminance is {lightest} of {full}); {WHITE_ON_BLACK}"
        )
    if _is_photo(levels) or (not is_clear and light - dark < full / 4):
        raise UserError(
            f"{name} is neither black nor white in much of it, like a photo; {WHITE_ON_BLACK}"
        )
    return levels > (dark + light) / 2


def _is_photo(levels: np.ndarray) -> bool:
    """Whether much is neither nearly as dark nor nearly as light as greys get there."""
    dark, light = int(levels.min()), int(levels.max())
    quarter = (light - dark) / 4
    return ((levels > dark + quarter) & (levels < light - quarter)).mean() > 1 / 3


def _coloured(image: Image.Image, name: str, is_exact: bool) -> np.ndarray:
    """What is inside by colour: of two, the one that is not black."""
    colours = _colours(image)
    if not is_exact or _distinct(colours) is None:
        return _lighter(image, _shades(image, name), 255, name, is_exact=False)
    areas = _areas(colours)
    if len(areas) > 2:
        raise _several(image, name)
    there, counts = np.unique(colours, return_counts=True)
    if len(areas) < 2:
        areas = there[np.argsort(counts)[-2:]]
    dark, light = sorted(_channels(areas), key=max)
    is_on_black = dark.max() == 0 or dark.max() <= BLACK < light.max()
    is_grey = max(np.ptp(dark), np.ptp(light)) <= BLACK and dark.max() < 128 <= light.min()
    if not (is_on_black or is_grey):
        raise UserError(
            f"{name} shows two colours ({_holdings(image)}), and either may be inside; "
            f"{WHITE_ON_BLACK}, or name the one that is inside with --mask_label"
        )
    far, near = (((_channels(there) - colour) ** 2).sum(1) for colour in (dark, light))
    return np.isin(colours, there[near < far])


def _shades(image: Image.Image, name: str) -> np.ndarray:
    """The levels of a picture in shades of one colour on black."""
    rgb = np.asarray(image.convert("RGB"))
    step = 1 + int((rgb.size / 3e6) ** 0.5)
    sample = rgb[::step, ::step].reshape(-1, 3).astype(np.float32)
    colour = sample.sum(0)
    colour /= max(np.linalg.norm(colour), 1)
    apart = np.abs(sample - (sample @ colour)[:, None] * colour).max(1)
    if (apart > 24).mean() > 0.05:
        raise UserError(
            f"{name} is a picture in many colours and no mask; {WHITE_ON_BLACK}, or save the "
            "instance alone, with all the rest transparent"
        )
    return rgb.max(2)


# ----------------------------------------------------------------------------------------------
# labels


def _labelled(image: Image.Image, name: str, label: str, is_exact: bool) -> np.ndarray:
    if not LABEL.fullmatch(label):
        raise UserError(
            f"--mask_label {label[:40]!r} is no label; give a number, such as 1, or a colour, such "
            "as '#800000'"
        )
    if not is_exact:
        raise UserError(f"{name} is no PNG, which alone keeps labels exactly; save it as PNG")
    if label[0] == "#":
        inside = _colours(image) == int(label[1:], 16)
    else:
        inside = _numbers(image) == int(label)
    if not inside.any():
        raise UserError(
            f"{name} has no label {label}; it holds {_holdings(image)}: give one of them with "
            "--mask_label"
        )
    return inside


def _numbers(image: Image.Image) -> np.ndarray:
    """The palette's index or the grey level of each pixel; -1 of a colour."""
    if image.mode == "P":
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image).astype(int)
    if greys := _greys(image):
        return greys[0]
    rgb = np.asarray(image.convert("RGB")).astype(int)
    return np.where((rgb == rgb[..., :1]).all(-1), rgb[..., 0], -1)


def _several(image: Image.Image, name: str) -> UserError:
    return UserError(
        f"{name} holds several labels ({_holdings(image)}), and any of them may be inside; save a "
        "mask for each thing, white on black, or name the one that is inside with --mask_label"
    )


def _holdings(image: Image.Image, where: np.ndarray | None = None) -> str:
    """The commonest labels of a picture, or of a part of it, and their shares; at most eight."""
    is_numbered = image.mode == "P" or _greys(image)
    values = _numbers(image) if is_numbered else _colours(image)
    there, counts = np.unique(values if where is None else values[where], return_counts=True)
    first = np.argsort(-counts, kind="stable")[:8]
    words = [str(there[i]) if is_numbered else f"#{there[i]:06x}" for i in first]
    shares = 100 * counts[first] / counts.sum()
    found = [f"{word} {share:.3g}%" for word, share in zip(words, shares, strict=True)]
    return ", ".join(found) + (", …" if len(there) > 8 else "")
