"""The layers of the house: imports go one way (.importlinter)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
CONTRACT = ROOT / ".importlinter"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_imports_go_one_way(capsys):
    assert lint_imports(config_filename=str(CONTRACT), no_cache=True) == 0, capsys.readouterr().out


def test_the_contract_names_every_package_and_script():
    """A new package or script that it does not know would be free to import anything."""
    text = CONTRACT.read_text(encoding="utf-8")
    roots = text[text.index("root_packages") : text.index("include_external")].split()[2:]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert set(roots) == packages | {"mifo_lora"}
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"setup"}
    assert scripts <= set(text.split())


def test_a_forbidden_import_is_seen(tmp_path, monkeypatch):
    """The contract has teeth: MIFO in imagelab breaks it."""
    for name in ("imagelab", "mifo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "imagelab/wrong.py").write_text("import mifo.tokens\n")
    (tmp_path / "mifo/tokens.py").touch()
    rules = "[importlinter]\nroot_packages =\n    imagelab\n    mifo\n"
    rules += "[importlinter:contract:layers]\nname = layers\ntype = layers\n"
    (tmp_path / "rules.ini").write_text(rules + "layers =\n    mifo\n    imagelab\n")
    code = "import sys; from importlinter.cli import lint_imports; "
    code += "sys.exit(lint_imports(config_filename='rules.ini', no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "imagelab.wrong -> mifo.tokens" in run.stdout
