"""Files that appear only when they are whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end, or vanishes on an error.

    Each process has its own, so that two writers of one file do not meet before the end.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, facts: dict) -> None:
    """Write facts as indented JSON, aside until they are whole."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
