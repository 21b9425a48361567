"""Whether a picture shows what an item of toybox's triplets asks for, by toybox's classifier.

Every check is a question about the item's facts that is answered by yes or no. What an item is
measured against are its facts and its true target: as much of a toy has to be there as half of
what the classifier sees in the target. A blur of the target does not pass: all other toys of the
scene have to read right as well, with enough detail, and where a toy was removed or moved the
ground has to be.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from toybox.classifier.network import Classifier
from toybox.mige.sight import Edges, View
from toybox.scenes.edits import GROWTH, PLACES
from toybox.scenes.layouts import hue_distance
from toybox.scenes.scenes import GROUNDS
from toybox.scenes.toys import Look
from toybox.scenes.triplets import Shown, Triplet

VERSION = 1  # of what is judged; another judges painted pictures anew
CLOSE = 25.0  # degrees
ENOUGH = 0.5  # of what the classifier sees of a toy in the target
THERE = 0.008  # share of a scene that a toy covers at least; the smallest in a target covers 0.011
TWICE = 1.7  # times the target's spread, beyond which a toy is there twice or smeared
DETAIL = 0.35  # of the target's, at least: the autoencoder leaves 0.52, a blur of 3 pixels 0.29
BLUR = 2  # pixels, of what detail is measured against
STRAY = 0.025  # share of a scene that toys which nobody asked for cover at most
GROUND_L1 = 0.1  # between the target and the ground where a toy was
FREE = 0.1  # of toys in a cell, below which it shows the ground
LEAST_GROUND = 64  # pixels, below which it is not measured
GROUND_SHARE = 0.8  # of the pixels outside of toys whose nearest ground is the one asked for
GROUND_SHIFT = 12.0  # beyond a ground's amplitude, of the mean of any channel, 0 to 255


def judge(classifier: Classifier, painted: Image.Image, triplet: Triplet) -> dict[str, bool]:
    """All checks of a picture by name; "right": whether all that the issue's aims ask for hold.

    subject          kind, hue, alone, crisp; ground, where the prompt names one: it is told
                     beside, and no part of "right"
    edit             change, others, alone, crisp
    subject edit     kind, hue, others, alone, crisp
    """
    rule = {"subject": judge_subject, "edit": judge_edit, "subject_edit": judge_subject_edit}
    views = View(classifier, painted), View(classifier, triplet.target)
    found = rule[triplet.task](*views, triplet)
    found["crisp"] = is_crisp(*views, triplet)
    return {"right": all(value for name, value in found.items() if name != "ground")} | found


def l1(first: Image.Image, second: Image.Image, where: np.ndarray | None = None) -> float:
    """Mean absolute difference of two RGB pictures, values 0 to 1.

    Args:
        where: bool [h, w], the pixels that count; None: all.
    """
    difference = np.abs(_pixels(first) - _pixels(second)) / 255
    return float((difference if where is None else difference[where]).mean())


def is_crisp(painted: View, target: View, triplet: Triplet) -> bool:
    """Whether toys show enough of the target's detail; where there is none to show, they do."""
    own, wanted = detail(painted), detail(target)
    return not triplet.toys or own >= DETAIL * wanted


def detail(view: View) -> float:
    """How far toys are from a blur of themselves, 0 to 255, times the side of their area.

    Scaling a toy leaves this about the same.
    """
    picture = view.picture
    toys = view.scene.toys(picture.size)
    if toys.mean() < THERE:
        return 0.0
    blurred = picture.filter(ImageFilter.GaussianBlur(BLUR))
    away = np.abs(_pixels(picture) - _pixels(blurred)).mean(-1)
    return float((toys * away).sum() / toys.sum() * toys.mean() ** 0.5)


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


# ----------------------------------------------------------------------------------------------
# subjects


def judge_subject(painted: View, target: View, triplet: Triplet) -> dict[str, bool]:
    """Is each toy there, once, wherever it is, and of its hue? Is nothing else there?"""
    looks = [toy.look for toy in triplet.toys]
    seen, wanted = painted.scene, target.scene
    kinds, hues, alone = [], [], [seen.area_besides([look.kind for look in looks]) <= STRAY]
    for index, look in enumerate(looks):
        others = looks[:index] + looks[index + 1 :]
        found, own = seen.find(look, others), wanted.find(look, others)
        kinds.append(found.area >= THERE)
        hues.append(kinds[-1] and is_close(found.hue, look))
        alone.append(not kinds[-1] or found.spread <= TWICE * own.spread)
    checks = {"kind": all(kinds), "hue": all(hues), "alone": all(alone)}
    if triplet.ground and triplet.prompt.endswith(triplet.ground):
        where = seen.toys(painted.picture.size) < FREE
        checks["ground"] = is_ground(_pixels(painted.picture)[where], triplet.ground)
    return checks


def is_close(hue: float, look: Look) -> bool:
    return hue_distance(hue, look.hue) <= CLOSE


# ----------------------------------------------------------------------------------------------
# edits


def judge_edit(painted: View, target: View, triplet: Triplet) -> dict[str, bool]:
    """Is the asked change there? Do the other toys read right? Is nothing else there?"""
    change = {
        "recolour": _is_recoloured, "replace": _is_replaced, "add": _is_added,
        "remove": _is_ground_back, "move": _is_moved, "resize": _is_resized,
        "ground": _is_on_ground,
    }[triplet.op]  # fmt: skip
    return {"change": change(painted, target, triplet)} | _rest(painted, target, triplet)


def judge_subject_edit(painted: View, target: View, triplet: Triplet) -> dict[str, bool]:
    """Is the reference's toy where it is asked for? The others, and nothing else?"""
    new = new_toy(triplet)
    if _is_free(triplet):
        found, own = (view.scene.find(new.look) for view in (painted, target))
        kind, hue = ENOUGH * own.area <= found.area <= own.area / ENOUGH, found.hue
    else:
        (kind,), (hue,) = _kinds(painted, target, triplet, [new])
    checks = {"kind": kind, "hue": kind and is_close(hue, new.look)}
    return checks | _rest(painted, target, triplet)


def new_toy(triplet: Triplet) -> Shown:
    """What an edit has made."""
    return next(toy for toy in triplet.toys if toy.is_new)


def _is_free(triplet: Triplet) -> bool:
    """Whether no word says where a toy is to be added."""
    return triplet.op == "add" and not any(place in triplet.prompt for place in PLACES)


def _kinds(
    painted: View, target: View, triplet: Triplet, toys: Sequence[Shown]
) -> tuple[list[bool], list[float]]:
    """Whether each toy's box is covered by its kind, and the hue in it."""
    boxes = [toy.box for toy in toys]
    seen, own = painted.read(boxes), target.read(boxes)
    kinds = [
        here.kind == toy.look.kind and here.cover >= ENOUGH * there.cover
        for here, there, toy in zip(seen, own, toys, strict=True)
    ]
    return kinds, [here.hue for here in seen]


def _are_right(painted: View, target: View, triplet: Triplet, toys: Sequence[Shown]) -> bool:
    """Whether toys are in their boxes, of their kinds and hues."""
    kinds, hues = _kinds(painted, target, triplet, toys)
    close = [is_close(hue, toy.look) for hue, toy in zip(hues, toys, strict=True)]
    return all(kinds) and all(close)


def _rest(painted: View, target: View, triplet: Triplet) -> dict[str, bool]:
    """What an edit must leave alone."""
    others = [toy for toy in triplet.toys if not toy.is_new]
    boxes = [toy.box for toy in triplet.toys]
    kinds = [new_toy(triplet).look.kind] if _is_free(triplet) else []
    found, own = (view.scene.area_besides(kinds, boxes) for view in (painted, target))
    return {
        "others": _are_right(painted, target, triplet, others),
        "alone": found - own <= STRAY,
    }


# ----------------------------------------------------------------------------------------------
# each change


def _is_recoloured(painted: View, target: View, triplet: Triplet) -> bool:
    """The kind is still there, in the new hue."""
    return _are_right(painted, target, triplet, [new_toy(triplet)])


def _is_replaced(painted: View, target: View, triplet: Triplet) -> bool:
    """The new kind is there, in the old colour where words say so."""
    if "same colour" in triplet.prompt:
        return _are_right(painted, target, triplet, [new_toy(triplet)])
    return all(_kinds(painted, target, triplet, [new_toy(triplet)])[0])


def _is_added(painted: View, target: View, triplet: Triplet) -> bool:
    """The toy is where the words say; anywhere, where they say nothing."""
    found = judge_subject_edit(painted, target, triplet)
    return found["kind"] and found["hue"]


def _is_ground_back(painted: View, target: View, triplet: Triplet) -> bool:
    """The ground is where a toy was; too little of it to be told counts as there."""
    where = triplet.mask.copy()
    for toy in triplet.toys:
        if toy.is_new:
            where[_inside(toy.box, where.shape)] = False
    return where.sum() < LEAST_GROUND or l1(painted.picture, triplet.target, where) <= GROUND_L1


def _inside(box: Edges, shape: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels of a box that was drawn around pixels."""
    left, top, right, bottom = np.rint(np.multiply(box, (shape[1], shape[0]) * 2)).astype(int)
    return slice(top, bottom), slice(left, right)


def _is_moved(painted: View, target: View, triplet: Triplet) -> bool:
    """The toy is in its new place, and the ground in the old one."""
    is_there = _are_right(painted, target, triplet, [new_toy(triplet)])
    return is_there and _is_ground_back(painted, target, triplet)


def _is_resized(painted: View, target: View, triplet: Triplet) -> bool:
    """The toy's area is nearer to the new one than to the old one; what is too large is stray."""
    new, old = new_toy(triplet).box, triplet.gone.box
    around = [(*np.minimum(new[:2], old[:2]), *np.maximum(new[2:], old[2:]))]
    seen, own = (view.read(around)[0] for view in (painted, target))
    is_of_size = own.cover / GROWTH < seen.cover < own.cover * GROWTH  # areas grow by GROWTH²
    return is_of_size and _are_right(painted, target, triplet, [new_toy(triplet)])


def _is_on_ground(painted: View, target: View, triplet: Triplet) -> bool:
    """Outside of the toys' boxes most pixels are of the ground asked for."""
    where = np.ones(triplet.mask.shape, bool)
    for toy in triplet.toys:
        where[_inside(toy.box, where.shape)] = False
    return is_ground(_pixels(painted.picture)[where], triplet.ground)


def is_ground(pixels: np.ndarray, name: str) -> bool:
    """Whether colours [n, 3] are those of a ground: nearest to it, and not far on the whole."""
    if not len(pixels):
        return False
    colours = np.array([colour for colour, *_ in GROUNDS.values()], dtype=float)
    nearest = np.square(pixels[:, None] - colours).sum(-1).argmin(1)
    colour, amplitude, _ = GROUNDS[name]
    shift = np.abs(pixels.mean(0) - colour).max()
    is_nearest = nearest == list(GROUNDS).index(name)
    return bool(is_nearest.mean() >= GROUND_SHARE and shift <= amplitude / 2 + GROUND_SHIFT)
