"""The calls of a process to the system, recorded by strace, for power_loss.py."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from power_loss import ROOT, Call, Recorder

CALLS = (
    "open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,"
    "write,pwrite64,writev,lseek,truncate,ftruncate,sendfile,copy_file_range,fsync,fdatasync"
)
LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
OPENED = re.compile(r"(AT_FDCWD|-?\d+)<((?:\\x[0-9a-f]{2})*)>")


def is_possible() -> str:
    """Why strace cannot be used here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    return f"strace does not work here: {done.stderr.strip()}" if done.returncode else ""


def attach(process: int, log: Path) -> subprocess.Popen:
    """Record the calls of a process, from the return on, until it ends."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-xx", "-s", str(1 << 26), "-e", f"trace={CALLS}", "-o", str(log),
         "-p", str(process)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if "attached" not in (told := tracer.stderr.readline()):
        raise RuntimeError(f"strace: {told}")
    return tracer


def read(log: Path, root: Path, given: Recorder) -> list[Call]:
    """The calls that changed a folder; ``given`` recorded it as it was before."""
    trace = Trace(root, given)
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        process = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
            continue
        if found := re.match(r"\d+ +<\.\.\. \w+ resumed>", line):
            line = begun.pop(process) + line[found.end() :]
        if (found := LINE.match(line)) and int(found[4]) >= 0:
            trace.take(found[2], found[3], int(found[4]), line[found.end() :])
    return trace.calls


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


class Trace:
    """The folder as it changes, call by call."""

    def __init__(self, root: Path, given: Recorder):
        self.root = root.resolve()
        self.calls = list(given.calls)
        self.nodes = {path.resolve(): node for node, path in given.paths.items()}
        self.folders = {node for path, node in self.nodes.items() if path.is_dir()}
        self.contents = {
            node: bytearray(path.read_bytes())
            for path, node in self.nodes.items()
            if path.is_file()
        }
        self.at: dict[str, int] = {}  # where a descriptor writes next
        self.appends: set[str] = set()

    def take(self, name: str, arguments: str, result: int, rest: str) -> None:
        """One call and what it returned."""
        opened = [(number, Path(os.fsdecode(_bytes(p)))) for number, p in OPENED.findall(arguments)]
        texts = [_bytes(text) for text in TEXT.findall(arguments)]
        if name in ("open", "openat", "creat"):
            path = self._path(opened, texts[0])
            self._open(path, "O_CREAT" in arguments or name == "creat", arguments, str(result))
        elif name.startswith("mkdir"):
            self._create(self._path(opened, texts[0]), is_folder=True)
        elif name.startswith(("rename", "link")):
            source, target = (
                self._path(opened[i : i + 1], text) for i, text in enumerate(texts[:2])
            )
            self._name(source, target, "move" if name.startswith("rename") else "link")
        elif name.startswith(("unlink", "rmdir")):
            self._remove(self._path(opened, texts[0]))
        elif opened and opened[0][1] in self.nodes:
            self._change(name, opened, texts, arguments, result)

    def _path(self, opened: list, text: bytes) -> Path:
        base = opened[0][1] if opened else self.root.parent
        return Path(os.path.normpath(base / os.fsdecode(text)))

    def _place(self, path: Path) -> tuple[int, str]:
        return self.nodes[path.parent], path.name

    def _create(self, path: Path, is_folder: bool = False) -> None:
        if path.parent not in self.nodes or path in self.nodes:
            return
        node = max(self.nodes.values(), default=ROOT) + len(self.calls) + 1  # never used before
        self.calls.append(Call("create", node, self._place(path), is_folder=is_folder))
        self.nodes[path] = node
        if is_folder:
            self.folders.add(node)
        else:
            self.contents[node] = bytearray()

    def _open(self, path: Path, may_create: bool, flags: str, number: str) -> None:
        if may_create:
            self._create(path)
        if path in self.nodes and "O_TRUNC" in flags:
            self.contents[self.nodes[path]].clear()
        self.at[number] = 0
        (self.appends.add if "O_APPEND" in flags else self.appends.discard)(number)

    def _name(self, source: Path, target: Path, kind: str) -> None:
        if source not in self.nodes or target.parent not in self.nodes:
            return
        node = self.nodes[source]
        former = self._place(source) if kind == "move" else None
        self.calls.append(
            Call(kind, node, self._place(target), former, is_folder=node in self.folders)
        )
        if kind == "link":
            self.nodes[target] = node
            return
        moved = {p: n for p, n in self.nodes.items() if p == source or source in p.parents}
        self.nodes = {p: n for p, n in self.nodes.items() if p not in moved}
        self.nodes |= {target / p.relative_to(source): n for p, n in moved.items()}

    def _remove(self, path: Path) -> None:
        if path in self.nodes:
            self.calls.append(Call("remove", self.nodes[path], former=self._place(path)))
            del self.nodes[path]

    def _change(self, name: str, opened: list, texts: list, arguments: str, result: int) -> None:
        """Writing to an open file, or waiting for it."""
        number, path = opened[0]
        node = self.nodes[path]
        if name in ("fsync", "fdatasync"):
            is_folder = node in self.folders
            content = None if is_folder else bytes(self.contents[node])
            self.calls.append(Call("flush", node, content=content, is_folder=is_folder))
        elif name == "lseek":
            self.at[number] = result
        elif name == "ftruncate":
            size = int(arguments.rsplit(",", 1)[1])
            content = self.contents[node]
            content[:] = content[:size].ljust(size, b"\0")
        elif name in ("write", "writev", "pwrite64"):
            offset = int(arguments.rsplit(",", 1)[1]) if name == "pwrite64" else None
            self._write(number, node, b"".join(texts)[:result], offset)
        elif name == "sendfile":
            source = opened[1][1]
            data = self.contents.get(self.nodes.get(source, -1)) or source.read_bytes()
            begun = self.at.get(number, 0)
            self._write(number, node, bytes(data[begun : begun + result]), None)
        else:
            raise NotImplementedError(f"{name}({arguments[:200]}")

    def _write(self, number: str, node: int, data: bytes, offset: int | None) -> None:
        content = self.contents[node]
        start = offset
        if start is None:
            start = len(content) if number in self.appends else self.at.get(number, 0)
            self.at[number] = start + len(data)
        content[:] = content[:start].ljust(start, b"\0") + data + content[start + len(data) :]
