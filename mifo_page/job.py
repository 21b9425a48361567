"""The commands that the page shows, and the one that is running."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from imagelab.boxes import parse_boxes
from imagelab.errors import UserError
from mifo.learning.config import LearningConfig
from mifo.synthesis.config import SynthesisConfig
from mifo_page.places import Places, folder_in

#: How a learning run starts: the page's words for what the command calls it.
STARTS = {"new": "anew", "resume": "go on (--resume)", "overwrite": "replace (--overwrite)"}

LINES = 12  # the last ones of what a command prints


def command(
    module: str,
    defaults: Mapping,
    values: Mapping,
    flags: Sequence[str] = (),
    given: Sequence[str] = ("instance", "model_id", "prompt"),
) -> list[str]:
    """``python -m module`` with the values that are not the defaults, and those always ``given``.

    Whatever a value holds, it stays the value of its option: none can become another option.
    """
    words = ["python", "-m", module]
    for name, value in values.items():
        is_given = name in given or value != defaults[name]
        if value is None or not is_given:
            continue
        if isinstance(value, tuple):
            if bad := [word for word in value if word.startswith("-")]:
                raise UserError(f"{bad[0]!r} is no word for --{name}; leave out its hyphen")
            words += [f"--{name}", *value]
        elif isinstance(value, bool):
            words.append(f"--{name}")
        else:
            text = str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return [*words, *flags]


def learning_command(places: Places, instance: str, start: str, **settings) -> list[str]:
    """``semantic_learning`` of an instance; ``start`` is one of STARTS."""
    folder_in(places.folder_path, instance, "instance")
    if start not in STARTS:
        raise UserError(f"{start!r} is no way to start; choose one of {', '.join(STARTS)}")
    values = {
        "instance": instance,
        "folder_path": places.folder_path,
        "output_dir": places.models_dir,
        "model_path": places.model_path,
        "device": places.device,
        "offline": places.offline,
    }
    flags = [] if start == "new" else [f"--{start}"]
    return command("semantic_learning", LearningConfig().settings(), values | settings, flags)


def synthesis_command(places: Places, model_id: str, boxes: str, **settings) -> list[str]:
    """``semantic_synthesis`` with a learned folder and boxes, a JSON list in the prompt's order."""
    folder_in(places.models_dir, model_id, "model_id")
    parse_boxes(boxes)
    values = {
        "model_id": model_id,
        "models_dir": places.models_dir,
        "output_path": places.output_path,
        "device": places.device,
        "offline": places.offline,
    }
    defaults = SynthesisConfig().settings()
    return command("semantic_synthesis", defaults, values | settings, ["--boxes", boxes])


def shown(argv: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(argv)


def as_words(text: str) -> tuple[str, ...]:
    """Entries separated by commas, each of a word or several."""
    return tuple(entry for entry in map(str.strip, text.split(",")) if entry)


def begin(argv: Sequence[str]) -> subprocess.Popen:
    """A process of a command that starts with ``python``; UserError where it is too long."""
    try:
        return subprocess.Popen(
            [sys.executable, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # the returns of a progress bar become ends of lines
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,  # Ctrl-C is for the page, which then stops its command
        )
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        longest = max(argv, key=len)
        raise UserError(f"{longest[:40]!r}… is too long for a command; shorten it") from error


class Job:
    """Runs one command at a time in a process of its own, and keeps the last lines it prints."""

    def __init__(self):
        self.title = ""
        self._lines: deque[str] = deque(maxlen=LINES)
        self._process: subprocess.Popen | None = None
        self._stopped = False  # Stop was pressed
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, title: str, argv: Sequence[str]) -> None:
        """Run a command that starts with ``python``; UserError while another is running."""
        with self._lock:
            if self.running:
                raise UserError(f"{self.title} is still running; stop it or wait for its end")
            process = begin(argv)
            self.title, self._stopped = title, False
            self._lines.clear()
            self._process = process
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            with self._lock:
                if self._lines and "%|" in line and "%|" in self._lines[-1]:
                    self._lines.pop()  # a progress bar takes its former place
                if line.strip():
                    self._lines.append(line.rstrip())
        process.wait()

    def output(self) -> str:
        """The last lines that the command has printed."""
        with self._lock:
            return "\n".join(self._lines)

    def stop(self) -> None:
        """Ctrl-C: learning finishes its step and saves it; a second one ends it at once."""
        if not self.running:
            return
        self._stopped = True
        if os.name == "nt":
            self._process.terminate()  # goes on from its last checkpoint
        else:
            self._process.send_signal(signal.SIGINT)

    def close(self, seconds: float = 60) -> None:
        """Stop, unless that has been done, and wait for the step to be saved."""
        if not self._stopped:
            self.stop()
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def status(self) -> str:
        """What the command is doing, or how it ended."""
        if self._process is None:
            return "nothing has been started"
        code = self._process.poll()
        ends = {None: "running", 0: "finished", 130: "stopped"}
        failed = "stopped" if self._stopped else f"failed (exit code {code})"
        return f"{self.title}: {ends.get(code, failed)}"
