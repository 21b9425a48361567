"""The losses of MIFO as pure functions on tensors (Su et al., arXiv 2511.00542).

Axes: b samples, s subjects, n query pixels, m keys (tokens, or pixels in self-attention).
"""

import math

import torch
from torch import Tensor

REWARD_WEIGHT = 1e-2
PENALTY_WEIGHT = 2e-2
BREAK_A_SCENE_WEIGHT = 1e-2
#: Attention is regularised at timesteps below this one only.
REGULARISED_TIMESTEPS = 500


def reconstruction_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over *all* elements of (ε̂·M − ε·M)².

    Args:
        predicted, target: [b, c, h, w]; the noise ε, or the velocity of a v-prediction model.
        mask: broadcastable to them, 1 inside the union of the chosen instances.
    """
    return ((predicted - target) * mask).square().mean()


def reward_loss(attention: Tensor, mask: Tensor) -> Tensor:
    """mean((0.5·G − A)²): rewards a token's attention inside its mask.

    Args:
        attention: A [h, w], the token's cross-attention probability, mean over heads.
        mask: G [h, w] in [0, 1].
    """
    return (0.5 * mask - attention).square().mean()


def penalty_loss(attention: Tensor, mask: Tensor) -> Tensor:
    """mean((A·(1 − G))²): penalises attention outside the mask. Shapes as above."""
    return (attention * (1 - mask)).square().mean()


def break_a_scene_loss(attention: Tensor, mask: Tensor) -> Tensor:
    """mean((A / max A − G)²), of Break-A-Scene (Avrahami et al., arXiv 2305.16311). As above."""
    return (attention / attention.max() - mask).square().mean()


#: By name: the loss of one map and its weight.
ATTENTION_LOSSES = {
    "reward": (reward_loss, REWARD_WEIGHT),
    "penalty": (penalty_loss, PENALTY_WEIGHT),
    "break_a_scene": (break_a_scene_loss, BREAK_A_SCENE_WEIGHT),
}


def box_mass(attention: Tensor, regions: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mass F inside each subject's region and B in the background, of one layer.

    Args:
        attention: [b, heads, n, m] probabilities.
        regions: [b or 1, s, n] bool, the pixels of each subject.
        context: [b or 1, s, m] bool, the keys that belong to each subject: its tokens and the
            end-of-text token (cross-attention) or the pixels of its box (self-attention).

    Returns:
        F and B, each [b, s]: sums over heads, those pixels and those keys.
    """
    to_context = attention.sum(dim=1) @ context.to(attention.dtype).transpose(-1, -2)  # b n s
    background = ~regions.any(dim=1, keepdim=True)  # b 1 n
    mass = to_context.transpose(-1, -2)  # b s n
    return (mass * regions).sum(-1), (mass * background).sum(-1)


def box_term(foreground: Tensor, background: Tensor, alpha: float) -> Tensor:
    """(1 − F/(F+B))² + α·ln(1 + B), elementwise over [b, s]."""
    total = (foreground + background).clamp_min(torch.finfo(foreground.dtype).tiny)
    share = foreground / total
    return (1 - share).square() + alpha * torch.log1p(background)


def box_loss(
    cross: tuple[Tensor, Tensor],
    self_: tuple[Tensor, Tensor],
    alpha: float,
    cross_weight: float = 1.5,
    self_weight: float = 0.5,
) -> Tensor:
    """Loss of each sample, [b]: 1.5 · Σ cross terms + 0.5 · Σ self terms, sums over subjects.

    Args:
        cross, self_: (F, B), each [b, s], means over the layers of that kind.
        alpha: weight of the background term, see :func:`box_alpha`.
    """
    return cross_weight * box_term(*cross, alpha).sum(-1) + self_weight * box_term(
        *self_, alpha
    ).sum(-1)


def box_alpha(step: int) -> float:
    """α of denoising step ``step``: 0.55, 0.40, 0.25, 0.10, then a half cosine to 0.01 at 15."""
    if step <= 3:
        return 0.4 + (0.1 - 0.4) * (step - 1) / 2
    if step >= 15:
        return 0.01
    return 0.01 + (0.1 - 0.01) * (1 + math.cos(math.pi * (step - 3) / 12)) / 2
