"""A learning run killed at any moment (kill -9) damages nothing, and its resumption loses nothing.

The tests run this file as a script of its own, which forks: a fresh process can, one in which
torch has worked on several threads cannot.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from thin import contents

import imagelab.figures
from imagelab.training.loop import Trainer
from semantic_learning import main

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MIFO_KILLS", "4"))  # random moments to try
OPTIONS = ["--output_dir", "out", "--checkpoint_steps", "2", "--seed", "2"]


def in_child(work):
    """Do something in a fork; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def learn_until(argv, moment):
    """Learn, killed before the so-manieth step, written file or rename; returns their number."""
    count = itertools.count()

    def watched(function):
        def call(*args, **kwargs):
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    Trainer.update = watched(Trainer.update)
    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    main(argv)
    return next(count)


def kill_and_resume(argv, earlier, kills):
    """In folders of the current one: whole/, and for each moment n/killed and, resumed, n/out."""
    for name in ("plot_losses", "plot_attention"):
        setattr(imagelab.figures, name, lambda path, *args: path.touch())
    main([*argv, "--dry_run"])  # what this loads, the forks need not
    here = Path.cwd()

    def enter(name):
        shutil.copytree(earlier, here / name / "out")
        os.chdir(here / name)

    enter("whole")
    overwrite = [*argv, "--overwrite"]
    code = in_child(lambda: Path("count").write_text(str(learn_until(overwrite, -1))))
    assert code == 0
    total = int(Path("count").read_text())
    for moment in sorted(random.Random(0).sample(range(total), min(kills, total))):
        enter(str(moment))
        assert in_child(lambda moment=moment: learn_until(overwrite, moment)) == -signal.SIGKILL
        shutil.copytree("out", "killed")
        saved = Path("out/.toys.work/checkpoint.safetensors").is_file()
        again = [*argv, "--resume"] if saved else overwrite
        assert in_child(lambda again=again: main(again)) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_resume_bit_by_bit(learn_argv, learned_dir, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(
        str(ROOT / name) for name in (".", "tests", "lora-master")
    )
    work = json.dumps([[*learn_argv, *OPTIONS], str(learned_dir), KILLS])
    command = [sys.executable, __file__, work]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    earlier, whole = contents(learned_dir / "toys"), contents(tmp_path / "whole/out/toys")
    assert earlier != whole
    moments = [path for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert moments
    for path in moments:
        killed = path / "killed"
        assert earlier in (contents(killed / "toys"), contents(killed / ".toys.old")), path.name
        assert contents(path / "out/toys") == whole, path.name
        assert [left.name for left in (path / "out").iterdir()] == ["toys"], path.name


if __name__ == "__main__":
    kill_and_resume(*json.loads(sys.argv[1]))
