"""docs/options.md says what the parsers say."""

import argparse
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def made() -> dict:
    return runpy.run_path(str(DOCS / "options.py"))


def test_the_page_is_what_the_command_makes(made):
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    assert page == made["options_page"](), "run: python docs/options.py"


def test_rows_and_groups(made):
    parser = argparse.ArgumentParser(description="Does\nthings.\n\nAt length.")
    parser.add_argument("--name", default="a", help='its <asset0>, "b" | c (default: %(default)s)')
    group = parser.add_argument_group("more")
    group.add_argument("--way", default="up", choices=("up", "down"), help="which of 50%%")
    group.add_argument("--words", nargs="+", default=[], help="some")
    group.add_argument("--quick", action="store_true", help="no wait")
    head = "| option | default | meaning |\n|---|---|---|\n"
    assert list(made["tables"](parser)) == [
        head + '| `--name` | `a` | its \\<asset0>, "b" \\| c |\n',
        "*more*\n\n" + head
        + "| `--way` | `up` | which of 50% (up, down) |\n"
        + "| `--words` |  | some |\n"
        + "| `--quick` |  | no wait |\n",
    ]  # fmt: skip


def test_every_command_is_there(made):
    assert list(made["COMMANDS"]) == [
        "semantic_learning.py", "semantic_synthesis.py", "visual_box_mask.py",
        "semantic_evaluation.py", "semantic_export.py", "python -m mige.generate",
        "python -m mige.edit", "python -m mige.convert", "python -m mige.start",
        "python -m mige.features", "python -m mige.train", "python -m mige.benchmark",
        "python -m mifo_page",
    ]  # fmt: skip
