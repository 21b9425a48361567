"""What was found: report.json, report.md, and a sheet of pictures for each row."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from imagelab.evaluation.report import mean_interval
from imagelab.io.atomic import write_json, written_aside
from imagelab.io.pictures import Tile, contact_sheet
from mige.method.wording import readable
from toybox.mige.evaluation.items import MOST_L1, ROWS, draw_item
from toybox.mige.evaluation.running import PICTURES, Findings

SHEET_ITEMS = 24
Z = 1.959964  # of a 95% interval
#: Rows over several others: a title, what rows begin with, and the wording.
TOGETHER = (
    ("all edits", "edit-", None),
    ("all edits, with the mark", "edit-", "mark"),
    ("all edits, without a mark", "edit-", "plain"),
    ("all subject edits", "subject-edit-", None),
)
CHECKS = ("right", "kind", "hue", "change", "others", "alone", "crisp", "ground")
L1 = {"l1": "L1 outside", "autoencoder_l1": "the autoencoder's L1"}
EXPLAINED = """\
right: all checks but ground. kind, hue: each toy asked for is there, its hue within 25 degrees.
change: the asked change is there. others: all other toys read right in their places. alone: nothing
else is there. crisp: toys show at least 0.35 of the target's detail, which a blur does not. ground:
of subjects whose prompt names one. L1: of values from 0 to 1, outside of what the edit changes;
beside it that of the target through the autoencoder alone. Shares with 95% intervals (Wilson), L1
with 95% intervals (Student). A toy that is added without a word about the place may be anywhere for
"right", and L1 is then that of the place where training puts it."""


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share, square = hits / count, Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = (share * (1 - share) * square + square**2 / 4) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of(records: Sequence[dict], check: str) -> dict | None:
    """A check's share, its interval and its number of items; None where no item has it."""
    values = [record["checks"][check] for record in records if check in record["checks"]]
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return {"share": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


def summarise(records: Sequence[dict]) -> dict:
    """A row of the report, for JSON."""
    found: dict = {"n": len(records)}
    for check in CHECKS:
        if share := share_of(records, check):
            found[check] = share
    for name in L1:
        if mean := mean_interval([record[name] for record in records if name in record]):
            found[name] = mean._asdict()
    return found


def all_rows(rows: dict[str, list[dict]]) -> Iterator[tuple[str, dict, list[dict]]]:
    """Title, aims and records of each row, those over several behind them."""
    for row, records in rows.items():
        yield ROWS[row].title, ROWS[row].aims, records
    for title, start, wording in TOGETHER:
        own = [row for row in rows if row.startswith(start)]
        records = [
            record for row in own for record in rows[row] if wording in (None, record["wording"])
        ]
        if len(own) > 1 and records:
            most = {"l1": MOST_L1} if wording is None else {}  # L1 is an aim of all together
            yield title, ROWS[own[0]].aims | most, records


# ----------------------------------------------------------------------------------------------
# what is written


def write_report(found: Findings, settings: dict, output: Path) -> str:
    """Write all into a folder; the report as Markdown."""
    rows = [(title, aims, summarise(records)) for title, aims, records in all_rows(found.rows)]
    trials = {
        who.title: {ROWS[row].title: share_of(each, "right") for row, each in several.items()}
        for who, several in found.trials.items()
    }
    text = markdown(settings, rows, trials)
    facts = {
        "settings": settings,
        "rows": {title: {**row, "aims": aims} for title, aims, row in rows},
        "calibration": trials,
        "items": found.rows,
    }
    write_json(output / "report.json", facts)
    with written_aside(output / "report.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    for row, records in found.rows.items():
        with written_aside(output / f"sheet-{row}.png") as path:
            sheet(row, records, settings["seed"], output / PICTURES).save(path, "PNG")
    return text


def markdown(settings: dict, rows: Sequence[tuple[str, dict, dict]], trials: dict) -> str:
    """The report's tables."""
    names = [name for name in CHECKS if any(name in row for *_, row in rows)]
    means = [name for name in L1 if any(name in row for *_, row in rows)]
    lines = ["# How good a toy MIGE is", "", *_told(settings), ""]
    lines += _table(["row", "n", "aim", *names, *(L1[name] for name in means)], [
        [
            title, str(row["n"]), _aims(aims),
            *(share_text(row.get(name)) for name in names),
            *(_mean(row.get(name)) for name in means),
        ]
        for title, aims, row in rows
    ])  # fmt: skip
    lines += ["", EXPLAINED]
    if trials:
        titles = list(dict.fromkeys(title for each in trials.values() for title in each))
        lines += ["", "## The judge itself: what it calls right", ""]
        lines += _table(["row", *trials], [
            [title, *(share_text(each.get(title)) for each in trials.values())] for title in titles
        ])  # fmt: skip
    return "\n".join(lines)


def _told(settings: dict) -> list[str]:
    """The settings in a line each."""
    told = {name: value for name, value in settings.items() if name != "guidance"}
    lines = [f"- {name}: {value}" for name, value in told.items()]
    for task, how in settings["guidance"].items():
        lines.append(f"- {task}: " + ", ".join(f"{name} {value}" for name, value in how.items()))
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _aims(aims: dict[str, float]) -> str:
    return ", ".join(
        f"L1 ≤ {aim}" if name == "l1" else f"{name} ≥ {aim:.0%}" for name, aim in aims.items()
    )


def share_text(found: dict | None) -> str:
    """A share and its interval, as :func:`share_of` gives them; a dash where there is none."""
    if found is None:
        return "–"
    return f"{found['share']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def _mean(found: dict | None) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:.4f}" + ("" if found["half"] is None else f" ± {found['half']:.4f}")


def sheet(row: str, records: Sequence[dict], seed: int, folder: Path) -> Image.Image:
    """The first items of a row, two a line: what was given, the target, what was painted.

    Args:
        folder: where the records' pictures are.
    """
    tiles, columns = [], 1
    for record in records[:SHEET_ITEMS]:
        item = draw_item(seed, row, record["index"])
        triplet = item.triplet
        wrong = [name for name, value in record["checks"].items() if not value and name != "right"]
        names = [
            "source" if place == triplet.source else f"<image> {place + 1}"
            for place in range(len(triplet.entities))
        ]
        text = readable(item.text)
        is_right = record["checks"]["right"]
        line = [
            *(Tile(p, name) for p, name in zip(triplet.entities, names, strict=True)),
            Tile(triplet.target, "target"),
            Tile(
                folder / record["picture"],
                (f"[{', '.join(wrong)}] " if wrong else "") + text,
                "black" if is_right else "red",
            ),
        ]
        columns = len(line)
        tiles += line
    return contact_sheet(tiles, columns * 2, 128)
