"""The short form of fuzz.py."""

from fuzz import fuzz


def test_fuzzed_argument_lists_end_well(tmp_path):
    counts, broken = fuzz(tmp_path, 60, seed=1)
    assert not broken, "\n\n".join(broken)
    assert counts["parsed"] >= 20 and counts["exit code 0"] >= 5 and counts["exit code 2"] >= 10
