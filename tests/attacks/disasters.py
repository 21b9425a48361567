"""Every command in a disaster: what it says, what is kept, and that it can be run again.

    python tests/attacks/disasters.py            # some ten minutes; as root, with real small disks
    python tests/attacks/disasters.py --short    # some cells, with errors that are only pretended

A disaster strikes in the middle of the work: the disk is full or read-only, the output folder
vanishes, the process is asked to end (SIGTERM, SIGHUP), its terminal is closed, or nobody reads
its output any more. Afterwards there is no traceback, what was finished is there, nothing lies
about, and the command run again, with --resume where a run is unfinished, ends as one that nothing
has happened to, bit for bit. Prints a Markdown table; the last column says what breaks this.
"""

import argparse
import builtins
import errno
import io
import itertools
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from forks import PATIENCE, Ended, alone, become, finished, fork, run_command, wait
from together import Broken, Start, World, check, files, painted, read_picture

SIZE = 8 << 20  # bytes of a small disk
DISK = Path("disk")  # everything is written there
WORK = DISK / "out/.toys.work/checkpoint.safetensors"


@dataclass(frozen=True)
class Moment:
    """When a disaster strikes: before the so-manieth call of a function."""

    name: str
    command: str
    function: str
    call: int = 0

    def install(self, strike: Callable[[], None]) -> None:
        """Have it strike in this process."""
        where, _, name = self.function.rpartition(".")
        try:
            owner = import_module(where)
        except ModuleNotFoundError:
            module, _, kind = where.rpartition(".")
            owner = getattr(import_module(module), kind)
        function, count = getattr(owner, name), itertools.count()

        def struck(*args, **named):
            if next(count) == self.call:
                strike()
            return function(*args, **named)

        setattr(owner, name, struck)


MOMENTS = (
    Moment("learning, stage 1", "semantic_learning", "imagelab.training.loop.Trainer.update", 1),
    Moment("learning, class images", "semantic_learning", "mifo.learning.priors._write_cache", 1),
    Moment("learning, stage 2", "semantic_learning", "imagelab.training.loop.Trainer.update", 4),
    Moment("learning, the result", "semantic_learning", "mifo.learning.result.write_learned"),
    Moment("synthesis", "semantic_synthesis", "mifo.synthesis.paint.save_painting", 1),
    Moment("evaluation", "semantic_evaluation", "imagelab.evaluation.runner.Records.add", 1),
    Moment("export", "semantic_export", "mifo.export.predict_noise"),
    Moment("visual_box_mask", "visual_box_mask", "mifo.cli.boxes.save"),
)


# ----------------------------------------------------------------------------------------------
# disasters


def refuse(number: int) -> None:
    """From now on, this process cannot write below DISK."""
    disk = DISK.absolute()

    def guarded(function: Callable, is_writing: Callable[[tuple, dict], bool]) -> Callable:
        def call(*args, **named):
            paths = [Path(os.path.abspath(each)) for each in args[:2] if _is_path(each)]
            inside = any(path.is_relative_to(disk) for path in paths)
            if inside and is_writing(args, named):
                raise OSError(number, os.strerror(number), str(paths[0]))
            return function(*args, **named)

        return call

    def opens_to_write(args: tuple, named: dict) -> bool:
        mode = args[1] if len(args) > 1 else named.get("mode", "r")
        if isinstance(mode, int):
            return bool(mode & (os.O_WRONLY | os.O_RDWR))
        return bool(set(mode) & set("wax+"))

    from safetensors import SafetensorError

    import imagelab.io.tensors

    def save_file(*args, **named):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")

    builtins.open = io.open = guarded(io.open, opens_to_write)
    os.open = guarded(os.open, opens_to_write)
    for name in ("mkdir", "replace", "rename", "link"):
        setattr(os, name, guarded(getattr(os, name), lambda *_: True))
    imagelab.io.tensors.save_file = save_file


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def fill() -> None:
    """Leave no byte free."""
    with (DISK / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass


def vanish() -> None:
    for path in DISK.iterdir():
        shutil.rmtree(path)


def hear(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Disaster:
    """What happens, and the exit codes that it may end with.

    strike: does it, in the process. ``mount``: needs a disk of its own, a small one or one that is
    read-only from the start. ``ear``: what is closed, a terminal or a pipe.
    """

    name: str
    codes: tuple[int, ...]
    strike: Callable[[], None] | None = None
    mount: str = ""
    ear: str = ""


DISASTERS = (
    Disaster("full disk", (2,), lambda: refuse(errno.ENOSPC)),
    Disaster("full disk, a real one", (2,), fill, mount="small"),
    Disaster("read-only", (2,), lambda: refuse(errno.EROFS)),
    Disaster("read-only from the start, a real one", (2,), mount="read-only"),
    Disaster("the folder vanishes", (0, 2), vanish),
    Disaster("SIGTERM", (128 + signal.SIGTERM,), hear(signal.SIGTERM)),
    Disaster("SIGHUP", (128 + signal.SIGHUP,), hear(signal.SIGHUP)),
    Disaster("closed terminal", (128 + signal.SIGHUP,), ear="terminal"),
    Disaster("closed pipe", (0,), ear="pipe"),
)


def run_struck(moment: Moment, disaster: Disaster, argv: Sequence[str]) -> Ended:
    """Run a command that a disaster befalls."""

    def work(strike: Callable[[], None] | None) -> int:
        if strike:
            moment.install(strike)
        return run_command(__import__(moment.command).main, argv)

    if disaster.ear:
        return run_unheard(work, disaster.ear == "terminal")
    log = Path("log")
    return finished(fork(lambda: work(disaster.strike), log), log)


def run_unheard(work: Callable[[Callable], int], terminal: bool) -> Ended:
    """Run a command whose terminal, or the reader of whose output, goes when it strikes."""
    notice, notify = os.pipe()
    gone, go = os.pipe()

    def strike() -> None:
        os.write(notify, b"now")
        os.read(gone, 1)  # until the other end is closed

    if terminal:
        child, ear = pty.fork()
        mouth = 1
    else:
        ear, mouth = os.pipe()
        child = os.fork()
    if not child:
        os.close(go)
        if not terminal:
            os.close(ear)
        become(lambda: work(strike), mouth)
    for each in (notify, gone, *([] if terminal else [mouth])):
        os.close(each)
    told = b""
    while True:
        ready, _, _ = select.select([notice, ear], [], [], PATIENCE)
        if not ready:
            os.kill(child, signal.SIGKILL)
        if notice in ready:
            break
        told += os.read(ear, 4096)
    is_struck = bool(os.read(notice, 3))
    os.close(ear)
    os.close(go)
    os.close(notice)
    code = wait(child)
    check(is_struck, f"it ended before the disaster: {told.decode(errors='replace')[-1000:]}")
    return Ended(code, told.decode(errors="replace"))


@contextmanager
def disk_for(disaster: Disaster) -> Iterator[None]:
    """DISK, a mounted one where the disaster needs it."""
    DISK.mkdir()
    if disaster.mount:
        mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(DISK))
    try:
        yield
    finally:
        if disaster.mount:
            subprocess.run(["umount", "--lazy", str(DISK)], check=True)
        shutil.rmtree(DISK)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether this machine lets us have small disks."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", folder]
        try:
            done = subprocess.run(words, capture_output=True)
        except OSError:
            return False
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


# ----------------------------------------------------------------------------------------------
# commands: what is there before, what has to be there after


@dataclass
class Cell:
    """A command and a disaster, in the current folder."""

    world: World
    moment: Moment
    disaster: Disaster

    def argv(self) -> list[str]:
        """The command's options; what it writes is below DISK."""
        world, out = self.world, str(DISK / "out")
        if self.moment.command == "semantic_learning":
            prior = ["--prior_weight", "1", "--num_class_images", "8"]
            return [*world.learning("toys", 3), *prior, "--output_dir", out, "--overwrite"]
        if self.moment.command == "semantic_synthesis":
            return [*world.painting(3, 3), "--output_path", out]
        if self.moment.command == "semantic_evaluation":
            example = str(world.work / "example")
            argv = [*world.painting(3, 3), "--features", "toybox", "--folder_path", example]
            return [*argv, "--output_path", out]
        if self.moment.command == "semantic_export":
            return [*world.exporting("learned"), "--output_path", out, "--overwrite"]
        return ["--box", "0,0,.5,.5", "--size", "64", "--output", f"{out}/mask.png"]

    def prepare(self) -> None:
        """What was finished before: of another seed, or just any file."""
        if self.moment.command == "semantic_learning":
            argv = [*self.world.learning("toys", 9), "--output_dir", str(DISK / "out")]
            earlier = self.world.result(Start("semantic_learning", argv, "earlier"), str(DISK))
        else:
            name = {
                "semantic_synthesis": "out/toys/0000.png",
                "semantic_evaluation": "out/mine.txt",
                "semantic_export": "out/toys/embeddings/asset0.safetensors",
                "visual_box_mask": "out/mask.png",
            }[self.moment.command]
            earlier = {name: b"of before"}
        for name, content in earlier.items():
            (DISK / name).parent.mkdir(parents=True, exist_ok=True)
            (DISK / name).write_bytes(content)

    def whole(self) -> dict[str, bytes]:
        """What the command leaves below DISK where nothing happens."""
        start = Start(self.moment.command, self.argv(), "whole")
        return self.world.result(start, str(DISK))

    def run(self) -> tuple[Ended, str]:
        """Have it happen; how it ended, and what was kept, in words."""
        with disk_for(self.disaster):
            self.prepare()
            before = files(DISK)
            if self.disaster.mount == "read-only":
                mount("-o", "remount,ro", str(DISK))
            ended = run_struck(self.moment, self.disaster, self.argv())
            if self.disaster.mount == "read-only":
                mount("-o", "remount,rw", str(DISK))
            (DISK / "filler").unlink(missing_ok=True)
            check(ended.is_told, f"a traceback: {ended.told[-1500:]}")
            check(ended.code in self.disaster.codes, f"exit code {ended.code}: {ended.told[-800:]}")
            is_heard = not self.disaster.ear
            if ended.code and is_heard:
                prog = f"{self.moment.command}.py: "
                check(ended.sentence.startswith(prog), f"no sentence: {ended.sentence}")
            kept = self.look(before, ended)
            self.run_again(ended)
            return ended, kept

    def look(self, before: dict[str, bytes], ended: Ended) -> str:
        """Check what is there; what was kept, in words."""
        after = files(DISK)
        left = [str(p) for p in DISK.rglob(".*") if p.suffix in (".part", ".new", ".old", ".lock")]
        check(not left, f"left behind: {left}")
        if self.disaster.strike is vanish:
            return "what was written afterwards" if after else "nothing"
        if ended.code == 0:
            return "all"
        for name, content in before.items():
            check(after.get(name) == content, f"{name} is not what it was")
        kept = ["what was there"]
        if self.moment.command == "semantic_learning" and WORK.is_file():
            from imagelab.training.checkpoint import read_checkpoint

            saved = read_checkpoint(WORK)
            kept.append(f"{saved.stage} to step {saved.step}")
        if any(".class_images" in name for name in after.keys() - before.keys()):
            kept.append("class images")
        if self.moment.command == "semantic_synthesis":
            numbers = sorted(int(p.stem) for p in (DISK / "out/toys").glob("[0-9]*.png"))[1:]
            for number in numbers:
                pixels = read_picture(DISK / f"out/toys/{number:04d}.png")
                check(pixels == painted(self.world, 2 + number), f"picture {number} is another")
            kept.append(f"{len(numbers)} of 3 pictures")
        if self.moment.command == "semantic_evaluation":
            path = DISK / "out/records.jsonl"
            count = len(path.read_text().splitlines()) if path.is_file() else 0
            kept.append(f"{count} of 3 records")
        return ", ".join(kept)

    def run_again(self, ended: Ended) -> None:
        """The command once more, when all is well again: it ends as if nothing had happened."""
        argv = self.argv()
        if ended.code == 0 and self.moment.command == "semantic_synthesis":
            return
        if WORK.is_file():
            argv = [*argv[:-1], "--resume"]
        again = alone(__import__(self.moment.command).main, argv, Path("log"))
        check(again.code == 0, f"again: {again.told[-800:]}")
        after, whole = files(DISK), self.whole()
        if self.moment.command == "semantic_synthesis":
            pictures = sorted((DISK / "out/toys").glob("[0-9]*.png"))[-3:]
            for seed, path in enumerate(pictures, 3):
                check(read_picture(path) == painted(self.world, seed), f"{path} is another seed's")
            return
        for name, content in whole.items():
            check(after.get(name) == content, f"{name} is not as in an unbroken run")


SHORT = (
    ("learning, stage 1", "closed pipe"),
    ("learning, stage 2", "SIGTERM"),
    ("synthesis", "closed terminal"),
    ("evaluation", "full disk"),
    ("export", "read-only"),
    ("visual_box_mask", "full disk"),
)


def disasters(work: Path, short: bool, only: Sequence[str] = ()) -> list[str]:
    """Run the cells; prints each as a row of the table, and returns those that went wrong."""
    import torch

    torch.set_num_threads(1)
    here, bad = Path.cwd(), []
    try:
        world = World(work.resolve())
        print("| command | disaster | exit code | says | keeps | wrong |", flush=True)
        print("|---|---|---|---|---|---|", flush=True)
        mounts = not short and can_mount()
        if not short and not mounts:
            print("real disks are left out: they cannot be mounted here", file=sys.stderr)
        for moment, disaster in itertools.product(MOMENTS, DISASTERS):
            is_meant = (moment.name, disaster.name) in SHORT if short else True
            if only and not any(word in f"{moment.name} {disaster.name}" for word in only):
                continue
            if not is_meant or (disaster.mount and not mounts):
                continue
            folder = world.work / "cell"
            folder.mkdir()
            os.chdir(folder)
            code, said, kept, wrong = "", "", "", ""
            try:
                ended, kept = Cell(world, moment, disaster).run()
                code, said = ended.code, ended.sentence if ended.code else ""
                said = "" if disaster.ear else said.partition(": ")[2].replace("|", "/")
            except (Broken, OSError, ValueError, KeyError) as error:
                wrong = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
            row = f"| {moment.name} | {disaster.name} | {code} | {said} | {kept} | {wrong} |"
            print(row, flush=True)
            bad += [row] if wrong else []
            os.chdir(world.work)
            shutil.rmtree(folder)
    finally:
        os.chdir(here)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of cells")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disasters_") as work:
        bad = disasters(Path(work), options.short, options.only)
    print(f"{len(bad)} cells are wrong", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
