"""A loss of power: what may be on the disk afterwards, from recorded calls to the system.

Of the calls up to some moment, these may be undone: what was written to a file since its last
fsync, and every rename and hard link that no fsync of its folder followed, each for itself; but
changes of one name stay in their order. All others are done.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = 0  # the node of the recorded folder
Place = tuple[int, str]  # the node of a folder, and a name in it
Tree = dict[str, bytes | None]  # the content of files by path; None: a folder
WATCHED = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir", "fsync")
MOST = 4  # calls of which all subsets are tried


@dataclass(frozen=True)
class Call:
    """A call that changes a disk, or waits for it.

    kind: create, move, link, remove or flush. node: the file or folder; place: the name that it
    gets; former: the name that it loses; content: of a file that is flushed.
    """

    kind: str
    node: int
    place: Place | None = None
    former: Place | None = None
    content: bytes | None = None
    is_folder: bool = False


# ----------------------------------------------------------------------------------------------
# what may be left


def states(calls: Sequence[Call]) -> Iterator[tuple[int, list[Tree]]]:
    """For each number of calls that were made: the trees that may be there, each once."""
    for count in range(len(calls) + 1):
        found = {}
        for lost in losses(calls[:count]):
            tree = replay(calls[:count], lost)
            found[tuple(sorted(tree.items()))] = tree
        yield count, list(found.values())


def losses(calls: Sequence[Call]) -> Iterator[frozenset[int]]:
    """Sets of calls that may be undone together, by their numbers."""
    open_calls = unsafe(calls)
    if len(open_calls) <= MOST:
        sizes = range(len(open_calls) + 1)
    else:
        sizes = (0, 1, len(open_calls) - 1, len(open_calls))
    chosen = (set(c) for size in sizes for c in itertools.combinations(open_calls, size))
    yield from dict.fromkeys(frozenset(_with_later(calls, open_calls, each)) for each in chosen)


def unsafe(calls: Sequence[Call]) -> list[int]:
    """The renames and links whose folder no fsync has followed."""
    flushed: dict[int, int] = {}
    for number, call in enumerate(calls):
        if call.kind == "flush" and call.is_folder:
            flushed[call.node] = number
    return [
        number
        for number, call in enumerate(calls)
        if call.kind in ("move", "link") and flushed.get(call.place[0], -1) < number
    ]


def _with_later(calls: Sequence[Call], open_calls: Sequence[int], lost: set[int]) -> set[int]:
    """With the later changes of the same names, which cannot be there without the earlier ones."""
    lost = set(lost)
    for number in open_calls:
        mine = {calls[number].place, calls[number].former} - {None}
        if any(mine & {calls[n].place, calls[n].former} for n in lost if n < number):
            lost.add(number)
    return lost


def replay(calls: Sequence[Call], lost: frozenset[int] = frozenset()) -> Tree:
    """The disk after some calls, without those that are lost and without what was not flushed."""
    names: dict[Place, int] = {}
    contents: dict[int, bytes] = {}
    folders = {ROOT}
    for number, call in enumerate(calls):
        if call.kind == "flush":
            contents[call.node] = call.content or b""
        elif number not in lost:
            if call.is_folder:
                folders.add(call.node)
            if call.former and names.get(call.former) == call.node:
                del names[call.former]
            if call.place:
                names[call.place] = call.node

    def walk(folder: int, path: str) -> Iterator[tuple[str, bytes | None]]:
        for (parent, name), node in names.items():
            if parent == folder and node in folders:
                yield f"{path}{name}", None
                yield from walk(node, f"{path}{name}/")
            elif parent == folder:
                yield f"{path}{name}", contents.get(node, b"")

    return dict(walk(ROOT, ""))


def lay_out(tree: Tree, folder: Path) -> None:
    """Write a tree into a new folder."""
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir(exist_ok=True)
        else:
            (folder / path).write_bytes(content)


# ----------------------------------------------------------------------------------------------
# recording in this process


class Recorder:
    """Watches a folder: after every call of os that changes it, what has changed is recorded.

    given: how many of ``calls`` tell what was there before; paths: of what is there, by node.
    """

    def __init__(self, root: Path):
        self.root = root
        self.calls: list[Call] = []
        self._nodes: dict[int, int] = {}  # by the inode
        self._count = itertools.count(1)
        self._seen: dict[Place, tuple[int, bool]] = {}  # node, is it a folder?
        self.paths: dict[int, Path] = {}
        self._look()
        for node, path in self.paths.items():  # what was there before is on the disk
            if path.is_file():
                self.calls.append(Call("flush", node, content=path.read_bytes()))
        self.given = len(self.calls)

    def _look(self) -> None:
        """Record what has changed since the last look."""
        found: dict[Place, tuple[int, bool]] = {}
        self.paths = {ROOT: self.root}
        created = []

        def walk(path: Path, folder: int) -> None:
            for entry in sorted(os.scandir(path), key=lambda each: each.name):
                inode, is_folder = entry.inode(), entry.is_dir(follow_symlinks=False)
                if inode not in self._nodes:
                    self._nodes[inode] = next(self._count)
                    created.append(self._nodes[inode])
                node = self._nodes[inode]
                found[folder, entry.name] = node, is_folder
                self.paths[node] = path / entry.name
                if is_folder:
                    walk(path / entry.name, node)

        walk(self.root, ROOT)
        gone = {node: place for place, (node, _) in self._seen.items() if place not in found}
        for place, (node, is_folder) in found.items():
            if self._seen.get(place, (None,))[0] == node:
                continue
            former = gone.pop(node, None)
            kind = "create" if node in created else "move" if former else "link"
            self.calls.append(Call(kind, node, place, former, is_folder=is_folder))
        for node, place in gone.items():
            self.calls.append(Call("remove", node, former=place))
        self._seen = found
        there = {node for node, _ in found.values()}
        self._nodes = {inode: node for inode, node in self._nodes.items() if node in there}

    def _flush(self, file: int) -> None:
        inode = os.fstat(file).st_ino
        if inode == self.root.stat().st_ino:
            self.calls.append(Call("flush", ROOT, is_folder=True))
        elif inode in self._nodes:
            node = self._nodes[inode]
            path = self.paths[node]
            content = None if path.is_dir() else path.read_bytes()
            self.calls.append(Call("flush", node, content=content, is_folder=path.is_dir()))

    @contextmanager
    def watching(self) -> Iterator["Recorder"]:
        """Within, the calls of this process are recorded."""
        former = {name: getattr(os, name) for name in WATCHED}

        def watched(name):
            def call(*args, **kwargs):
                self._look()
                result = former[name](*args, **kwargs)
                self._look()
                if name == "fsync":
                    self._flush(args[0])
                return result

            return call

        try:
            for name in WATCHED:
                setattr(os, name, watched(name))
            yield self
        finally:
            for name in WATCHED:
                setattr(os, name, former[name])
            self._look()
