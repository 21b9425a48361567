"""MIGE: pictures from instructions in which pictures stand among the words (arXiv 2502.21291)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mige.method.fusion import InstructionFusion
    from mige.method.sampler import ContinuousDPMSolver
    from mige.pipeline import MigePipeline

__all__ = ["ContinuousDPMSolver", "InstructionFusion", "MigePipeline"]
_HOMES = {
    "ContinuousDPMSolver": "mige.method.sampler",
    "InstructionFusion": "mige.method.fusion",
    "MigePipeline": "mige.pipeline",
}


def __getattr__(name: str):
    """Import what is asked for, so that `--help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
