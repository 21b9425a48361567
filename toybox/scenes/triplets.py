"""Exact triplets for MIGE, unlimited: pictures, an instruction in which they stand, the target.

Three tasks, as MIGE has them: a scene of toys that pictures show ("subject"), a scene changed in
one thing ("edit"), and a toy from a picture put into a scene ("subject_edit"). A triplet depends on
its seed, split and index alone; where its task or op is given in place of being drawn, it is
another one. It says what a judge has to find where.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from imagelab.errors import UserError, shorten
from imagelab.training.seeds import check_seed, seed_for
from toybox.scenes import edits
from toybox.scenes.layouts import (
    draw_kinds,
    draw_looks,
    draw_reference,
    named_look,
    on_ground,
    place_toys,
)
from toybox.scenes.scenes import Placement, Scene, render
from toybox.scenes.toys import Look
from toybox.scenes.wording import (
    SPLITS,
    TASKS,
    Wording,
    coloured,
    describe,
    vocabulary,
    with_article,
    word_edit,
    word_subject_edit,
    word_subjects,
)

SIDE = 128  # of all pictures, in pixels
#: What is asked for in each task. "one_word" has a picture of one toy, and one in words alone.
OPS = {
    "subject": ("one", "two", "one_word", "two_word"),
    "edit": tuple(edits.EDITS),
    "subject_edit": tuple(edits.SUBJECT_EDITS),
}
GROUNDED = 0.7  # share of the subjects' scenes whose ground the prompt names
WORDS = tuple(vocabulary(tuple(edits.PLACES)))  # all that prompts and captions are made of


class Shown(NamedTuple):
    """A toy in a picture.

    Attributes:
        box: around what is seen of it: left, top, right, bottom, in fractions of the picture.
        reference: which of the triplet's entities shows it alone; None: none does.
        is_new: whether it is what an edit has made.
    """

    look: Look
    box: tuple[float, float, float, float]
    reference: int | None = None
    is_new: bool = False

    def facts(self) -> dict:
        """As JSON says it."""
        return {
            "kind": self.look.kind,
            "hue": self.look.hue,
            "saturation": self.look.saturation,
            "value": self.look.value,
            "colour": self.look.colour,
            "box": [round(edge, 6) for edge in self.box],
            "reference": self.reference,
            "is_new": self.is_new,
        }


@dataclass(frozen=True)
class Triplet:
    """One sample.

    Attributes:
        op: what is asked for, one of :data:`OPS`.
        entities: pictures of the prompt's marks, in their order; ``source`` says which one is to be
            edited (None: none is).
        mask: bool [side, side], where target and source differ: every pixel that does, and all that
            the old and the new toy cover; None for subjects.
        toys: what the target shows.
        gone: the toy that is not in its place any more, of the source.
        plain: the instruction of an edit without a mark.
        captions: of the source (None for subjects) and of the target.
    """

    task: str
    op: str
    prompt: str
    target: Image.Image
    entities: tuple[Image.Image, ...]
    source: int | None
    mask: np.ndarray | None
    toys: tuple[Shown, ...]
    gone: Shown | None
    ground: str | None
    plain: str | None
    captions: tuple[str | None, str]

    def facts(self) -> dict:
        """What a judge needs to know, as JSON."""
        return {
            "op": self.op,
            "instruction": self.plain,
            "caption": self.captions[0],
            "target_caption": self.captions[1],
            "ground": self.ground,
            "toys": [toy.facts() for toy in self.toys],
            "gone": self.gone and self.gone.facts(),
            "mask_box": None if self.mask is None else [round(e, 6) for e in box_of(self.mask)],
        }


def draw_triplet(
    seed: int, split: str, index: int, task: str | None = None, op: str | None = None,
    bench: bool = False,
) -> Triplet:  # fmt: skip
    """Draw and render one triplet.

    Args:
        split: "train" or "test", which share no draw.
        task: one of :data:`TASKS`; None: drawn, each as often.
        op: one of the task's :data:`OPS`; None: drawn, each as often.
        bench: have the pictures of a subject edit in MIGEBench's order.
    """
    check_choice(seed, split, task, op)
    rng = _rng(seed, "choice", split, index)
    task = task or TASKS[rng.integers(len(TASKS))]
    op = op or OPS[task][rng.integers(len(OPS[task]))]
    rng = _rng(seed, "triplet", split, index, task, op)
    if task == "subject":
        return _subject(rng, op)
    makers = edits.EDITS if task == "edit" else edits.SUBJECT_EDITS
    change = edits.draw_change(rng, makers[op])
    if task == "edit":
        return _edit(task, op, change, word_edit(change.wording, change.fields, rng))
    worded = word_subject_edit(op, change.fields, rng, bench)
    made = change.after.toys[change.new]
    return _edit(task, op, change, worded, draw_reference(rng, made, change.after.ground))


def check_choice(seed: int, split: str, task: str | None, op: str | None = None) -> None:
    """Raises UserError for what is not there to be drawn."""
    check_seed(seed)
    for name, value, known in (
        ("split", split, SPLITS),
        ("task", task, (None, *TASKS)),
        ("op", op, (None, *OPS.get(task, ()))),
    ):
        if value not in known:
            names = ", ".join(each for each in known if each) or "none without a task"
            raise UserError(f"there is no {name} {shorten(str(value))!r}; give one of {names}")


def _rng(seed: int, *labels: str | int) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, *labels))


# ----------------------------------------------------------------------------------------------
# subjects


def _subject(rng: np.random.Generator, op: str) -> Triplet:
    """A scene of toys from pictures and, where the op says so, one in words alone."""
    count, in_words = (2 if op.startswith("two") else 1), op.endswith("_word")
    looks = draw_looks(rng, count)
    if in_words:
        (kind,) = draw_kinds(rng, 1, [look.kind for look in looks])
        looks.append(named_look(rng, kind))
    scene = on_ground(rng, place_toys(rng, looks), GROUNDED)
    order = [int(each) for each in rng.permutation(len(looks))]
    names = [
        with_article(coloured(looks[each])) if each >= count else "a <subject>" for each in order
    ]
    references = [each for each in order if each < count]
    toys = [scene.toys[each] for each in order]
    relation = _relation(*toys) if len(toys) == 2 else None
    worded = word_subjects(names, relation, scene.ground, rng)
    entities = tuple(
        _paint(draw_reference(rng, scene.toys[each], scene.ground))[0] for each in references
    )
    target, masks = _paint(scene)
    shown = tuple(
        Shown(look, box_of(mask), references.index(each) if each < count else None)
        for each, (look, mask) in enumerate(zip(looks, masks, strict=True))
    )
    return Triplet(
        "subject", op, worded.prompt, target, entities, None, None, shown, None, scene.ground, None,
        (None, describe(scene)),
    )  # fmt: skip


def _relation(first: Placement, second: Placement) -> str:
    """Where one toy is from another."""
    across, down = second.x - first.x, second.y - first.y
    if abs(across) >= abs(down):
        return "left" if across > 0 else "right"
    return "above" if down > 0 else "below"


# ----------------------------------------------------------------------------------------------
# edits


def _edit(
    task: str, op: str, change: edits.Change, worded: Wording, reference: Scene | None = None
) -> Triplet:
    """Both scenes of a change, and the picture of its subject if there is one."""
    (source, before), (target, after) = _paint(change.before), _paint(change.after)
    pictures = {"source": source, "subject": _paint(reference)[0] if reference else None}
    place = worded.order.index("subject") if reference else None
    shown = tuple(
        Shown(toy.look, box_of(mask), place if at == change.new else None, at == change.new)
        for at, (toy, mask) in enumerate(zip(change.after.toys, after, strict=True))
    )
    gone = None
    if change.old is not None:
        gone = Shown(change.before.toys[change.old].look, box_of(before[change.old]))
    mask = (np.asarray(source) != np.asarray(target)).any(-1)
    if change.old is change.new is None:  # the ground: all but the toys
        mask |= ~after.any(0)
    else:
        for index, masks in ((change.old, before), (change.new, after)):
            if index is not None:
                mask |= masks[index]
        mask = _closed(mask)
    return Triplet(
        task, op, worded.prompt, target, tuple(pictures[each] for each in worded.order),
        worded.order.index("source"), mask, shown, gone, change.after.ground, worded.plain,
        (describe(change.before), describe(change.after)),
    )  # fmt: skip


def _paint(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """A scene's picture and masks; recolouring at this size takes 0.7 ms a toy."""
    return render(scene, SIDE, sprites=SIDE)


def _closed(mask: np.ndarray) -> np.ndarray:
    """A mask with its gaps of one pixel filled: scaling leaves faint rings around toys."""
    grown = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    return mask | np.asarray(grown.filter(ImageFilter.MinFilter(3))).astype(bool)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask's pixels, in fractions of the picture."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return (
        float(columns[0] / width), float(rows[0] / height),
        float((columns[-1] + 1) / width), float((rows[-1] + 1) / height),
    )  # fmt: skip


def cut_out(toy: Look, colour: tuple[int, int, int]) -> Image.Image:
    """A toy alone, large, on a flat colour, as MIGEBench shows its entities."""
    return _paint(Scene((Placement(toy, 0.5, 0.5, 0.75),), None, colour, 0))[0]
