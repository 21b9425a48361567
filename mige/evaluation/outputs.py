"""Outputs, each matched to its item: numbered as `mige.generate` and `mige.edit` paint lists, or
named as the release does."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from imagelab.errors import UserError, shorten
from imagelab.io.images import open_picture
from imagelab.io.tensors import read_json
from mige.evaluation.formats import SUFFIXES
from mige.evaluation.item import BenchItem
from mige.painting import RUN

ADVICE = "give the folder that was painted from this bench with --outputs"
RUN_FORM = {"items": int}
#: What a picture's JSON file says of the item that it is of.
FACTS = {
    "item": int, "text": str, "source": (None, int), "is_global": bool, "pictures_sha256": [str],
    "seed": int, "first_seed": int,
}  # fmt: skip
FOLDER = re.compile(r"\w[\w .-]*")  # a task by which a folder may be called
MOST_PICTURES = 10_000  # of an item
Digests = Mapping[Path, str]


@dataclass(frozen=True)
class Output:
    """A picture that was painted, or is missing.

    Attributes:
        place: of its item in the bench; ``index``: which of the item's pictures it is.
        sha256: of the file; None where there is no picture to measure.
        reason: why there is none.
    """

    place: int
    index: int
    path: Path
    sha256: str | None = None
    reason: str = ""


def find_outputs(
    items: Sequence[BenchItem], folder: Path, digests: Digests, tasks: Collection[str] = ()
) -> list[Output]:
    """The outputs of items, in their order; also those that are missing.

    Where there is a folder for each task, such as ``add`` and ``replace``, each is for its own.

    Args:
        digests: sha256 of the items' pictures.
        tasks: whose outputs are asked for; none: all tasks'.

    Raises:
        UserError: the outputs are of another list.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {ADVICE}")
    wanted = [at for at, each in enumerate(items) if not tasks or each.task in tasks]
    places: dict[str, list[int]] = {}
    for at in wanted:
        places.setdefault(items[at].task, []).append(at)
    parts: dict[Path, Sequence[int]]
    others: set[str] = set()  # names of outputs beside those that are asked for
    apart = [task for task in places if FOLDER.fullmatch(task) and (folder / task).is_dir()]
    if apart and not (folder / RUN).is_file():
        if missing := [task for task in places if task not in apart]:
            raise UserError(
                f"{folder} has a folder {apart[0]} and none for the task {missing[0]}; {ADVICE}, "
                "or name with --task what is to be measured"
            )
        parts = {folder / task: mine for task, mine in places.items()}
    elif painted_count(folder) is None:
        parts = {folder: wanted}
        others = {each.release_name for each in items if tasks and each.task not in tasks}
    else:  # whose numbers are those of the whole list
        parts = {folder: range(len(items))}
    found: list[Output] = []
    for part, mine in parts.items():
        asked = [items[at] for at in mine]
        if painted_count(part) is None:
            matched = _named(asked, part, digests, others)
        else:
            matched = _numbered(asked, part, digests)
        found += [replace(output, place=mine[output.place]) for output in matched]
    found = [output for output in found if not tasks or items[output.place].task in tasks]
    found.sort(key=lambda each: (each.place, each.index))
    return [_read(each) for each in tqdm(found, "outputs", unit=" pictures")]


def _read(output: Output) -> Output:
    """An output with its digest, or why it cannot be read."""
    if output.reason:
        return output
    try:
        sha256 = open_picture(output.path).sha256
    except UserError as error:
        return replace(output, reason=str(error))
    return replace(output, sha256=sha256)


# ----------------------------------------------------------------------------------------------
# numbered, with facts


def painted_count(folder: Path) -> int | None:
    """How many items the list had that numbered outputs were painted from; None: it is not told."""
    path = folder / RUN
    return read_json(path, RUN_FORM, ADVICE)["items"] if path.is_file() else None


def _numbered(items: Sequence[BenchItem], folder: Path, digests: Digests) -> Iterator[Output]:
    """Picture j of item i has the number i · num_images + j; none of another list is among them."""
    count = painted_count(folder)
    if count != len(items):
        raise UserError(
            f"{folder} was painted from a list of {count} items, and the bench has {len(items)}; "
            f"{ADVICE}"
        )
    files = [p for p in folder.glob("*.json") if re.fullmatch("[0-9]{4,12}", p.stem)]
    told = {int(path.stem): read_json(path, FACTS, ADVICE) for path in sorted(files)}
    each = 1 + max((facts["seed"] - facts["first_seed"] for facts in told.values()), default=0)
    if not 0 < each <= MOST_PICTURES:
        raise UserError(f"{folder} holds {each} pictures of an item; {ADVICE}")
    for number, facts in told.items():
        path = folder / f"{number:04d}.json"
        place, index = divmod(number, each)
        own = facts["item"], facts["seed"] - facts["first_seed"]
        if place >= len(items) or own != (place, index):
            raise UserError(f"{path} is of picture {own[1]} of item {own[0]}, which has another "
                            f"number; {ADVICE}")  # fmt: skip
        check_facts(facts, items[place], path, digests)
    for place in range(len(items)):
        for index in range(each):
            number = place * each + index
            path = folder / f"{number:04d}.png"
            reason = "" if path.is_file() else "there is no such file"
            if not reason and number not in told:
                reason = f"there is no {number:04d}.json, which tells what it is of"
            yield Output(place, index, path, reason=reason)


def check_facts(facts: Mapping, item: BenchItem, path: Path, digests: Digests) -> None:
    """Raises UserError unless a picture was painted from this item."""
    own = item.item
    if facts["text"] != own.text:
        raise UserError(
            f"{path} was painted from {shorten(facts['text'])!r}, and the bench says "
            f"{shorten(own.text)!r}; {ADVICE}"
        )
    pictures = [digests[each] for each in own.paths]
    if facts["pictures_sha256"] != pictures or facts["source"] != own.source:
        raise UserError(f"{path} was painted from other pictures than the bench has; {ADVICE}")
    if facts["is_global"] != own.is_global:
        raise UserError(f"{path} was painted as another kind of edit; {ADVICE}")


# ----------------------------------------------------------------------------------------------
# the release's names


def _named(
    items: Sequence[BenchItem], folder: Path, digests: Digests, others: Set[str]
) -> Iterator[Output]:
    """Edits are called {idx}; subjects {first picture}_{text}_{seed}, of one or more seeds.

    Args:
        others: names of outputs that are not asked for.
    """
    names = Counter(each.release_name for each in items)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"{names[twice[0]]} items of the bench have the output {shorten(twice[0])}; put the "
            "outputs of each task into a folder called by it, paint them with --items, or name "
            "one task with --task"
        )
    places = {each.release_name: place for place, each in enumerate(items)}
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name, seed = path.stem, 0
        if name not in places and (with_seed := re.fullmatch(r"(.*)_([0-9]{1,20})", name, re.S)):
            name, seed = with_seed[1], int(with_seed[2])
        place = places.get(name)
        if place is None and not others.isdisjoint((name, path.stem)):
            continue
        if place is None or (items[place].source is None) == (name == path.stem):
            raise UserError(
                f"{folder} holds {shorten(path.name)}, which is the output of no item of the "
                f"bench; {ADVICE}"
            )
        if seed in (mine := found.setdefault(place, {})):
            raise UserError(f"{folder} holds {mine[seed].name} and {path.name}; leave one of them")
        mine[seed] = path
        beside = path.with_suffix(".json")
        if beside.is_file():
            check_facts(read_json(beside, FACTS, ADVICE), items[place], beside, digests)
    for place, item in enumerate(items):
        if place not in found:
            end = ".jpg" if item.source is not None else "_{seed}.jpg"
            path = folder / f"{item.release_name}{end}"
            yield Output(place, 0, path, reason="there is no such file")
        for index, seed in enumerate(sorted(found.get(place, {}))):
            yield Output(place, index, found[place][seed])
