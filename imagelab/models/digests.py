"""sha256 of weights, kept for large files: hashing 5 GB at every start takes seconds.

A kept digest belongs to files of the same path, size, time of change and inode.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from imagelab.io.atomic import write_json

LARGE = 256 * 2**20  # bytes of all files, below which nothing is kept
MOST_KEPT = 200


def weights_digest(weights: Mapping[str, Path]) -> str:
    """sha256 over weight files, by the names of their parts."""
    facts = {part: path.stat() for part, path in weights.items()}
    if sum(each.st_size for each in facts.values()) < LARGE:
        return _digest(weights)
    key = json.dumps(
        [
            [part, str(weights[part].resolve()), each.st_size, each.st_mtime_ns, each.st_ino]
            for part, each in sorted(facts.items())
        ]
    )
    kept = _read_kept()
    if key not in kept:
        kept[key] = _digest(weights)
        _write_kept(dict(list(kept.items())[-MOST_KEPT:]))
    return kept[key]


def _digest(weights: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for part in sorted(weights):
        digest.update(part.encode())
        with weights[part].open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _kept_path() -> Path:
    """Where digests are kept, among the user's own caches."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "imagelab" / "digests.json"


def _read_kept() -> dict[str, str]:
    """The kept digests by key; none where the file is missing or damaged."""
    try:
        kept = json.loads(_kept_path().read_text(encoding="utf-8"))
        return {k: v for k, v in kept.items() if type(v) is str and len(v) == 64}
    except (OSError, ValueError, AttributeError, RecursionError, RuntimeError):
        return {}


def _write_kept(kept: dict[str, str]) -> None:
    """Keep digests; without a place for them every start hashes anew."""
    with suppress(OSError, RuntimeError):
        path = _kept_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
