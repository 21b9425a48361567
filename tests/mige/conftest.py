"""A saved MIGE of few layers, and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mige import save_tiny


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Coarse noise, so that no two look alike."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture(scope="module")
def one_thread():
    """As the golden arrays were computed, and so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Folder of a model."""
    return save_tiny(tmp_path_factory.mktemp("mige") / "model")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with three pictures."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("dog.png", "cat.png", "in.png")):
        picture(seed, 40 - 6 * seed, 30 + 5 * seed).save(tmp_path / name)
    return tmp_path
