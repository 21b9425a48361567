"""One version: of the package, and of what it installs as."""

import runpy
from pathlib import Path

import setuptools

import mifo

ROOT = Path(__file__).parents[2]


def test_the_package_installs_under_the_version_that_it_says(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert given["version"] == mifo.__version__ == "0.1.0"
