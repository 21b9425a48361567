"""Fixtures: the thin random Stable Diffusion 2.1 whose numbers `golden/` holds, and others."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from thin import GOLDEN

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test, or its fixtures, draw without a seed of their own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def fails(capsys):
    """Run a command that must end with an exit code and no traceback; returns what it told.

    The result has what went to stdout as ``out``, to stderr as ``err``.
    """

    def run(command, *arguments, code=2, **named):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(*arguments, **named)
        told = capsys.readouterr()
        assert stop.value.code == code, told.err
        assert "Traceback" not in told.err
        return told

    return run


@pytest.fixture
def interruptible():
    """Ctrl-C is heard, as in a terminal; workers of pytest-xdist and background jobs ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="session")
def tiny_sd() -> Path:
    return GOLDEN / "tiny_sd"


@pytest.fixture(scope="session")
def small_sd(tiny_sd, tmp_path_factory) -> Path:
    """The same weights as a model of 128 px pictures (16×16 latents): quick to run."""
    folder = tmp_path_factory.mktemp("models") / "small_sd"
    shutil.copytree(tiny_sd, folder)
    for part, size in (("unet", 16), ("vae", 128)):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    return folder


@pytest.fixture(scope="session")
def examples(tmp_path_factory) -> Path:
    """A folder with one instance folder, `toys`: a picture of 128×128 pixels and two masks."""
    root = tmp_path_factory.mktemp("examples")
    folder = root / "toys"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 128)).save(folder / "img.jpg")
    for index, left in enumerate((8, 72)):
        mask = np.zeros((128, 128), np.uint8)
        mask[32:96, left : left + 48] = 255
        Image.fromarray(mask).save(folder / f"mask{index}.png")
    return root


@pytest.fixture(scope="session")
def learn_argv(examples, small_sd) -> list[str]:
    """The options of a learning run of a few steps, its output folder still to be given."""
    options = f"""--folder_path {examples} --instance toys --model_path {small_sd} --device cpu
        --mixed_precision no --seed 1 --train_steps 3 --reward_steps 1 --finetune_steps 2
        --lora_rank 2 --finetune_learning_rate 0.02 --prior_weight 0"""
    return options.split()


@pytest.fixture(scope="session")
def thin_argv(learn_argv, tiny_sd, tmp_path_factory) -> list[str]:
    """The same with a model of few layers, where each call of torch takes its time."""
    from thin import thin_pipeline, thin_scheduler, thin_unet

    folder = tmp_path_factory.mktemp("models") / "thin_sd"
    thin_pipeline(tiny_sd / "tokenizer", thin_unet(3), thin_scheduler()).save_pretrained(folder)
    return [*learn_argv, "--model_path", str(folder)]


@pytest.fixture(scope="session")
def learned_dir(learn_argv, tmp_path_factory) -> Path:
    """The folder with the learned folder `toys`, with a LoRA; tests only read it."""
    from semantic_learning import main

    folder = tmp_path_factory.mktemp("learned")
    main([*learn_argv, "--output_dir", str(folder)])
    return folder
