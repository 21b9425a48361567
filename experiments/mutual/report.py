"""The tables of six trainings."""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.mutual.variants import VARIANTS
from imagelab.evaluation.report import mean_interval
from imagelab.io.atomic import written_aside
from mige.method.wording import TASKS
from toybox.mige.evaluation.report import share_of, share_text

ROWS, ERRORS, TABLE = "rows.jsonl", "errors.jsonl", "mutual.md"
TITLES = {"subject": "subjects", "edit": "edits", "subject_edit": "edits with a subject"}


def write_mutual(work: Path) -> str:
    """Put the rows of all variants into one file, their errors into another; the tables of both."""
    rows, errors = (read_all(work, name) for name in (ROWS, ERRORS))
    tables = "\n\n".join(filter(None, (table_of(rows), error_table(errors))))
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
    """Shares of what is right by task, with Wilson's 95% intervals; L1 outside of what changes.

    Intervals are those of the items: they say nothing of other seeds of a training.
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
            share_text(share_of([row for row in own if row["task"] == task], "right"))
            for task in TASKS
        ]
        seeds = len({row["seed"] for row in own})
        lines.append(f"| {variant.title} | {seeds} | " + " | ".join(cells) + f" | {_l1(own)} |")
    return "\n".join(lines)


def _l1(rows: list[dict]) -> str:
    """Of edits, and the autoencoder's own beside it."""
    mean = mean_interval([row["l1"] for row in rows if "l1" in row])
    if mean is None:
        return "–"
    own = mean_interval([row["autoencoder_l1"] for row in rows if "autoencoder_l1" in row])
    half = "" if mean.half is None else f" ± {mean.half:.3f}"
    return f"{mean.mean:.3f}{half} ({own.mean:.3f})"


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
    found: dict[int, list[float]] = {}
    for row in errors:
        if row["variant"] == variant and row["task"] == task:
            found.setdefault(row["place"], []).append(row["error"])
    return {place: sum(each) / len(each) for place, each in found.items()}


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
