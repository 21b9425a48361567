"""The commands on two processes of `accelerate launch`, which share the work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from thin import contents, free_port

import semantic_learning
import semantic_synthesis
from mifo_lora import read_lora

ROOT = Path(__file__).parents[2]


def launch(folder, script, argv):
    """Run a script on two processes, in a folder. (--multi_gpu means several, of any device.)"""
    options = f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port {free_port()}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / script), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def one_thread():
    """As many threads as each process of a launch has: sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_pictures_are_the_same(learned_dir, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    argv = (
        f"""--models_dir {learned_dir} --model_id toys --num_images 3 --seed 7 --device cpu
        --mixed_precision no --num_inference_steps 1 --guidance_steps 1 --guidance_iterations 1
        --prompt""".split()
        + ["<asset0> and <asset1>"]
    )
    done = launch(tmp_path, "semantic_synthesis.py", [*argv, "--output_path", "two"])
    assert done.returncode == 0, done.stderr
    semantic_synthesis.main([*argv, "--output_path", "one"])
    one, two = tmp_path / "one/toys", tmp_path / "two/toys"
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 2 * 3 + 1
    assert sorted(path.name for path in two.iterdir()) == names
    for name in (name for name in names if name.endswith(".png")):
        with Image.open(one / name) as ours, Image.open(two / name) as theirs:
            assert np.array_equal(ours, theirs)
    assert done.stdout.count("/0002.png") == 1  # the first process tells of all
    assert (one / "0000.png").read_bytes() != (one / "0001.png").read_bytes()


def test_one_learns_though_the_other_fails(learn_argv, learned_dir, examples, tmp_path):
    shutil.copytree(examples, tmp_path / "mine")
    (tmp_path / "mine/bad").mkdir()
    argv = [*learn_argv, "--folder_path", "mine", "--instance", "bad", "toys"]
    argv += ["--output_dir", "out", "--finetune", "none"]
    done = launch(tmp_path, "semantic_learning.py", argv)
    told = done.stdout.splitlines()[-2:]
    assert told == [
        "bad: mine/bad holds no img.jpg; save the picture under that name",
        "toys: learned",
    ]
    assert done.returncode != 0
    assert re.search(r"exitcode *: 2", done.stderr)  # how the launcher tells of exit code 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["toys"]
    row = read_lora(tmp_path / "out/toys/asset0.safetensors")[0]["<asset0>"]
    assert row.isfinite().all() and row.shape == (1, 32)


def test_a_result_that_came_since_the_plan_is_kept(learn_argv, tmp_path, fails, monkeypatch):
    """Two runs of one instance, one after the other has looked: the earlier result stays."""
    from mifo.learning import description

    argv = [*learn_argv, "--output_dir", str(tmp_path), "--finetune", "none"]
    describe, results = description.describe, []

    def meanwhile(plan):
        if not results:
            results.append(None)
            semantic_learning.main([*argv, "--seed", "2"])
            results[0] = contents(tmp_path / "toys")
        return describe(plan)

    monkeypatch.setattr(description, "describe", meanwhile)
    assert "is there already; give --overwrite" in fails(semantic_learning.main, argv).err
    assert contents(tmp_path / "toys") == results[0]
