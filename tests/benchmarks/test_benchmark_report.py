"""Operations worked by hand, and the report of benchmarks.run, of made-up numbers."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from benchmarks.measure import operations
from benchmarks.report import by_subjects, write_report


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("function", "shapes", "count"),
    [
        (torch.matmul, [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
        (F.linear, [(2, 3), (5, 3), (5,)], 2 * 2 * 3 * 5),
        # 3 channels of 2×2 pixels, each from 2 channels of 3×3
        (F.conv2d, [(1, 2, 4, 4), (3, 2, 3, 3)], 2 * (3 * 2 * 2) * (2 * 3 * 3)),
        # Q·Kᵀ and P·V of 5 queries, 7 keys and 8 channels, in two heads
        (F.scaled_dot_product_attention, [(1, 2, 5, 8), *[(1, 2, 7, 8)] * 2], 4 * 2 * 5 * 7 * 8),
    ],
)
def test_operations_are_counted_alike_in_every_mode(mode, function, shapes, count):
    with mode():
        assert operations(lambda: function(*map(torch.zeros, shapes))) == count


def row(subjects: int, seconds: float, **more) -> dict:
    return {
        "model": "tiny_sd", "what": "synthesis", "subjects": subjects, "batch": 4,
        "precision": "fp32", "floor": 1.0,
        "ours": {"seconds": seconds, "bytes": 2**21, "operations": 6e9},
    } | more  # fmt: skip


FACTS = {
    "command": "the command", "machine": "a machine", "clock": "wall", "steps": 10, "repeats": 3,
    "rates": {"fp32": 6e9},
}  # fmt: skip


def test_time_by_subjects_compares_rows_that_differ_in_them_alone():
    """In whatever order they were measured."""
    results = [row(8, 2.5), row(1, 2.0), row(1, 4.0, batch=8), row(2, 2.2), row(8, 9.0, what="x")]
    assert by_subjects(results) == [
        "tiny_sd synthesis, 4 image(s) at once, fp32: 2 subjects take 1.10 times the time an image "
        "of 1",
        "tiny_sd synthesis, 4 image(s) at once, fp32: 8 subjects take 1.25 times the time an image "
        "of 1",
    ]


def test_a_table_with_and_without_the_plain_path(tmp_path):
    beside = row(1, 2.0, plain={"seconds": 5.0, "bytes": 2**22})
    write_report(tmp_path / "report", FACTS, [beside, row(8, 3.0)])
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert (
        "| tiny_sd | synthesis | 1 | 4 | fp32 | 5000 | 2000 | 500 | 2.5 | 4 | 2 | 2.0 | 6.0 | 3 "
        "| 1000 | 2.0 |" in lines
    )
    assert (
        "| tiny_sd | synthesis | 8 | 4 | fp32 | – | 3000 | 750 | – | – | 2 | – | 6.0 | 2 "
        "| 1000 | 3.0 |" in lines
    )
    assert lines[-1].endswith("8 subjects take 1.50 times the time an image of 1")
    assert (tmp_path / "report.png").stat().st_size > 0
