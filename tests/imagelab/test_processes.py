"""Several processes on the CPU of a machine that has fewer GPUs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Two processes; torch says that the machine has a GPU, but no tensor can be put there.
SCRIPT = """
import sys
import torch
from forked import fork_two
from imagelab.processes import Processes

torch._C._get_accelerator = lambda *_: torch.device("cuda")

def main():
    processes = Processes("cpu")
    with processes.first_alone():
        print("alone", processes.index, flush=True)
    print(processes.gather(processes.index), processes.agree(processes.index), flush=True)
    processes.end(3)

sys.exit(fork_two(main))
"""


def test_processes_on_the_cpu_need_no_gpu():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": path}, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 3, found.stderr
    assert found.stdout.splitlines() == ["alone 0", "alone 1", "[0, 1] 0", "[0, 1] 0"]
