"""The README tells every option of every command, and its links lead somewhere."""

import argparse
import re
from pathlib import Path

import pytest

import semantic_evaluation
import semantic_export
import semantic_learning
import semantic_synthesis
import visual_box_mask
from mifo.app import __main__ as app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


class _Seen(Exception):
    """Carries a parser out of a command that is about to parse."""


def parser_of(command, monkeypatch) -> argparse.ArgumentParser:
    def parse_args(self, *_):
        raise _Seen(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(_Seen) as seen:
        command.main([])
    return seen.value.args[0]


@pytest.mark.parametrize(
    "command",
    [
        semantic_learning,
        semantic_synthesis,
        visual_box_mask,
        semantic_evaluation,
        semantic_export,
        app,
    ],
)
def test_every_option_is_told_with_its_default(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    name = "python -m mifo.app" if command is app else f"{command.__name__}.py"
    section = README.split(f"<code>{name}</code>")[1].split("</details>")[0]
    told = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", section, re.MULTILINE))
    actions = {a.option_strings[0]: a for a in parser._actions if a.dest != "help"}
    assert told.keys() == actions.keys()
    for option, action in actions.items():
        if isinstance(action.default, str | int | float) and action.nargs != 0 and action.default:
            assert told[option] == f"`{action.default}`", option


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
