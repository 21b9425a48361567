"""Checks of the folders that options name, before any work is done."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from imagelab.errors import UserError


def check_name(name: str, option: str) -> None:
    """Raises UserError unless a name is that of a folder right below another."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(
            f"--{option} {name!r} is not the plain name of a folder; give the name alone, such as "
            "toy_car, and the folder above it by its own option"
        )


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError where a folder is not there and cannot be made, or cannot be written to."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, not a folder; give another --{option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the folder {there} cannot be written to; give another --{option}")


def check_only(folder: Path, own: Iterable[str]) -> None:
    """Raises UserError where a folder that is to be replaced holds what somebody put there.

    Args:
        own: patterns of the names that it has by itself. Hidden ones, such as those that file
            managers leave, may be there as well.
    """
    patterns = [*own, ".*"]
    for name in sorted(path.name for path in folder.iterdir()):
        if not any(fnmatch(name, pattern) for pattern in patterns):
            raise UserError(
                f"{folder} holds {name}, which would be removed with the folder; move it elsewhere"
            )
