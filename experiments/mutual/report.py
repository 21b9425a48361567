"""The tables of all trainings."""

import json
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from experiments.mutual.variants import VARIANTS
from imagelab.evaluation.report import mean_interval
from imagelab.io.atomic import written_aside
from mige.method.wording import TASKS
from toybox.mige.evaluation.report import share_text, wilson

ROWS, ERRORS, TABLE = "rows.jsonl", "errors.jsonl", "mutual.md"
TITLES = {"subject": "subjects", "edit": "edits", "subject_edit": "edits with a subject"}
NOTE = """\
An item counts once: what several seeds of a training found of it is averaged first. Shares are of
what is right, with 95% intervals over items: Wilson's of one seed, Student's of several (Wilson's
where all items are alike). L1 is that outside of what changes, with Student's, and in brackets the
autoencoder's own. Intervals say nothing of other seeds of a training."""


def write_mutual(work: Path) -> str:
    """Put the rows of all variants into one file, their errors into another; the tables of both."""
    rows, errors = (read_all(work, name) for name in (ROWS, ERRORS))
    tables = "\n\n".join(filter(None, (table_of(rows), NOTE, error_table(errors))))
    write_lines(work / ROWS, rows)
    write_lines(work / ERRORS, errors)
    with written_aside(work / TABLE) as aside:
        aside.write_text(tables + "\n", encoding="utf-8")
    return tables


def read_all(work: Path, file: str) -> list[dict]:
    """The lines of a file of all variants and seeds."""
    found = []
    for name in VARIANTS:
        for path in sorted(work.glob(f"{name}-*/{file}")):
            seed = int(path.parent.name.rpartition("-")[2])
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [{"variant": name, "seed": seed, **json.loads(line)} for line in lines]
    return found


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    """A file of JSON lines, which appears when it is whole."""
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table_of(rows: list[dict]) -> str:
    """Shares of what is right by task, and L1 outside of what changes, with 95% intervals.

    Intervals are over items, which are averaged over the seeds of a training first: they say
    nothing of other seeds. Those of shares are Wilson's where there is one seed, and Student's
    where there are several; see :func:`share_over_items`.
    """
    lines = [
        "| trained | seeds | " + " | ".join(TITLES[task] for task in TASKS) + " | L1 outside |"
    ]
    lines.append("|---|---|" + "---|" * (len(TASKS) + 1))
    for name, variant in VARIANTS.items():
        own = [row for row in rows if row["variant"] == name]
        if not own:
            continue
        cells = [
            share_text(share_over_items([row for row in own if row["task"] == task]))
            for task in TASKS
        ]
        seeds = len({row["seed"] for row in own})
        lines.append(f"| {variant.title} | {seeds} | " + " | ".join(cells) + f" | {_l1(own)} |")
    return "\n".join(lines)


def share_over_items(rows: Sequence[dict]) -> dict | None:
    """The share of what is right, its 95% interval and the number of items; None for no row.

    An item that several seeds have painted counts once, with the share of the seeds that were
    right. The interval is Wilson's where there is one seed. Where there are several it is
    Student's, cut off at 0 and 1; if all items are alike, which Student's would take for certain,
    Wilson's.
    """
    if not rows:
        return None
    shares = list(_over_seeds((_item(row), row["checks"]["right"]) for row in rows).values())
    is_alone = len({row["seed"] for row in rows}) == 1
    if is_alone or len(set(shares)) == 1:
        low, high = wilson(sum(shares), len(shares))
    else:
        mean, half = mean_interval(shares)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"share": sum(shares) / len(shares), "low": low, "high": high, "n": len(shares)}


def _l1(rows: Sequence[dict]) -> str:
    """Of edits, and the autoencoder's own beside it; see :func:`share_over_items` for seeds."""
    mean, own = (
        mean_interval(
            list(_over_seeds((_item(row), row[name]) for row in rows if name in row).values())
        )
        for name in ("l1", "autoencoder_l1")
    )
    if mean is None:
        return "–"
    half = "" if mean.half is None else f" ± {mean.half:.3f}"
    return f"{mean.mean:.3f}{half} ({own.mean:.3f})"


def _item(row: dict) -> tuple[str, int]:
    """What a painted item is known by, in every variant and seed."""
    return row["row"], row["index"]


def _over_seeds(values: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """The mean of each item's values, of which it has one a seed."""
    found: dict[Hashable, list[float]] = {}
    for item, value in values:
        found.setdefault(item, []).append(value)
    return {item: sum(each) / len(each) for item, each in found.items()}


def error_table(errors: Sequence[dict]) -> str:
    """Errors of held-out triplets, and by how much they are above those of all tasks together.

    A triplet is compared with itself, and the mean difference told as a share of the mean error,
    with Student's 95% interval over triplets.
    """
    if not errors:
        return ""
    means = {
        (name, task): means_of(errors, name, task) for name in VARIANTS for task in TASKS
    }  # by place
    head = ["trained", *(f"error of {TITLES[task]}" for task in TASKS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, variant in VARIANTS.items():
        own = [means[name, task] for task in TASKS]
        if any(own):
            base = [means["together", task] for task in TASKS]
            cells = [_error(*pair) for pair in zip(own, base, strict=True)]
            lines.append(f"| {variant.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means_of(errors: Sequence[dict], variant: str, task: str) -> dict[int, float]:
    """The error of each triplet of a task by its place, over the seeds of a variant."""
    return _over_seeds(
        (row["place"], row["error"])
        for row in errors
        if row["variant"] == variant and row["task"] == task
    )


def _error(own: dict[int, float], base: dict[int, float]) -> str:
    if not own:
        return "–"
    text = f"{sum(own.values()) / len(own):.4f}"
    if own == base or own.keys() != base.keys():
        return text
    mean = sum(base.values()) / len(base)
    rise = mean_interval([100 * (own[place] - base[place]) / mean for place in own])
    half = "" if rise.half is None else f" ± {rise.half:.1f}"
    return text + f" ({rise.mean:+.1f}%{half})"
