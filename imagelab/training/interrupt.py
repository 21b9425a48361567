"""Ctrl-C during long work, and being asked to end: finish the step, save, then stop.

A process is asked to end by `kill`, by a batch system whose time is up, and by a terminal that is
closed. Processes of a launch leave that to their launcher, which ends them.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

log = logging.getLogger(__name__)

AGAIN = "; press Ctrl-C again to stop at once"
#: What asks a process to end, beside Ctrl-C. Windows has no SIGHUP.
ENDINGS = tuple(getattr(signal, each) for each in ("SIGTERM", "SIGHUP") if hasattr(signal, each))


class Stopped(KeyboardInterrupt):
    """The process was asked to end, by the signal ``signum``."""

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message)
        self.signum = signum


class Interrupted(Stopped):
    """The work was stopped by Ctrl-C, or asked to end, and is saved as of the end of a step."""


class Interrupt:
    """Whether Ctrl-C was pressed or the process asked to end, and by which signal."""

    def __init__(self):
        self.asked = False
        self.signum: int = signal.SIGINT

    def raise_if_asked(self, where: str) -> None:
        """Raise :class:`Interrupted`, which says where the work stopped."""
        if self.asked:
            raise Interrupted(f"stopped {where}", self.signum)


def signal_of(stop: BaseException) -> int:
    """The signal that a stop is from, through the exceptions that it was raised for."""
    while not isinstance(stop, Stopped):
        if stop.__context__ is None:
            return signal.SIGINT
        stop = stop.__context__
    return stop.signum


@contextmanager
def finish_step_on_interrupt() -> Iterator[Interrupt]:
    """Within, the first Ctrl-C is noted, and being asked to end; Ctrl-C then interrupts at once.

    Outside the main thread, where Python delivers no signals, nothing is ever noted.
    """
    interrupt = Interrupt()

    def handle(signum, frame):
        interrupt.asked, interrupt.signum = True, signum
        signal.signal(signal.SIGINT, former)
        _ignore(endings)
        log.warning("finishing this step%s", "" if is_ignored else AGAIN)

    former, endings = signal.getsignal(signal.SIGINT), _endings()
    is_ignored = former is signal.SIG_IGN  # as by a shell's script, of what runs in the background
    with _handled(handle, endings if is_ignored else (signal.SIGINT, *endings)):
        yield interrupt


@contextmanager
def stop_when_asked() -> Iterator[None]:
    """Within, being asked to end raises :class:`Stopped`, as Ctrl-C raises KeyboardInterrupt.

    It does so once: what is cleared away meanwhile is not disturbed.
    """

    def handle(signum, frame):
        _ignore(endings)
        raise Stopped("stopped", signum)

    endings = [each for each in _endings() if signal.getsignal(each) is signal.SIG_DFL]
    with _handled(handle, endings):
        yield


def _endings() -> list[int]:
    """The signals that ask this process to end; not one that is ignored, as `nohup` has it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return []
    return [each for each in ENDINGS if signal.getsignal(each) not in (signal.SIG_IGN, None)]


def _ignore(signals: Sequence[int]) -> None:
    for each in signals:
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def _handled(handle: Callable, signals: Sequence[int]) -> Iterator[None]:
    """Within, signals have this handler, in the main thread; afterwards their former ones."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {each: signal.signal(each, handle) for each in signals}
    try:
        yield
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
