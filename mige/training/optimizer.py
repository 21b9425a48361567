"""What updates the weights: AdamW, or Muon for the matrices of the transformer's blocks."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from imagelab.training.optimizers import JoinedOptimizer
from mige.training.config import ADAM_BETAS, ADAM_EPS, Recipe

TRUNK = "parts.transformer."
BLOCKS = f"{TRUNK}transformer_blocks."
#: Momentum, and iterations that make the singular values alike.
MUON = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}
#: Numbers that are kept of each weight.
ADAMW_MOMENTS, MUON_MOMENTS = 2, 1


def make_optimizer(named: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """An optimiser of what learns.

    Muon (Jordan et al., 2024) makes the singular values of a matrix's update alike. Its updates are
    scaled to be as large as AdamW's (Liu et al., arXiv 2502.16982), so that both take one rate.
    """
    matrices = dict(matrices_of(named, recipe))
    others = {name: each for name, each in named.items() if name not in matrices}
    adamw = torch.optim.AdamW(
        parameter_groups(others, recipe), betas=ADAM_BETAS, eps=ADAM_EPS,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    if not matrices:
        return adamw
    muon = torch.optim.Muon(
        matrices.values(), lr=recipe.rate, weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw", **MUON,
    )  # fmt: skip
    return JoinedOptimizer(adamw, muon)


def matrices_of(named: Mapping[str, Tensor], recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """What Muon updates."""
    if recipe.optimizer == "muon":
        for name, each in named.items():
            if name.startswith(BLOCKS) and name.endswith(".weight") and each.ndim == 2:
                yield name, each


def parameter_groups(named: Mapping[str, Tensor], recipe: Recipe) -> list[dict]:
    """The weights of each rate: the transformer's, and all others."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in named.items():
        rate = recipe.rate if name.startswith(TRUNK) else recipe.rate_of_conditioning
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def moments_of(named: Mapping[str, Tensor], recipe: Recipe) -> int:
    """Numbers that the optimiser keeps."""
    matrices = sum(each.numel() for _, each in matrices_of(named, recipe))
    weights = sum(each.numel() for each in named.values())
    return ADAMW_MOMENTS * (weights - matrices) + MUON_MOMENTS * matrices
