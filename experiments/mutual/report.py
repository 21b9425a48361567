"""The table of six trainings."""

import json
from pathlib import Path

from experiments.mutual.variants import VARIANTS
from imagelab.evaluation.report import mean_interval
from imagelab.io.atomic import written_aside
from mige.method.wording import TASKS
from toybox.mige.evaluation.report import share_of

ROWS, TABLE = "rows.jsonl", "mutual.md"
TITLES = {"subject": "subjects", "edit": "edits", "subject_edit": "edits with a subject"}


def write_mutual(work: Path) -> str:
    """Put the rows of all variants into one file, and the table beside it; the table."""
    rows = []
    for name in VARIANTS:
        for path in sorted(work.glob(f"{name}-*/rows.jsonl")):
            seed = int(path.parent.name.rpartition("-")[2])
            lines = path.read_text(encoding="utf-8").splitlines()
            rows += [{"variant": name, "seed": seed, **json.loads(line)} for line in lines]
    table = table_of(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in ((ROWS, text), (TABLE, table + "\n")):
        with written_aside(work / name) as aside:
            aside.write_text(content, encoding="utf-8")
    return table


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
        cells = [_share([row for row in own if row["task"] == task]) for task in TASKS]
        seeds = len({row["seed"] for row in own})
        lines.append(f"| {variant.title} | {seeds} | " + " | ".join(cells) + f" | {_l1(own)} |")
    return "\n".join(lines)


def _share(rows: list[dict]) -> str:
    found = share_of(rows, "right")
    if found is None:
        return "–"
    return f"{found['share']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def _l1(rows: list[dict]) -> str:
    """Of edits, and the autoencoder's own beside it."""
    mean = mean_interval([row["l1"] for row in rows if "l1" in row])
    if mean is None:
        return "–"
    own = mean_interval([row["autoencoder_l1"] for row in rows if "autoencoder_l1" in row])
    half = "" if mean.half is None else f" ± {mean.half:.3f}"
    return f"{mean.mean:.3f}{half} ({own.mean:.3f})"
