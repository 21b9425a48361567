"""Where a model folder of MIGE may be written."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from imagelab.errors import UserError
from imagelab.io.folders import check_only, check_writable, foreign
from imagelab.io.tensors import read_json
from mige.folder import CONTENTS, INDEX

PIPELINE = "MigePipeline"  # the class that a model's index names
ROOM = 64 * 2**20  # bytes of what is written beside the weights, and then some
ADVICE = "give another --output"


def check_output(
    output: Path, sources: Iterable[Path], overwrite: bool, records: Iterable[str] = ()
) -> None:
    """Raises UserError where a model folder cannot be written, or something else is.

    Args:
        sources: what it is made from, and must not replace.
        records: names of files that such a folder may hold besides the parts.
    """
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output {output} holds {source}; give another folder")
    check_writable(output.absolute().parent, "output")
    if output.is_dir() and not any(foreign(output)):
        return
    if output.exists() or output.is_symlink():
        if not _is_model(output):
            raise UserError(
                f"{output} is no model folder of MIGE, so it is not replaced; give another --output"
            )
        if not overwrite:
            raise UserError(
                f"{output} holds a model; replace it with --overwrite, or give another --output"
            )
        check_only(output, (*CONTENTS, *records))


def _is_model(folder: Path) -> bool:
    path = folder / INDEX
    return path.is_file() and read_json(path, {}, ADVICE).get("_class_name") == PIPELINE


def check_room(output: Path, size: int) -> None:
    """Raises UserError where the disk has no room for weights of so many bytes."""
    there = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < size + ROOM:
        raise UserError(
            f"{output} takes {(size + ROOM) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; "
            "free some, or give an --output on another disk"
        )
