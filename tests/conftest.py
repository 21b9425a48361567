"""Fixtures: the thin random Stable Diffusion 2.1 whose numbers `golden/` holds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> dict[str, torch.Tensor]:
    """All arrays of a golden file, as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


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
