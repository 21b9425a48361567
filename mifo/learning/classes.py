"""What the things of an instance folder are, if its ``instance.json`` says so."""

from collections.abc import Sequence
from pathlib import Path

from imagelab.errors import UserError
from imagelab.io.tensors import read_json
from imagelab.prompts import check_prompt
from mifo.tokens import ASSET

DESCRIPTION = "instance.json"
ADVICE = 'write it as {"class": "car"}, or {"class": ["cat", "fox"]} with one for each mask'


def read_classes(folder: Path, masks: int) -> tuple[str, ...]:
    """The class of the things in an instance folder, in words: one for all, or one for each mask.

    Empty where there is no ``instance.json``. Raises UserError for one that cannot be used.
    """
    file = folder / DESCRIPTION
    if not (file.exists() or file.is_symlink()):
        return ()
    found = read_json(file, {"class": (str, [str])}, ADVICE)
    if unknown := found.keys() - {"class"}:
        raise UserError(f"{file} has a {min(unknown)!r}, which nothing reads; {ADVICE}")
    classes = check_classes(found["class"], str(file))
    if len(classes) not in (1, masks):
        raise UserError(f"{file} has {len(classes)} classes for {masks} masks; {ADVICE}")
    return classes


def check_classes(found: str | Sequence[str], name: str) -> tuple[str, ...]:
    """Classes as ``read_classes`` returns them; ``name`` is what a message calls their place."""
    classes = tuple(" ".join(each.split()) for each in ([found] if type(found) is str else found))
    for each in classes or ("",):
        if not each or ASSET.search(each):
            raise UserError(f"{name}: {each!r} is no class; {ADVICE}")
        check_prompt(each, name)
    return classes


def class_prompt(classes: Sequence[str]) -> str:
    """The prompt of the class images: "a photo of a cat and an owl"; each class once."""
    named = dict.fromkeys(classes)
    return f"a photo of {' and '.join(f'{_article(each)} {each}' for each in named)}"


def _article(word: str) -> str:
    return "an" if word[0].lower() in "aeiou" else "a"
