"""Checks of the folders that options name, before any work is done."""

import os
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from imagelab.errors import UserError, shorten

#: Names that nobody misses: what file managers leave, and what a killed writer left.
LEFT = ("Thumbs.db", "desktop.ini", ".*.part")
LONGEST = 200  # bytes of a name, as disks take 255: the folder that is written aside adds some


def check_name(name: str, option: str) -> None:
    """Raises UserError unless a name is that of a folder right below another."""
    if len(name.encode(errors="replace")) > LONGEST:
        raise UserError(f"--{option} {shorten(name)!r} is too long; give at most {LONGEST} bytes")
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
        own: patterns of the names that it has by itself. What :func:`foreign` passes over may be
            there as well.
    """
    for path in foreign(folder):
        if not any(fnmatch(path.name, pattern) for pattern in own):
            raise UserError(
                f"{folder} holds {path.name}, which would be removed with the folder; move it "
                "elsewhere"
            )


def check_unused(folder: Path, option: str, own: Collection[str] = ()) -> None:
    """Raises UserError where a folder holds anything but a command's own names."""
    for path in foreign(folder) if folder.is_dir() else ():
        if path.name not in own:
            raise UserError(f"{folder} holds other files ({path.name}); give another --{option}")


def foreign(folder: Path) -> Iterator[Path]:
    """What lies in a folder, sorted, but for hidden files and what is left there unasked."""
    for path in sorted(folder.iterdir()):
        is_hidden_file = path.name.startswith(".") and not path.is_dir()
        if not (is_hidden_file or any(fnmatch(path.name, pattern) for pattern in LEFT)):
            yield path
