"""Sharing work over the processes of `accelerate launch`; without one, a single process."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from imagelab.errors import UserError

T = TypeVar("T")
#: How long a process that is done waits for the others, who may learn for hours.
PATIENCE = timedelta(days=30)


class Processes:
    """This process among all: ``index`` of ``count``.

    Raises UserError where several processes are announced, and they do not find each other.
    """

    def __init__(self, device: str):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = 0
        self.device = device
        if self.count > 1:
            if device.startswith("cuda:"):
                raise UserError(
                    f"--device {device} is one GPU, and there are {self.count} processes; give "
                    "--device cuda, of which each process takes its own"
                )
            if device == "cuda":
                _check_enough_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
            if self._state.num_processes != self.count:
                raise UserError(
                    f"WORLD_SIZE says {self.count} processes but accelerate started "
                    f"{self._state.num_processes}; use `accelerate launch` on CUDA devices or with "
                    "--device cpu, or unset WORLD_SIZE for a single process"
                )
            self.index = self._state.process_index
            if device == "cuda":
                self.device = str(self._state.device)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.index == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part; the parts of all processes make up the whole, without overlap."""
        return work[self.index :: self.count]

    def agree(self, value: T) -> T:
        """The first process's value, sent to all."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process through before the others, who then find what it wrote."""
        if self.count == 1:
            yield
            return
        if not self.is_first:
            self._wait()
        yield
        if self.is_first:
            self._wait()

    def _wait(self) -> None:
        """Wait for all. On the CPU accelerate would ask a machine with GPUs for one a process."""
        if self.device == "cpu":
            import torch

            torch.distributed.barrier()
        else:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """Wait for all, then leave the group: one process's exit code cannot disturb another."""
        if self.count > 1:
            self._wait()
            self._state.destroy_process_group()

    def end(self, code: int = 0) -> None:
        """End the command with an exit code, once all processes have come here.

        Several processes end at once, without Python's shutdown: a thread that a group leaves
        behind can abort it, and the launcher would hear of SIGABRT in place of the exit code.
        """
        self.leave()
        if self.count > 1:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if code:
            sys.exit(code)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order. All wait here for each other."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def _check_enough_gpus(processes: int) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes were started on this machine, which has GPUs for {gpus}; start "
            f"{gpus}, or give --device cpu"
        )
