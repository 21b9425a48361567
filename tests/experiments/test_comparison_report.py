"""The statistics and the table of a comparison, worked by hand."""

import pytest

from experiments.comparison.report import IDENTITY, Comparison, Result, chance, difference, markdown
from experiments.comparison.settings import LONG, VARIANTS, Settings
from imagelab.evaluation.report import Mean


def result(*right, instances=2, separation=(1.0,)) -> Result:
    """A picture for each pair (is box 0 right?, is box 1 right?), with a margin of ± 0.25."""
    rows = {True: [0.5, 0.25], False: [0.25, 0.5]}
    more = [0.0] * (instances - 2)
    records = [
        {
            "own": [0, 1],
            "spaces": {
                "toybox": {
                    "similarities": [rows[first] + more, rows[not second] + more],
                    "features": [1.0],
                }
            },
            "iou": [0.5, 0.5],
            "leakage": 0.25,
        }
        for first, second in right
    ]
    return Result(records, list(separation))


RESULTS = {
    "mifo": {
        "a": result((True, True), (True, False), separation=(0.75, 0.5)),  # ¾ right
        "b": result((True, True), instances=3),  # all right
    },
    "none": {
        "a": result((True, False), (False, False)),  # ¼ right
        "b": result((True, False), instances=3),  # ½ right
        "c": result((False, False)),  # of no folder that mifo has
    },
}


def test_summary_of_a_folder():
    assert RESULTS["mifo"]["a"].summary() | {IDENTITY: None, "leakage": None} == {
        IDENTITY: None,
        "toybox: margin": Mean(0.125, pytest.approx(12.706205 * 0.125)),  # ¼ and 0: t · σ / √2
        "IoU with the box": Mean(0.5, 0.0),
        "leakage": None,
        "separation": Mean(0.625, None),
    }
    assert RESULTS["mifo"]["a"].summary()[IDENTITY].mean == 0.75


def test_chance_is_the_mean_over_folders():
    assert chance(RESULTS) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_difference_is_by_folder():
    mean, half = difference(RESULTS["none"], RESULTS["mifo"])
    assert mean == -0.5  # −½ in a, −½ in b
    assert half == 0  # though the accuracies themselves vary
    assert difference(RESULTS["none"], {}) is None


def test_table():
    variants = [VARIANTS["mifo"], VARIANTS["rank4"], VARIANTS["none"]]
    failures = {"rank4, a": "no disk.", "rank4, b": "no disk."}
    lines = markdown(Comparison(Settings(seeds=7), variants, RESULTS, failures)).splitlines()
    head, _, mifo_row, none_row, _, legend, _, *failed = lines
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, mifo_row, none_row)]
    first, second = (dict(zip(cells[0], row, strict=True)) for row in cells[1:])
    # Student's t of one degree of freedom, 12.706, times the deviation over √2: half the difference
    assert first["right instance"] == f"0.875 ± {12.706205 * 0.125:.3f}"
    assert first["separation"] == f"0.812 ± {12.706205 * 0.1875:.3f}"
    assert (first["folders"], second["folders"]) == ("2", "3")
    assert (first["… less mifo's"], second["… less mifo's"]) == ("–", "-0.500 ± 0.000")
    assert "7 pictures" in legend and "0.444" in legend
    assert failed[0] == "rank4, a failed: no disk."
    assert "`rank4`" not in "".join(lines[:4])


def test_nothing_but_failures_is_told():
    text = markdown(Comparison(LONG, [VARIANTS["mifo"]], {}, {"mifo, a": "no disk."}))
    assert text.splitlines()[-1] == "mifo, a failed: no disk."
