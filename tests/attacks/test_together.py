"""The short form of together.py, as a script of its own: torch has to have one thread to fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_at_once_mix_and_lose_nothing(tmp_path):
    script = Path(__file__).with_name("together.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(script), "--rounds", "6", "--seed", "1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == 0 and found["counts"]["rounds"] == 6
    kinds = {name.partition(":")[0] for name in found["counts"]} - {"rounds"}
    assert kinds == {
        "learning", "class_images", "pictures", "exports", "evaluations", "previews",
    }  # fmt: skip
