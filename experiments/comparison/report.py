"""What a comparison found: a table with intervals, JSON, a contact sheet, confusion matrices."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from experiments.comparison.settings import Settings, Variant
from imagelab.evaluation.report import (
    Mean,
    as_json,
    confusion_figure,
    mean_interval,
    over_all,
    summarise,
    total_confusion,
)
from imagelab.evaluation.report import sheet as contact_sheet
from imagelab.evaluation.runner import PICTURES, Case
from imagelab.io.atomic import written_aside
from mifo.tokens import asset_token

SPACE = "toybox"
IDENTITY = f"{SPACE}: right instance"
#: The measures of the table, by their name in a summary, and how its columns call them.
MEASURES = {
    IDENTITY: "right instance",
    f"{SPACE}: margin": "margin",
    "IoU with the box": "IoU with the box",
    "leakage": "leakage",
    "separation": "separation",
}
BASE = "mifo"  # the variant that the others are compared with
SHEET_ROWS = 8


@dataclass(frozen=True)
class Result:
    """Of one folder in one variant: the record of each picture, the separation of each asset."""

    records: list[dict]
    separation: list[float]

    @property
    def chance(self) -> float:
        """Accuracy of a guess: one of so many instances."""
        return 1 / len(self.records[0]["spaces"][SPACE]["similarities"][0])

    def summary(self) -> dict[str, Mean | None]:
        """Means over the pictures; the separation is a mean over the assets."""
        row = summarise(self.records)
        row["separation"] = Mean(sum(self.separation) / len(self.separation), None)
        return {name: row[name] for name in MEASURES}


@dataclass(frozen=True)
class Comparison:
    """All that is known so far.

    results: by the variant's name and the folder's; failures: sentences by "variant, folder".
    """

    settings: Settings
    variants: Sequence[Variant]
    results: Mapping[str, Mapping[str, Result]]
    failures: Mapping[str, str]


def chance(results: Mapping[str, Mapping[str, Result]]) -> float:
    """Mean accuracy of guesses over all folders of a comparison."""
    folders = {name: result.chance for each in results.values() for name, result in each.items()}
    return sum(folders.values()) / len(folders)


def difference(one: Mapping[str, Result], other: Mapping[str, Result]) -> Mean | None:
    """Identity accuracy of one variant less another's, over the folders that both have."""
    pairs = [(one[name].summary(), other[name].summary()) for name in one if name in other]
    return mean_interval([a[IDENTITY].mean - b[IDENTITY].mean for a, b in pairs])


# ----------------------------------------------------------------------------------------------
# what is written


def write_comparison(found: Comparison, work: Path, case_of: Callable[[str], Case]) -> None:
    """Write comparison.md and comparison.json, and of any results sheet.png and confusion.png.

    case_of: what is painted of a folder, by its name.
    """
    texts = {"comparison.md": markdown(found), "comparison.json": as_text(found)}
    for name, text in texts.items():
        with written_aside(work / name) as path:
            path.write_text(text + "\n", encoding="utf-8")
    if not found.results:
        return
    matrices = {name: _confusion(each) for name, each in found.results.items()}
    with written_aside(work / "confusion.png") as path:
        labels = [asset_token(index) for index in range(max(map(len, matrices.values())))]
        confusion_figure(path, matrices, labels)
    shown = set.intersection(*(set(each) for each in found.results.values()))
    if shown:
        cases = [case_of(name) for name in sorted(shown)[:: -(-len(shown) // SHEET_ROWS)]]
        with written_aside(work / "sheet.png") as path:
            sheet(found.results, cases, work / "evaluation").save(path, "PNG")


def markdown(found: Comparison) -> str:
    """The table: a row for each variant that has results; then how to read it, and what failed."""
    names = list(MEASURES.values())
    heads = ["variant", "folders", names[0], f"… less {BASE}'s", *names[1:]]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rows = {
        row.name: found.results[row.name] for row in found.variants if row.name in found.results
    }
    texts = {row.name: row.text for row in found.variants}
    for name, each in rows.items():
        means = list(over_all([result.summary() for result in each.values()]).values())
        apart = difference(each, rows[BASE]) if name != BASE and BASE in rows else None
        cells = ["–" if value is None else str(value) for value in (means[0], apart, *means[1:])]
        lines.append(f"| {texts[name]} (`{name}`) | {len(each)} | {' | '.join(cells)} |")
    if rows:
        lines += ["", _legend(found)]
    lines += [f"\n{where} failed: {why}" for where, why in found.failures.items()]
    return "\n".join(lines)


def _legend(found: Comparison) -> str:
    return (
        f"Each folder counts with its mean over {found.settings.seeds} pictures; shown are the "
        "means over the folders, ± half of Student's 95% interval. Right instance: share of the "
        f"boxes whose crop is nearest to its own instance, a guess has {chance(found.results):.3f} "
        f"(… less {BASE}'s: by folder). Margin: how much nearer. Leakage: share of the objects "
        "outside the boxes. Separation: share of an asset's attention, among the instances of the "
        "photo, on its own."
    )


def as_text(found: Comparison) -> str:
    """Everything that the table is made of, as JSON."""
    texts = {row.name: row.text for row in found.variants}
    rows = {}
    for name, each in found.results.items():
        summaries = {folder: result.summary() for folder, result in each.items()}
        rows[name] = {
            "text": texts[name],
            "folders": {folder: as_json(summary) for folder, summary in summaries.items()},
            "all": as_json(over_all(list(summaries.values()))),
            "confusion": _confusion(each).tolist(),
        }
        if BASE in found.results:
            rows[name] |= as_json({"less_base": difference(each, found.results[BASE])})
    facts = {
        "settings": asdict(found.settings),
        "base": BASE,
        "chance": chance(found.results) if found.results else None,
        "variants": rows,
        "failures": dict(found.failures),
    }
    return json.dumps(facts, indent=2)


def _confusion(each: Mapping[str, Result]):
    return total_confusion([r for result in each.values() for r in result.records], SPACE)


def sheet(
    results: Mapping[str, Mapping[str, Result]], cases: Sequence[Case], evaluation: Path
) -> Image.Image:
    """A row for each folder: its photo, then its first picture in each variant, all of one seed."""
    records = []
    for case in cases:
        first = {variant: each[case.name].records[0] for variant, each in results.items()}
        records.append(
            [
                record | {"picture": f"{variant}/{case.name}/{PICTURES}/{record['picture']}"}
                for variant, record in first.items()
            ]
        )
    return contact_sheet(cases, records, evaluation, list(results))
