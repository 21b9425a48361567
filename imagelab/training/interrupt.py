"""Ctrl-C during long work: finish the step, save, then stop."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """The work was stopped by Ctrl-C at the end of a step, and is saved."""


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self):
        self.asked = False

    def raise_if_asked(self, where: str) -> None:
        """Raise :class:`Interrupted`, which says where the work stopped."""
        if self.asked:
            raise Interrupted(f"stopped {where}")


@contextmanager
def finish_step_on_interrupt() -> Iterator[Interrupt]:
    """Within, the first Ctrl-C is noted; a second one interrupts at once.

    Outside the main thread, where Python delivers no signals, nothing is ever noted.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(signum, frame):
        interrupt.asked = True
        signal.signal(signal.SIGINT, former)
        log.warning("finishing this step; press Ctrl-C again to stop at once")

    former = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, former)
