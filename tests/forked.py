"""Two processes that find each other as those of a launcher do, forked once all is imported.

    python tests/forked.py MODULE ARGUMENTS    runs the module's main in both

It takes half as long as a launcher, whose processes import torch three times.
"""

import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path

from thin import free_port  # with which diffusers and transformers are imported

ROOT = Path(__file__).parents[1]


def fork_two(main) -> int:
    """Run a function in two processes; the larger of their exit codes. For a script."""
    port, children = str(free_port()), []
    for rank in ("0", "1"):
        child = os.fork()
        if not child:
            os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank}
            os.environ |= {"LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            code = 1
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def start_two(module: str, *argv: str, **settings) -> subprocess.Popen:
    """The script, with ``settings`` of ``Popen``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, __file__, module, *argv], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    run = importlib.import_module(name).main
    sys.exit(fork_two(lambda: run(arguments)))
