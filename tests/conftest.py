"""Fixtures: the thin random Stable Diffusion 2.1 whose numbers `golden/` holds."""

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
