"""Fixtures of the page's tests: folders of a test's own, an instance opened from them."""

import shutil

import pytest

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
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app]'")
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
