"""Hostile files and folders, and what watches a program that reads them.

A change takes a good file (or folder) and makes it hostile. Whatever it is, the program that reads
it may load what it would have loaded before, or say a sentence: no code runs, nothing is written,
no other place is asked, and it takes no longer.
"""

import json
import os
import pickle
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from imagelab.errors import UserError

CANARY = "canary_of_the_attacks"  # a module that must never be imported
MOST_SECONDS = 5.0  # of processor time, beyond those of a good file
Change = Callable[[Path], None]


# ----------------------------------------------------------------------------------------------
# what watches


@dataclass
class Seen:
    """What a program did: connections, programs it started, files it wrote, hostile imports."""

    events: list[str] = field(default_factory=list)
    active: bool = False


SEEN = Seen()
FORBIDDEN = (
    "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec",
    "pickle.find_class",
)  # fmt: skip


def _watch(event: str, arguments: tuple) -> None:
    if not SEEN.active:
        return
    shown = f"{event} {arguments!r:.100}"
    writes = event == "open" and type(arguments[0]) is str and "w" in str(arguments[1] or "")
    if event in FORBIDDEN or writes or (event == "import" and arguments[0] == CANARY):
        SEEN.events.append(shown)


sys.addaudithook(_watch)


def some(cases: list) -> list:
    """A third of many cases, always the same; all of them where the environment has ATTACKS=all."""
    if os.environ.get("ATTACKS") == "all":
        return cases
    chosen = random.Random(0).sample(range(len(cases)), -(-len(cases) // 3))
    return [cases[index] for index in sorted(chosen)]


@contextmanager
def watched(scratch: str) -> Iterator[Seen]:
    """Within, everything that a program may not do is written down.

    ``scratch``: the start of the names of temporary folders that it may write.
    """
    SEEN.events.clear()
    SEEN.active = True
    try:
        yield SEEN
    finally:
        SEEN.active = False
        SEEN.events[:] = [each for each in SEEN.events if scratch not in each]


def outcome(read: Callable[[], object], scratch: str = "imagelab-") -> str:
    """What reading a hostile file came to: "" or a sentence; an assertion fails for anything worse.

    ``read`` reads the file and uses what it got.
    """
    started = time.process_time()
    with watched(scratch) as seen:
        try:
            read()
            told = ""
        except UserError as error:
            told = str(error)
    assert not seen.events, seen.events
    assert time.process_time() - started < MOST_SECONDS, "it took too long"
    assert len(told) < 700 and told.count("\n") == 0, told
    return told


# ----------------------------------------------------------------------------------------------
# JSON


def json_changes(known: str, number: str | None = None) -> dict[str, Change]:
    """Changes of a JSON file, by name.

    known: a key that is read; ``number``: a key that is read as a number, if there is one.
    """

    def text(content: str | bytes) -> Change:
        data = content if isinstance(content, bytes) else content.encode()
        return lambda path: _rewrite(path, data)

    def put(key: str, value: object) -> Change:
        def change(path: Path) -> None:
            facts = json.loads(path.read_text())
            _rewrite(path, json.dumps(facts | {key: value}).encode())

        return change

    def drop(path: Path) -> None:
        facts = json.loads(path.read_text())
        del facts[known]
        _rewrite(path, json.dumps(facts).encode())

    changes = {
        "empty": text(""),
        "not JSON": text("{"),
        "null": text("null"),
        "a list": text("[]"),
        "a list of lists": text("[" * 100_000 + "]" * 100_000),
        "deep objects": text('{"a":' * 50_000 + "1" + "}" * 50_000),
        "not UTF-8": text(b'{"a": "\xff\xfe"}'),
        "a number of a million digits": text(f'{{"{known}": {"9" * 1_000_000}}}'),
        "NaN": text(f'{{"{known}": NaN}}'),
        "a float beyond floats": text(f'{{"{known}": 1e999}}'),
        "one key is a list": put(known, [[]]),
        "one key is null": put(known, None),
        "one key is text": put(known, "x" * 10_000),
        "one key is an object": put(known, {"a": {}}),
        "one key is away": drop,
        "a folder": _into_folder,
        "a pipe": _into_pipe,
        "a link to itself": _into_loop,
    }
    if number:
        for name, value in {
            "huge": 10**12, "beyond 64 bits": 10**400, "negative": -5, "zero": 0, "half": 0.5,
            "true": True, "tiny": 1e-300, "a large float": 1e300,
        }.items():  # fmt: skip
            changes[f"a number is {name}"] = put(number, value)
    return changes


def _rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _into_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# ----------------------------------------------------------------------------------------------
# safetensors


def split_header(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(path: Path, header: dict | str, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file from a header and data, whether they fit or not."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    _rewrite(path, struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor_changes() -> dict[str, Change]:
    """Changes of a safetensors file, by name."""

    def header(change: Callable[[dict, str], object]) -> Change:
        """``change(header, first name)`` changes it in place, or returns another."""

        def apply(path: Path) -> None:
            facts, data = split_header(path)
            first = min(name for name in facts if name != "__metadata__")
            found = change(facts, first)
            join_header(path, facts if found is None else found, data)

        return apply

    def put(**facts) -> Change:
        return header(lambda h, first: h[first].update(facts))

    return {
        "empty": lambda path: _rewrite(path, b""),
        "a pickle": lambda path: _rewrite(path, pickle.dumps(Bomb())),
        "cut off": lambda path: _rewrite(path, path.read_bytes()[: path.stat().st_size // 2]),
        "a header beyond the file": lambda path: join_header(path, {}, b"", 2**40),
        "a header of 2^64": lambda path: join_header(path, {}, b"", 2**64 - 1),
        "a deep header": lambda path: join_header(path, "[" * 50_000, b""),
        "a header that is a list": header(lambda h, _: "[]"),
        "no tensor": lambda path: join_header(path, {}, b""),
        "a tensor of 8-bit floats": header(_to_float8),
        "a tensor of an unknown type": put(dtype="Q99"),
        "a shape of another size": put(shape=[10**6, 10**6]),
        "a negative side": put(shape=[-1, 5]),
        "a side beyond 64 bits": put(shape=[2**70]),
        "offsets beyond the data": put(data_offsets=[0, 10**12]),
        "offsets that run backwards": put(data_offsets=[8, 0]),
        "one tensor is away": header(_without_first),
        "not finite": _not_finite,
        "a folder": _into_folder,
        "a pipe": _into_pipe,
        "a link to itself": _into_loop,
    }


class Bomb:
    """What a pickle does to whoever opens it."""

    def __reduce__(self):
        return __import__, (CANARY,)


def _to_float8(header: dict, first: str) -> None:
    size = header[first]["data_offsets"][1] - header[first]["data_offsets"][0]
    header[first].update(dtype="F8_E4M3", shape=[size])


def _without_first(header: dict, first: str) -> None:
    """The tensor keeps its bytes under a name that nobody knows."""
    header["stranger"] = header.pop(first)


def _not_finite(path: Path) -> None:
    header, data = split_header(path)
    name, facts = next(
        (n, f) for n, f in header.items() if n != "__metadata__" and f["dtype"].startswith("F")
    )
    start, end = facts["data_offsets"]
    width = {"F16": 2, "F32": 4, "F64": 8}[facts["dtype"]]
    nan = {2: struct.pack("<e", float("nan")), 4: struct.pack("<f", float("nan")),
           8: struct.pack("<d", float("nan"))}[width]  # fmt: skip
    assert end - start >= width, name
    join_header(path, header, data[:start] + nan + data[start + width :])
