"""What a command prints, where nobody may be left to read it.

A terminal is closed, `| head` has seen enough, Ctrl-C ends `| tee log` as well, the disk with the
log is full: work of hours does not end by that, it goes on in silence.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO


class Console:
    """A stream for which nobody need be there: from the first failure on, its text is dropped.

    What its encoding does not know is written as an escape.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # such as into a file on Windows
            encoding = self._stream.encoding  # the error's own may be "charmap"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Let the stream's file be one that takes all; Python's own flush at the end works, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)


@contextmanager
def heard_or_not() -> Iterator[None]:
    """Within, printing and the progress bars never fail; on stdout and stderr that are there."""
    with (
        _open(sys.stdout) as out, _open(sys.stderr) as err, redirect_stdout(out),
        redirect_stderr(err),
    ):  # fmt: skip
        try:
            yield
        finally:
            out.flush()
            err.flush()


@contextmanager
def _open(stream: TextIO | None) -> Iterator[Console]:
    if stream is not None:
        yield Console(stream)
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # the process was started without
        yield Console(nowhere)
