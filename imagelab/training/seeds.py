"""Labelled seeds: every random draw has a stream of its own."""

import hashlib

import torch

from imagelab.errors import UserError, shown


def seed_for(seed: int, *labels: str | int) -> int:
    """The seed of one draw, from 0 to 2**63 - 1.

    ``seed_for(seed, "noise", 3)`` depends on the seed and the labels alone: not on what was drawn
    before, on the batch, the device or the number of processes. No two labels share a stream: the
    number is the start of a sha256 over all of them.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(x).__name__}:{x}" for x in labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_seed(seed: object) -> None:
    """Raises UserError unless a seed is a whole number from 0 to 2**63 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UserError(f"the seed is {shown(seed)}; give a whole number from 0 to 2**63 - 1")


def generator_for(seed: int, *labels: str | int) -> torch.Generator:
    """A fresh CPU generator of :func:`seed_for`'s seed."""
    return torch.Generator().manual_seed(seed_for(seed, *labels))
