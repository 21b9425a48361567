"""Changes of a scene in exactly one thing, and the words for them.

Where something new or moved comes to lie follows from the scene before and the words alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from toybox.scenes.layouts import (
    APART,
    EDGE,
    clearance,
    draw_kinds,
    draw_looks,
    fits,
    hue_distance,
    named_look,
    on_ground,
    place_toys,
    stands_out,
)
from toybox.scenes.scenes import Placement, Scene
from toybox.scenes.toys import HUES, Look
from toybox.scenes.wording import STUFF, call, coloured, noun, with_article

NEW = 0.4  # side of a toy that is added
#: Centres of places that words name; without words, a toy goes to the freest of them.
PLACES = {
    "on the left": (0.23, 0.5),
    "on the right": (0.77, 0.5),
    "at the top": (0.5, 0.23),
    "at the bottom": (0.5, 0.77),
    "in the middle": (0.5, 0.5),
    "in the top left corner": (0.23, 0.23),
    "in the top right corner": (0.77, 0.23),
    "in the bottom left corner": (0.23, 0.77),
    "in the bottom right corner": (0.77, 0.77),
}
ADDED_TO = (0.28, 0.44)  # sides of toys to which one is added
FAR = 0.25  # least way that a toy is moved
GROWTH = 1.5  # of a toy that becomes bigger; its inverse where it becomes smaller
SMALLEST, LARGEST = 0.22, 0.85  # sides of toys after that
GROUNDED = 0.6  # share of the scenes before whose ground has a name


@dataclass(frozen=True)
class Change:
    """A scene before and after.

    Attributes:
        old: which toy before is not there any more as it was; None where none is.
        new: which toy after was not there before as it is; None where none is.
        fields: what a wording's template needs.
        wording: the key of the template's table.
    """

    before: Scene
    after: Scene
    wording: str
    old: int | None = None
    new: int | None = None
    fields: dict[str, str] = field(default_factory=dict)


def draw_change(rng: np.random.Generator, make: Callable[[np.random.Generator], Change]) -> Change:
    """One of the changes below, after which every toy stands out from the ground."""
    while True:
        change = make(rng)
        if stands_out(change.after):
            return change


def _scene(
    rng: np.random.Generator,
    odds: tuple[int, ...],
    sizes: tuple[float, float] | None = None,
    taken: tuple[Placement, ...] = (),
) -> Scene:
    """A scene to change; ``odds`` of one toy, two, …"""
    count = 1 + int(rng.choice(len(odds), p=np.divide(odds, sum(odds))))
    return on_ground(rng, place_toys(rng, draw_looks(rng, count), sizes, taken), GROUNDED)


def _with_toy(scene: Scene, index: int, toy: Placement) -> Scene:
    return replace(scene, toys=(*scene.toys[:index], toy, *scene.toys[index + 1 :]))


def _others(scene: Scene, index: int) -> list[Placement]:
    return [toy for at, toy in enumerate(scene.toys) if at != index]


def _altered(
    rng: np.random.Generator, scene: Scene, index: int, toy: Placement, wording: str, **fields: str
) -> Change:
    """One toy of a scene in another state."""
    fields["toy"] = call(scene, index, rng)
    return Change(scene, _with_toy(scene, index, toy), wording, index, index, fields)


# ----------------------------------------------------------------------------------------------
# looks


def recolour(rng: np.random.Generator) -> Change:
    """A toy gets a named hue, which is far from its own."""
    scene = _scene(rng, (3, 4, 3))
    index = int(rng.integers(len(scene.toys)))
    toy = scene.toys[index]
    far = [name for name, hue in HUES.items() if hue_distance(hue, toy.look.hue) >= APART]
    colour = far[rng.integers(len(far))]
    look = replace(toy.look, hue=float(HUES[colour]))
    return _altered(rng, scene, index, replace(toy, look=look), "recolour", colour=colour)


def replace_kind(rng: np.random.Generator) -> Change:
    """A toy becomes one of a named kind, in the same colour, place and size."""
    scene = _scene(rng, (3, 4, 3))
    index = int(rng.integers(len(scene.toys)))
    toy = scene.toys[index]
    (kind,) = draw_kinds(rng, 1, [each.look.kind for each in scene.toys])
    placed = replace(toy, look=replace(toy.look, kind=kind), flip=False)
    return _altered(rng, scene, index, placed, "replace", new=with_article(noun(kind)))


def replace_toy(rng: np.random.Generator) -> Change:
    """A toy gives its place to one of any look, which a picture shows."""
    scene = _scene(rng, (3, 4, 3))
    index = int(rng.integers(len(scene.toys)))
    placed = replace(scene.toys[index], look=_another(rng, scene), flip=False)
    return _altered(rng, scene, index, placed, "replace")


def _another(rng: np.random.Generator, scene: Scene) -> Look:
    """Any look of a kind that a scene does not show."""
    (look,) = draw_looks(rng, 1)
    (kind,) = draw_kinds(rng, 1, [toy.look.kind for toy in scene.toys])
    return replace(look, kind=kind)


# ----------------------------------------------------------------------------------------------
# what is there


def add_named(rng: np.random.Generator) -> Change:
    """A toy that words describe comes to a scene."""
    scene, place, (x, y) = _room(rng)
    (kind,) = draw_kinds(rng, 1, [toy.look.kind for toy in scene.toys])
    look = named_look(rng, kind)
    toys = (*scene.toys, Placement(look, x, y, NEW))
    fields = {"new": with_article(coloured(look)), "place": place}
    return Change(scene, replace(scene, toys=toys), "add", None, len(toys) - 1, fields)


def add_toy(rng: np.random.Generator) -> Change:
    """A toy of any look, which a picture shows, comes to a scene."""
    scene, place, (x, y) = _room(rng)
    toys = (*scene.toys, Placement(_another(rng, scene), x, y, NEW))
    fields = {"place": place}
    return Change(scene, replace(scene, toys=toys), "add", None, len(toys) - 1, fields)


def _room(rng: np.random.Generator) -> tuple[Scene, str, tuple[float, float]]:
    """A scene with room for another toy, the words for the place (half of the time none), where."""
    if rng.random() < 0.5:
        place = list(PLACES)[rng.integers(len(PLACES))]
        scene = _scene(rng, (5, 5), ADDED_TO, (_new_at(PLACES[place]),))
        return scene, place, PLACES[place]
    while True:
        scene = _scene(rng, (5, 5), ADDED_TO)
        freest = max(PLACES.values(), key=lambda at: clearance(_new_at(at), scene.toys))
        if fits(_new_at(freest), scene.toys):
            return scene, "", freest


def _new_at(place: tuple[float, float]) -> Placement:
    """A toy to be added, whatever it looks like."""
    return Placement(Look("", 0), *place, NEW)


def remove(rng: np.random.Generator) -> Change:
    """A toy goes."""
    scene = _scene(rng, (2, 4, 4))
    index = int(rng.integers(len(scene.toys)))
    after = replace(scene, toys=tuple(_others(scene, index)))
    return Change(scene, after, "remove", index, None, {"toy": call(scene, index, rng)})


# ----------------------------------------------------------------------------------------------
# places, sizes, grounds


def move(rng: np.random.Generator) -> Change:
    """A toy goes to the picture's left or right edge, at its height."""

    side = ("left", "right")[rng.integers(2)]

    def moved(toy: Placement) -> Placement | None:
        edge = EDGE + toy.size / 2
        x = edge if side == "left" else 1 - edge
        return replace(toy, x=x) if abs(x - toy.x) >= FAR else None

    return _altered(*_first_possible(rng, moved, (0.3, 0.5)), "move", side=side)


def resize(rng: np.random.Generator) -> Change:
    """A toy becomes one and a half times as large, or as small, around its centre."""
    wording, growth = (("bigger", GROWTH), ("smaller", 1 / GROWTH))[rng.integers(2)]

    def resized(toy: Placement) -> Placement | None:
        size = growth * toy.size
        return replace(toy, size=size) if SMALLEST <= size <= LARGEST else None

    return _altered(*_first_possible(rng, resized, (0.3, 0.55)), wording)


def _first_possible(
    rng: np.random.Generator,
    changed: Callable[[Placement], Placement | None],
    sizes: tuple[float, float],
) -> tuple[np.random.Generator, Scene, int, Placement]:
    """A scene and one of its toys, by its place, that can be changed; and as it is then."""
    while True:
        scene = _scene(rng, (4, 4, 2), sizes)
        index = int(rng.integers(len(scene.toys)))
        toy = changed(scene.toys[index])
        if toy and fits(toy, _others(scene, index)):
            return rng, scene, index, toy


def change_ground(rng: np.random.Generator) -> Change:
    """The same toys on another ground, which has a name."""
    scene = _scene(rng, (4, 4, 2))
    ground = on_ground(rng, (), 1.0, other=scene.ground).ground
    fields = {"ground": ground, "stuff": STUFF[ground]}
    return Change(scene, replace(scene, ground=ground), "ground", fields=fields)


EDITS = {
    "recolour": recolour,
    "replace": replace_kind,
    "add": add_named,
    "remove": remove,
    "move": move,
    "resize": resize,
    "ground": change_ground,
}
SUBJECT_EDITS = {"replace": replace_toy, "add": add_toy}
