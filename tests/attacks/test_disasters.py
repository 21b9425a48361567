"""The short form of disasters.py, as a script of its own: torch has to have one thread to fork."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: A cell, its exit code, what it says and what it keeps.
ROWS = """
| learning, stage 1 | closed pipe | 0 |  | all |
| learning, stage 2 | SIGTERM | 143 | stopped after step 2 of stage 2 | what was there, stage 2 to \
step 2, class images |
| synthesis | closed terminal | 129 |  | what was there, 1 of 3 pictures |
| evaluation | full disk | 2 | error: the disk is full; nothing that was there before has been \
changed: free some space | what was there, 1 of 3 records |
| export | read-only | 2 | error: … | what was there |
| visual_box_mask | full disk | 2 | error: --output disk/out/mask.png cannot be written (No space \
left on device); name another file | what was there |
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_disasters_end_in_a_sentence_and_lose_nothing(tmp_path):
    script = Path(__file__).with_name("disasters.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(script), "--short"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    for row in ROWS.strip().splitlines():
        beginning, _, end = row.partition("…")
        found = [line for line in done.stdout.splitlines() if line.startswith(beginning)]
        assert len(found) == 1, row
        assert end in found[0] and "Read-only" in found[0] if end else found[0].endswith("|  |")
