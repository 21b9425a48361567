"""Fixtures of the page's tests: folders of a test's own, an instance opened from them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, NEEDED, ROOT

from mifo_page import draft as drafts
from mifo_page.draft import Draft
from mifo_page.places import Places


@pytest.fixture
def places(tmp_path, examples) -> Places:
    """Folders of a test's own; `example` holds the instance `toys` of two masks."""
    shutil.copytree(examples, tmp_path / "example")
    return Places(*(str(tmp_path / name) for name in ("example", "learned", "output")))


@pytest.fixture
def draft(places) -> Draft:
    return drafts.open_instance(places, "toys")


@pytest.fixture
def events(places):
    """Calls what the page does at an event, found by what it changes, with the parts' values.

    ``events("learning_command", train_steps=None)`` gives a part another value than its first.
    """
    pytest.importorskip("gradio", reason=NEEDED)
    from mifo_page.job import Job
    from mifo_page.page import build_page

    page = build_page(places, Job())
    parts = {part.elem_id: part for part in page.blocks.values() if getattr(part, "elem_id", None)}

    def call(changed: str, *, at: str | None = None, **values):
        """``changed``: the first named part of what the event changes; ``at``: its trigger."""
        names = {part._id: name for name, part in parts.items()}
        for event in page.fns.values():
            outputs = [names[part._id] for part in event.outputs if part._id in names]
            triggers = [names.get(part) for part, _ in event.targets]
            if (outputs[:1] or triggers)[0] == changed and (at is None or at in triggers):
                inputs = [names.get(part._id, "draft") for part in event.inputs]
                first = {n: part.value for n, part in parts.items() if hasattr(part, "value")}
                given = {"draft": None} | first | values
                return event.fn(*(given[name] for name in inputs))
        raise AssertionError(f"no event changes {changed}")

    return call


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder that a page works in, and its address."""
    pytest.importorskip("gradio", reason=NEEDED)
    folder = tmp_path_factory.mktemp("site")
    (folder / "example").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mifo_page", "--model_path", "toybox", "--device", "cpu"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "lora-master")))},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.match(r"open (http://127\.0\.0\.1:\d+)/ ", process.stdout.readline())[1]
        yield folder, address
        process.terminate()
        assert process.wait(90) == 0
    finally:
        process.kill()


@pytest.fixture
def browser_page(site):
    """The page in a real browser; every address it asks for and every error is kept."""
    if not Path(CHROMIUM).is_file():
        pytest.skip("the browser test needs Debian's chromium: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    off = "sandbox first-run"
    disabled = "gpu quic background-networking component-update sync"
    args = [f"--no-{x}" for x in off.split()] + [f"--disable-{x}" for x in disabled.split()]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.set_default_timeout(120_000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site[1])
        yield page
        assert not errors
        assert all(url.startswith((site[1], "data:", "blob:")) for url in asked), asked
        browser.close()
