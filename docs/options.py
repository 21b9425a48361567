"""Write docs/options.md, the options of every command, from their parsers.

python docs/options.py
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the commands of this checkout, not of an installed copy

from mifo.cli import boxes, evaluation, export, learning, synthesis  # noqa: E402
from mifo_page import __main__ as page  # noqa: E402
from mige import benchmark, convert, edit, features, generate, start, train  # noqa: E402

PAGE = Path(__file__).with_name("options.md")
#: What has to be given.
MODEL, RELEASE = ["--model", ""], ["--release", "", "--output", ""]
FEATURES = [*MODEL, "--data", "", "--output", ""]
TRAINING = [*FEATURES, "--features", ""]
START = ["--pixart", "", "--blip2", "", "--output", ""]
#: The parser of each command, and its short name where an installation gives it one.
COMMANDS = {
    "semantic_learning.py": ("mifo-learn", lambda: learning.parse_args([])[0]),
    "semantic_synthesis.py": ("mifo-synthesise", lambda: synthesis.parse_args([])[0]),
    "visual_box_mask.py": ("mifo-boxes", boxes.build_parser),
    "semantic_evaluation.py": ("mifo-evaluate", lambda: evaluation.parse_args([])[0]),
    "semantic_export.py": ("mifo-export", lambda: export.parse_args([])[0]),
    "python -m mige.generate": ("mige-generate", lambda: generate.parse_args(MODEL)[0]),
    "python -m mige.edit": ("mige-edit", lambda: edit.parse_args(MODEL)[0]),
    "python -m mige.convert": ("mige-convert", lambda: convert.parse_args(RELEASE)[0]),
    "python -m mige.start": ("mige-start", lambda: start.parse_args(START)[0]),
    "python -m mige.features": ("mige-features", lambda: features.parse_args(FEATURES)[0]),
    "python -m mige.train": ("mige-train", lambda: train.parse_args(TRAINING)[0]),
    "python -m mige.benchmark": (
        "mige-benchmark",
        lambda: benchmark.parse_args(["--bench", ""])[0],
    ),
    "python -m mifo_page": (None, lambda: page.parse_args([])[0]),
}
INTRODUCTION = """\
# Options

Every option of every command, with its default. `--help` of a command prints the same.
This page is made from the commands themselves: `python docs/options.py`.
"""


def options_page() -> str:
    """The text of docs/options.md."""
    parts = [INTRODUCTION]
    for name, (short, make_parser) in COMMANDS.items():
        parser = make_parser()
        summary = " ".join(parser.description.split("\n\n")[0].split())
        if short:
            summary += f" After an installation it is also called `{short}`."
        parts += [f"## {name}\n\n{escaped(summary)}\n", *tables(parser)]
    return "\n".join(parts)


def tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A markdown table for each group of options."""
    for group in parser._action_groups:
        rows = [row(action) for action in group._group_actions if action.dest != "help"]
        if rows:
            title = "" if group.title == "options" else f"*{group.title}*\n\n"
            yield title + "\n".join(["| option | default | meaning |", "|---|---|---|", *rows, ""])


def row(action: argparse.Action) -> str:
    """A line of a table: the option, its default unless that is empty, its help."""
    meaning = action.help.removesuffix(" (default: %(default)s)").replace("%%", "%")
    if action.choices:
        meaning += f" ({', '.join(action.choices)})"
    cells = [f"`{action.option_strings[0]}`", default_of(action), escaped(meaning)]
    return f"| {' | '.join(cells)} |"


def default_of(action: argparse.Action) -> str:
    """Nothing for a flag and for an empty default."""
    if action.required:
        return "has to be given"
    value = "" if action.nargs == 0 else action.default
    text = " ".join(value) if isinstance(value, list | tuple) else str(value)
    return f"`{text}`" if text else ""


def escaped(text: str) -> str:
    """A text as markdown shows it: no <asset0> becomes a tag, no | ends a cell."""
    return text.replace("<", "\\<").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
