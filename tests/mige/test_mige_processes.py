"""The commands on two processes of `accelerate launch`, which share the items."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from thin import free_port

from mige import generate

ROOT = Path(__file__).parents[2]


def launch(folder: Path, argv: list[str]) -> subprocess.CompletedProcess:
    options = f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port {free_port()}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "mige.generate", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_list_is_the_same_on_two_processes(model, place):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each process of a launch has: sums are rounded alike
    record = {"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>on the beach"}
    (place / "list.json").write_text(json.dumps([record] * 3))
    argv = f"--model {model} --items list.json --steps 2 --seed 3 --device cpu".split()
    argv += ["--mixed_precision", "no", "--output_path"]
    try:
        generate.main([*argv, "one"])
    finally:
        torch.set_num_threads(threads)
    done = launch(place, [*argv, "two"])
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (place / "one").iterdir())
    assert sorted(path.name for path in (place / "two").iterdir()) == names
    for name in ("0000.png", "0001.png", "0002.png"):
        with Image.open(place / "one" / name) as ours, Image.open(place / "two" / name) as theirs:
            assert np.array_equal(ours, theirs)
    assert done.stdout.count("0002.png") == 2  # the first process tells of all, and of the sheet
