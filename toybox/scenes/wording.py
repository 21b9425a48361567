"""Instructions of triplets: how a change of a scene, or a scene of given toys, is said.

Templates are plain sentences: <source> stands for the picture to edit, <subject> for the picture
of a toy. In a prompt either is :data:`MARK`, without blanks beside it, as the release writes it.
"""

import re
from typing import NamedTuple

import numpy as np

from toybox.scenes.scenes import GROUNDS, Scene
from toybox.scenes.toys import HUES, KINDS, Look

MARK = "<imagehere>"
#: What triplets are for: scenes of given toys, changes of a scene, changes with a given toy.
TASKS = ("subject", "edit", "subject_edit")
SPLITS = ("train", "test")
#: What a ground is made of, for "change the ground to …".
STUFF = {
    "on the grass": "grass",
    "in the snow": "snow",
    "on the sand": "sand",
    "on a wooden table": "a wooden table",
    "in the sky": "the sky",
    "on the road": "a road",
}
SUBJECTS = ("{toys}", "{toys}", "a photo of {toys}", "a picture of {toys}", "there is {toys}")
#: Two toys, by where the first one is from the second; those of "anywhere" always fit.
PAIRS = {
    "left": ("{} to the left of {}", "{} on the left and {} on the right", "{} beside {}"),
    "right": ("{} to the right of {}", "{} on the right and {} on the left", "{} next to {}"),
    "above": ("{} above {}", "{} at the top and {} at the bottom"),
    "below": ("{} below {}", "{} at the bottom and {} at the top"),
    "anywhere": ("{} and {}", "{} with {}"),
}
THREE = ("{} and {} and {}", "{} and {} with {}", "{} with {} and {}")
#: Each way to ask for an edit, without the picture's mark and with it.
EDITS = {
    "recolour": (
        ("make the {toy} {colour}", "make the {toy} in <source> {colour}"),
        ("paint the {toy} {colour}", "paint the {toy} in <source> {colour}"),
        ("turn the {toy} {colour}", "turn the {toy} in <source> {colour}"),
        (
            "change the colour of the {toy} to {colour}",
            "change the colour of the {toy} in <source> to {colour}",
        ),
    ),
    "replace": (
        ("replace the {toy} with {new}", "replace the {toy} in <source> with {new}"),
        ("turn the {toy} into {new}", "turn the {toy} in <source> into {new}"),
        ("swap the {toy} for {new}", "swap the {toy} in <source> for {new}"),
        (
            "replace the {toy} with {new} of the same colour",
            "replace the {toy} in <source> with {new} of the same colour",
        ),
    ),
    "add": (
        ("add {new} {place}", "add {new} to <source> {place}"),
        ("insert {new} {place}", "insert {new} into <source> {place}"),
        ("draw {new} {place}", "draw {new} into <source> {place}"),
        ("show {new} {place}", "show {new} in <source> {place}"),
    ),
    "remove": (
        ("remove the {toy}", "remove the {toy} from <source>"),
        ("delete the {toy}", "delete the {toy} from <source>"),
        ("take the {toy} away", "take the {toy} in <source> away"),
        ("erase the {toy}", "erase the {toy} in <source>"),
    ),
    "move": (
        ("move the {toy} to the {side}", "move the {toy} in <source> to the {side}"),
        ("shift the {toy} to the {side}", "shift the {toy} in <source> to the {side}"),
        ("put the {toy} on the {side}", "put the {toy} in <source> on the {side}"),
    ),
    "bigger": (
        ("make the {toy} bigger", "make the {toy} in <source> bigger"),
        ("make the {toy} larger", "make the {toy} in <source> larger"),
        ("enlarge the {toy}", "enlarge the {toy} in <source>"),
    ),
    "smaller": (
        ("make the {toy} smaller", "make the {toy} in <source> smaller"),
        ("shrink the {toy}", "shrink the {toy} in <source>"),
    ),
    "ground": (
        ("change the ground to {stuff}", "change the ground of <source> to {stuff}"),
        ("replace the background with {stuff}", "replace the background of <source> with {stuff}"),
        ("put everything {ground}", "put everything in <source> {ground}"),
    ),
}  # fmt: skip
#: Edits with a subject; the first of each kind has its pictures in MIGEBench's order.
SUBJECT_EDITS = {
    "replace": (
        "replace the {toy} in <source> with <subject>",
        "swap the {toy} in <source> for <subject>",
        "turn the {toy} in <source> into <subject>",
        "put <subject> in place of the {toy} in <source>",
    ),
    "add": (
        "add <subject> to <source> {place}",
        "put <subject> into <source> {place}",
        "insert <subject> into <source> {place}",
        "into <source> put <subject> {place}",
    ),
}
BENCH_ORDER = {"replace": ("source", "subject"), "add": ("subject", "source")}
SAME = 15.0  # degrees from a named hue, within which a caption says its name


class Wording(NamedTuple):
    """A prompt with its marks.

    Attributes:
        order: what each mark stands for, "source" or "subject".
        plain: the instruction of an edit without its mark; None elsewhere.
    """

    prompt: str
    order: tuple[str, ...]
    plain: str | None = None


# ----------------------------------------------------------------------------------------------
# names


def noun(kind: str) -> str:
    return kind.replace("_", " ")


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def coloured(look: Look) -> str:
    """A toy of a named hue in words, as in "red fish"."""
    return f"{look.colour} {noun(look.kind)}"


def call(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """What only one toy of a scene is called: its kind, with its colour where it has to be said.

    Toys of one kind have named hues, see `draw_looks`; of others with one, some are told, too.
    """
    look = scene.toys[index].look
    is_alone = sum(toy.look.kind == look.kind for toy in scene.toys) == 1
    says_colour = rng.random() < 0.4
    return coloured(look) if look.colour and (says_colour or not is_alone) else noun(look.kind)


def describe(scene: Scene) -> str:
    """A caption of a scene, with the colours that have names, as in "a red car in the snow"."""
    names = []
    for toy in scene.toys:
        colour = toy.look.colour_within(SAME)
        names.append(with_article(f"{colour or ''} {noun(toy.look.kind)}".strip()))
    return f"{' and '.join(names) or 'nothing'} {scene.ground or ''}".strip()


# ----------------------------------------------------------------------------------------------
# prompts


def word_subjects(
    toys: list[str], relation: str | None, ground: str | None, rng: np.random.Generator
) -> Wording:
    """The prompt for a scene of one to three toys.

    Args:
        toys: each in words, as "a red fish", or "a <subject>".
        relation: where the first of two is from the second, one of :data:`PAIRS`.
    """
    if len(toys) == 1:
        text = toys[0]
    elif len(toys) == 2:
        where = relation if rng.random() < 0.5 else "anywhere"
        text = _choose(PAIRS[where], rng).format(*toys)
    else:
        text = _choose(THREE, rng).format(*toys)
    text = _choose(SUBJECTS, rng).format(toys=text)
    return _marked(f"{text} {ground or ''}")


def word_edit(op: str, fields: dict[str, str], rng: np.random.Generator) -> Wording:
    """The prompt for an edit: half of them name the picture within, half at the end.

    The end is what `mige.edit` adds to an instruction without a mark.
    """
    plain, within = (text.format(**fields).strip() for text in _choose(EDITS[op], rng))
    if rng.random() < 0.5:
        within = f"{plain} in <source>"
    return _marked(within)._replace(plain=plain)


def word_subject_edit(
    op: str, fields: dict[str, str], rng: np.random.Generator, bench: bool = False
) -> Wording:
    """The prompt for an edit with a subject; of a bench, with its pictures in MIGEBench's order."""
    worded = [_marked(text.format(**fields)) for text in SUBJECT_EDITS[op]]
    return _choose([one for one in worded if not bench or one.order == BENCH_ORDER[op]], rng)


def _choose(several, rng: np.random.Generator):
    return several[rng.integers(len(several))]


def _marked(text: str) -> Wording:
    order = tuple(re.findall(r"<(source|subject)>", text))
    return Wording(re.sub(r"\s*<(source|subject)>\s*", MARK, text).strip(), order)


# ----------------------------------------------------------------------------------------------
# all words


def vocabulary(places: tuple[str, ...]) -> list[str]:
    """Every word that prompts and captions may have, sorted."""
    texts = [*HUES, *map(noun, KINDS), *GROUNDS, *STUFF.values(), *places]
    texts += [*SUBJECTS, *THREE, *(text for several in PAIRS.values() for text in several)]
    texts += [text for several in EDITS.values() for pair in several for text in pair]
    texts += [text for several in SUBJECT_EDITS.values() for text in several]
    words = re.sub(r"[<{]\w*[>}]", " ", " ".join(texts)).split()
    return sorted({*words, "a", "an", "nothing", "left", "right", "in", "of"})
