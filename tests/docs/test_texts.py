"""README.md, docs/ and the READMEs below: commands that parse, links that lead somewhere, length.

Also every text file of the repository: no path that leads out of it.
"""

import argparse
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        ROOT / "toybox/stable_diffusion/README.md",
        ROOT / "toybox/mige/README.md",
        ROOT / "benchmarks/README.md",
        ROOT / "lora-master/README.md",
    )
)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
#: How many commands of this project each page has at least.
COMMANDS = {
    "README.md": 8,
    "docs/results.md": 5,
    "docs/sharing.md": 4,
    "docs/page.md": 1,
    "docs/faithfulness.md": 1,
    "docs/mige.md": 4,
    "docs/mige_training.md": 6,
    "docs/mige_measuring.md": 3,
    "toybox/stable_diffusion/README.md": 10,
    "toybox/mige/README.md": 6,
    "benchmarks/README.md": 9,
}
OURS = ("mifo_page", "mige", "toybox", "benchmarks", "experiments")


# ----------------------------------------------------------------------------------------------
# commands


class _Seen(Exception):
    """Carries a parser out of a command that is about to parse."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser of ``python -m module``."""
    command = importlib.import_module(module)
    if hasattr(command, "__path__"):
        command = importlib.import_module(f"{module}.__main__")

    def parse_args(self, *_):
        raise _Seen(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Seen) as seen:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        command.main([])
    return seen.value.args[0]


def shell_commands(text: str) -> list[list[str]]:
    """Words of each command in the fenced shell blocks: one a line, or several joined by &&."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def spans(text: str) -> list[list[str]]:
    """Words of each command within a sentence: `python …` or `torchrun …`."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(code) for code in re.findall(r"`((?:python|torchrun) [^`…]+)`", outside)]


def of_ours(commands: list[list[str]]) -> list[tuple[str, list[str]]]:
    """(module, arguments) of the commands that run a module of this project."""
    found = []
    for words in commands:
        script = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None and "/" not in words[script]:
            found.append((words[script].removesuffix(".py"), words[script + 1 :]))
        elif "-m" in words and words[words.index("-m") + 1].split(".")[0] in OURS:
            at = words.index("-m") + 1
            found.append((words[at], words[at + 1 :]))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_command_parses(name):
    commands = of_ours(shell_commands(TEXTS[name]))
    assert len(commands) >= COMMANDS.get(name, 0)
    before = of_ours(spans(TEXTS[name])) if name != "docs/changes.md" else []  # it has former ones
    for module, arguments in commands + before:
        parser_of(module).parse_args(arguments)


def test_the_changes_lead_to_modules_that_are_there():
    table = re.findall(
        r"^\| `python -m .*?` \| `python -m (\S+)` \|$", TEXTS["docs/changes.md"], re.M
    )
    assert len(table) >= 6
    for module in table:
        assert importlib.util.find_spec(module), module


def test_the_test_command_installs_this_repository():
    section = TEXTS["README.md"].split("\n## Tests\n")[1]
    block = re.search(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    assert block.splitlines() == [
        "pip install torch==2.13.0", 'pip install ".[test]"', "python -m pytest -q -n 2",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------
# functions


def test_every_function_that_the_paper_is_traced_to_is_there():
    texts = "".join(TEXTS[f"docs/{name}.md"] for name in ("faithfulness", "mige", "mige_training"))
    rows = re.findall(r"^\| .* \| `([\w/]+\.py)`: (.*) \|$", texts, re.M)
    assert len(rows) >= 25
    for file, names in rows:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            found = module
            for part in name.split("."):
                found = getattr(found, part)


# ----------------------------------------------------------------------------------------------
# links, length, paths


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_in_the_repository(name):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), target
        assert file.resolve().is_relative_to(ROOT.resolve()), target
        if anchor:
            text = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.M | re.S)
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", TEXTS["README.md"]))
    assert linked >= set(PAGES) - {"README.md"}


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 170


def test_no_text_names_a_path_outside_the_repository():
    leaves = re.compile(r"(?<![\w.<}])/(work|root|home|Users|tmp|mnt|opt|scratch)/|\.\./shared")
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.replace("/home/ada", "").replace("/tmp/asset0", "")  # invented by a test
            if leaves.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def text_files() -> list[Path]:
    """What people wrote: no hidden folders, and no output of the commands."""
    kinds = {".md", ".py", ".toml", ".txt", ".json", ".cff", ".css", ".html", ".js", ".in"}
    written = {"Model_ours", "output", "exports", "evaluation", "build", "dist"}
    found = []
    for folder, names, files in os.walk(ROOT):
        if Path(folder) == ROOT:
            names[:] = [name for name in names if name not in written]
        names[:] = [n for n in names if n[0] != "." and not n.endswith((".egg-info", "cache__"))]
        found += [Path(folder, file) for file in files]
    return [path for path in found if path.suffix in kinds and path != Path(__file__)]
