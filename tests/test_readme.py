"""The READMEs: every option of every command, commands that parse, links, and code that runs."""

import argparse
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import semantic_evaluation
import semantic_export
import semantic_learning
import semantic_synthesis
import visual_box_mask
from mifo_page import __main__ as app

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "toybox/stable_diffusion/README.md", "benchmarks/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
README = TEXTS["README.md"]


class _Seen(Exception):
    """Carries a parser out of a command that is about to parse."""


def parser_of(command) -> argparse.ArgumentParser:
    def parse_args(self, *_):
        raise _Seen(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Seen) as seen:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        command.main([])
    return seen.value.args[0]


# ----------------------------------------------------------------------------------------------
# options


def default_of(action: argparse.Action) -> str:
    """A cell of the table: nothing for flags and empty defaults."""
    value = "" if action.nargs == 0 else action.default
    text = " ".join(value) if isinstance(value, list | tuple) else str(value)
    return f"`{text}`" if text else ""


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
def test_every_option_is_told_with_its_default_and_its_help(command):
    name = "python -m mifo_page" if command is app else f"{command.__name__}.py"
    section = README.split(f"<code>{name}</code>")[1].split("</details>")[0]
    rows = re.findall(r"^\| `(--\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    told = {option: (default, meaning) for option, default, meaning in rows}
    actions = {a.option_strings[0]: a for a in parser_of(command)._actions if a.dest != "help"}
    assert told.keys() == actions.keys()
    for option, action in actions.items():
        default, meaning = told[option]
        assert default == default_of(action), option
        plain = action.help.removesuffix(" (default: %(default)s)").replace("%%", "%")
        assert plain in meaning.replace("`", ""), option
        if action.choices:
            assert f"({', '.join(action.choices)})" in meaning, option


# ----------------------------------------------------------------------------------------------
# commands


def commands(text: str) -> list[list[str]]:
    """Words of each command in the fenced shell blocks: one a line, or several joined by &&."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def of_ours(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of the commands that run a module of this project."""
    found = []
    for words in commands(text):
        script = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None:
            found.append((words[script].removesuffix(".py"), words[script + 1 :]))
        elif "-m" in words and words[words.index("-m") + 1].split(".")[0] in (
            "mifo", "toybox", "benchmarks",
        ):  # fmt: skip
            at = words.index("-m") + 1
            found.append((words[at], words[at + 1 :]))
    return found


@pytest.mark.parametrize("name", READMES)
def test_every_command_parses(name):
    found = of_ours(TEXTS[name])
    assert len(found) >= 4
    for module, arguments in found:
        module = "mifo_page.__main__" if module == "mifo_page" else module
        parser_of(importlib.import_module(module)).parse_args(arguments)


def test_the_python_example_runs(tmp_path, monkeypatch):
    code = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    for long, short in {
        "num_class_images=16,": "num_class_images=1, train_steps=2, finetune_steps=1,",
        "num_images=4,": "num_images=1, num_inference_steps=2,",
    }.items():
        assert code.count(long) == 1
        code = code.replace(long, short)
    shutil.copytree(ROOT / "example" / "toy_car", tmp_path / "example" / "toy_car")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "mine/toy_car/asset2.safetensors").is_file()
    assert {"0000.png", "0000.json"} <= {p.name for p in (tmp_path / "output/mine").iterdir()}


def test_the_toybox_example_draws(tmp_path, monkeypatch):
    text = TEXTS["toybox/stable_diffusion/README.md"]
    code = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    assert (
        code.count('"toybox/stable_diffusion/weights"') == code.count("num_inference_steps=25") == 1
    )
    code = code.replace(
        "toybox/stable_diffusion/weights", str(ROOT / "toybox/stable_diffusion/weights")
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("steps=25", "steps=2"), "README.md", "exec"), {})
    with Image.open(tmp_path / "toys.png") as picture:
        assert picture.size == (128, 128)


# ----------------------------------------------------------------------------------------------
# links


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{target}#{anchor}"
