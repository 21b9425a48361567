"""Items painted in batches and judged, one record each, so that a stopped evaluation goes on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from imagelab.evaluation.runner import Records
from imagelab.io.atomic import written_aside
from toybox.classifier.network import Classifier, classifier_digest, load_classifier
from toybox.mige import judge
from toybox.mige.evaluation.items import Item, draw_items
from toybox.mige.evaluation.painters import MigePainter, Painter, StandIn, stand_ins
from toybox.scenes import triplet_files

RECORDS, PICTURES = "records.jsonl", "pictures"


@dataclass(frozen=True)
class Findings:
    """All records, in the order of their items.

    Attributes:
        rows: of what the model painted, by row.
        trials: of the judge, by stand-in and row.
    """

    rows: dict[str, list[dict]]
    trials: dict[StandIn, dict[str, list[dict]]]


def evaluate(
    painter: MigePainter,
    rows: Sequence[str],
    items: int,
    calibration: int,
    seed: int,
    output: Path,
) -> Findings:
    """Paint and judge what has no record yet, the judge's own trials first.

    A picture that was removed is painted again; of its two records the later one counts.

    Args:
        items: of each row; of a trial ``calibration``.
    """
    records = Records(output / RECORDS, "--output")
    records.forget_without(output / PICTURES)
    classifier = load_classifier()
    work = [
        (each, row, min(calibration, items))
        for each in stand_ins(painter, seed)
        for row in rows
        if each.has(row) and calibration
    ] + [(painter, row, items) for row in rows]
    found = []
    with tqdm(total=sum(count for *_, count in work), desc="items", unit="item") as bar:
        for who, row, count in work:
            keys = [key_of(who, row, index, seed) for index in range(count)]
            todo = [index for index, key in enumerate(keys) if judged(key) not in records.found]
            bar.set_postfix_str(row)
            bar.update(count - len(todo))
            for batch in draw_items(seed, row, todo, painter.batch_size):
                folder = output / PICTURES / row if who is painter else None
                pictures = _pictures(who, batch, [keys[item.index] for item in batch], folder)
                own = [None] * len(batch)
                if folder and batch[0].triplet.mask is not None:
                    own = painter.restore([item.triplet.target for item in batch])
                for item, picture, restored in zip(batch, pictures, own, strict=True):
                    key = keys[item.index]
                    facts = {"key": judged(key), "row": row, "index": item.index}
                    if folder:
                        facts["picture"] = f"{row}/{_file(item, key)}"
                    records.add(facts | measure(classifier, item, picture, restored))
                    bar.update()
            found.append((who, row, [records.found[judged(key)] for key in keys]))
    trials = {who: {} for who, *_ in found if who is not painter}
    for who, row, each in found:
        if who is not painter:
            trials[who][row] = each
    return Findings({row: each for who, row, each in found if who is painter}, trials)


def measure(
    classifier: Classifier, item: Item, picture: Image.Image, restored: Image.Image | None
) -> dict:
    """What is found of a picture, for JSON.

    Args:
        restored: the target as the autoencoder alone gives it back; None: L1 is not measured.
    """
    triplet = item.triplet
    found = {
        "wording": item.wording, "text": item.text,
        "checks": judge.judge(classifier, picture, triplet),
    }  # fmt: skip
    if restored is not None:
        for name, each in (("l1", picture), ("autoencoder_l1", restored)):
            found[name] = judge.l1(each, triplet.target, ~triplet.mask)
    return found


def key_of(painter: Painter, row: str, index: int, seed: int) -> str:
    """A hash of all that a picture depends on."""
    facts = [triplet_files.VERSION, row, index, seed, painter.facts(row)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def judged(key: str) -> str:
    """The key of a picture's record, which depends on the judge as well."""
    return hashlib.sha256(f"{key} {judge.VERSION} {classifier_digest()}".encode()).hexdigest()[:16]


def _file(item: Item, key: str) -> str:
    return f"{item.index:05d}-{key}.png"


def _pictures(
    painter: Painter, items: Sequence[Item], keys: Sequence[str], folder: Path | None
) -> list[Image.Image]:
    """Pictures of items; with a folder those that are not there yet are painted and kept."""
    if folder is None:
        return painter.paint(items)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / _file(item, key) for item, key in zip(items, keys, strict=True)]
    kept = [_read(path) for path in paths]
    missing = [at for at, picture in enumerate(kept) if picture is None]
    painted = painter.paint([items[at] for at in missing]) if missing else []
    for at, picture in zip(missing, painted, strict=True):
        kept[at] = picture
        with written_aside(paths[at]) as aside:
            picture.save(aside, "PNG")
    return kept


def _read(path: Path) -> Image.Image | None:
    """A kept picture; None where it is missing or damaged."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError):
        return None
