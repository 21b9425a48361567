"""What is trained: all tasks together, each alone, and all without a part of their pictures."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imagelab.io.atomic import folder_lock, replacing, write_json, written_aside
from mige.folder import PARTS
from mige.method.wording import TASKS, split
from toybox.scenes.wording import noun


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        tasks: that it is trained and measured on.
        reads_latents: whether the fusion reads the autoencoder's features of pictures.
        reads_pictures: whether pictures stand in the instruction; else words stand for them.
        times: how many times as long as the others it is trained.
    """

    title: str
    tasks: tuple[str, ...] = TASKS
    reads_latents: bool = True
    reads_pictures: bool = True
    times: int = 1


VARIANTS = {
    "together": Variant("all tasks together"),
    "subject": Variant("subjects alone", ("subject",)),
    "edit": Variant("edits alone", ("edit",)),
    "subject_edit": Variant("edits with a subject alone", ("subject_edit",)),
    # so that it sees as many samples of each task as those that are trained on it alone
    "longer": Variant("all tasks together, three times as long", times=len(TASKS)),
    "no_latents": Variant("without the autoencoder's features", reads_latents=False),
    "no_pictures": Variant("without pictures in the instruction", reads_pictures=False),
}


def write_list(variant: Variant, triplets: Path, target: Path) -> None:
    """The list that a variant is trained on, out of that of a folder of triplets."""
    records = json.loads((triplets / "triplets.json").read_text(encoding="utf-8"))
    records = [record for record in records if record["task"] in variant.tasks]
    if not variant.reads_pictures:
        records = [record_in_words(record) for record in records]
    with written_aside(target) as aside:
        aside.write_text(json.dumps(records), encoding="utf-8")


def record_in_words(record: Mapping) -> dict:
    """A record whose instruction says in words what its pictures show; its source stays."""
    source = record["source_path"][0] if record["source_path"] else None
    place = record["entity_path"].index(source) if source else None
    facts = record["facts"]
    kinds = {toy["reference"]: toy["kind"] for toy in facts["toys"] if toy["reference"] is not None}
    text = in_words(record["multi_prompt"], facts["instruction"], place, kinds)
    return {**record, "multi_prompt": text, "entity_path": []}


def in_words(prompt: str, plain: str | None, source: int | None, kinds: Mapping[int, str]) -> str:
    """An instruction without pictures: the plain one, or with the kinds of what they show.

    Args:
        plain: the instruction that people write without a mark; None: there is none.
        source: which mark is the picture to edit; ``kinds``: of the toys of the others.
    """
    if plain is not None:
        return plain
    first, *others = split(prompt)
    words = first
    for place, text in enumerate(others):
        shown = "the picture" if place == source else noun(kinds[place])
        words += f" {shown} {text}"
    return " ".join(words.split())


def write_start(variant: Variant, begun: Path, target: Path) -> None:
    """The model that a variant begins with: that of all, whose fusion may read no latents."""
    if target.is_dir():
        return
    with folder_lock(target, "--work"), replacing(target) as aside:
        shutil.copytree(begun, aside, dirs_exist_ok=True)
        path = aside / "fusion" / PARTS["fusion"].config
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, config | {"reads_latents": variant.reads_latents})
