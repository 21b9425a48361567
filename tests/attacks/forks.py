"""Processes of the commands at once, or one that meets a disaster: forks of a warm parent.

A fresh Python needs seconds to import torch, a fork none. Torch must have worked on one thread.
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "lora-master")]
PATIENCE = 120  # seconds for one process


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal that killed it), what it told."""

    code: int
    told: str

    @property
    def is_told(self) -> bool:
        """Is the end one that a user can read: no traceback?"""
        return "Traceback" not in self.told and "Exception ignored" not in self.told

    @property
    def sentence(self) -> str:
        """The last line."""
        return re.split(r"[\r\n]+", self.told.strip())[-1]


def run_command(main: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Run a command as its script does; its exit code. A traceback goes to stderr."""
    try:
        main(list(argv))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(work: Callable[[], int], log: Path) -> int:
    """Start ``work`` in a fork, which ends with the exit code that it returns; the process's id.

    ``log`` gets what it prints.
    """
    child = os.fork()
    if child:
        return child
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    become(work, out)


def become(work: Callable[[], int], out: int) -> None:
    """In a fork: do ``work``, which prints to the descriptor ``out``, and end with its code."""
    from tqdm import tqdm

    code = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is of all forks: one that is killed may hold it
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(each, "w", buffering=1) for each in (1, 2))  # noqa: SIM115
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            former = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
            signal.signal(each, former)
        code = end(work())
    finally:
        os._exit(code)


def end(code: int) -> int:
    """The exit code of a process whose last act, as Python's, is to flush what it printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    return code


def wait(child: int) -> int:
    """The exit code of a process, minus its signal; one that hangs is killed."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished(child: int, log: Path) -> Ended:
    """Wait for a process, and read what it told."""
    code = wait(child)
    return Ended(code, log.read_text(errors="replace"))


def alone(main: Callable, argv: Sequence[str], log: Path) -> Ended:
    """A command in a process of its own, while nothing else runs."""
    return finished(fork(lambda: run_command(main, argv), log), log)
