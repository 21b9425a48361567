"""A table (Markdown), the numbers (JSON) and a plot of what was measured."""

import itertools
import json
from math import nan
from pathlib import Path

from benchmarks.measure import CLOCK_NAMES

HEADINGS = (
    "model", "work", "subjects", "images", "precision",
    "plain, ms", "MIFO, ms", "an image", "times faster",
    "plain, MB", "MIFO, MB", "times smaller",
    "MIFO, GFLOP", "GFLOP/s", "floor, ms", "time / floor",
)  # fmt: skip


def write_report(stem: Path, facts: dict, results: list[dict]) -> None:
    """Write ``stem``.md, .json and .png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(
        json.dumps(facts | {"rows": results}, indent=1) + "\n", encoding="utf-8"
    )
    stem.with_suffix(".md").write_text(markdown(facts, results), encoding="utf-8")
    plot(stem.with_suffix(".png"), facts, results)


def markdown(facts: dict, results: list[dict]) -> str:
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in facts["rates"].items()
    )
    clock = CLOCK_NAMES[facts["clock"]]
    lines = [
        f"Made by `{facts['command']}` on {facts['machine']}.",
        "",
        f"Median {clock} of {facts['repeats']} alternating repeats; {facts['steps']} steps of a "
        f"synthesis, and of each stage of a learning; a matrix product reaches {rates}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * 5 + "---:|" * (len(HEADINGS) - 5),
        *(f"| {' | '.join(cells(result))} |" for result in results),
        "",
        *(f"- {line}" for line in by_subjects(results)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def of(result: dict, side: str, what: str) -> float:
    """A number of a side; not a number where the plain path was left out."""
    return result[side][what] if side in result else nan


def by_subjects(results: list[dict]) -> list[str]:
    """How MIFO's time an image grows with the subjects, for rows that differ in them alone."""
    lines = []
    rows = sorted(results, key=lambda result: result["subjects"])
    for few, many in itertools.combinations(rows, 2):
        same = all(few[key] == many[key] for key in ("model", "what", "batch", "precision"))
        if same and few["subjects"] == 1 < many["subjects"]:
            ratio = many["ours"]["seconds"] / few["ours"]["seconds"]
            lines.append(
                f"{few['model']} {few['what']}, {few['batch']} image(s) at once, "
                f"{few['precision']}: {many['subjects']} subjects take {ratio:.2f} times the time "
                "an image of 1"
            )
    return lines


def cells(result: dict) -> list[str]:
    ours, floor = result["ours"], result["floor"]
    plain_seconds, plain_bytes = (of(result, "plain", what) for what in ("seconds", "bytes"))
    numbers = [
        *(str(result[key]) for key in ("model", "what", "subjects", "batch", "precision")),
        f"{1e3 * plain_seconds:.0f}",
        f"{1e3 * ours['seconds']:.0f}",
        f"{1e3 * ours['seconds'] / result['batch']:.0f}",
        f"{plain_seconds / ours['seconds']:.1f}",
        f"{plain_bytes / 2**20:.0f}",
        f"{ours['bytes'] / 2**20:.0f}",
        f"{plain_bytes / ours['bytes']:.1f}",
        f"{ours['operations'] / 1e9:.1f}",
        f"{ours['operations'] / ours['seconds'] / 1e9:.0f}",
        f"{1e3 * floor:.0f}",
        f"{ours['seconds'] / floor:.1f}",
    ]
    return ["–" if number == "nan" else number for number in numbers]


def plot(path: Path, facts: dict, results: list[dict]) -> None:
    """Time and memory of both sides, on logarithmic axes."""
    from matplotlib.figure import Figure

    names = [
        f"{r['model']} {r['what']}, {r['subjects']} subj., {r['batch']} img., {r['precision']}"
        for r in results
    ]
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(results)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    units = (("seconds", 1e3, "milliseconds"), ("bytes", 2**-20, "MB at most"))
    for axis, (key, scale, label) in zip(axes, units, strict=True):
        values = [[scale * of(r, side, key) for r in results] for side in ("plain", "ours")]
        axis.hlines(range(len(results)), *values, color="#CCCCCC")
        for side, name, colour in zip(
            values, ("plain", "MIFO"), ("#999999", "#0072B2"), strict=True
        ):
            axis.plot(side, range(len(results)), "o", color=colour, label=name)
        axis.set(xscale="log", xlabel=label)
    axes[0].set_yticks(range(len(results)), names)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle(facts["machine"], fontsize=9)
    figure.savefig(path, dpi=110)
