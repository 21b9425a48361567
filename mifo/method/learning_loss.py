"""The loss of one step of semantic learning, as a pure function (arXiv 2511.00542, section 3).

Axes: b samples (the class sample if there is one, then the instance view), c latent channels, h and
w latent rows and columns, m chosen assets, H and W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mifo.method.losses import ATTENTION_LOSSES, reconstruction_loss


@dataclass
class StepLoss:
    """The loss of a step and its unweighted terms (attention: layer-major, asset-minor)."""

    total: Tensor
    reconstruction: Tensor
    prior: Tensor | None = None
    attention: list[Tensor] = field(default_factory=list)


def learning_loss(
    predicted: Tensor,
    target: Tensor,
    maps: Mapping[str, Tensor],
    masks: Tensor,
    attention_term: str | None = None,
    prior_weight: float = 1.0,
    attention_weight: float = 1.0,
) -> StepLoss:
    """Masked reconstruction + prior_weight · prior + attention_weight · Σ attention terms.

    Args:
        predicted, target: [b, c, h, w] the noise, or the velocity of a v-prediction model. The last
            sample is the instance view; the one before it, if any, is a class image.
        maps: by layer, [m, rows, columns] attention probabilities of the chosen assets' tokens in
            the instance view, mean over heads. Empty: the step is not regularised.
        masks: [m, H, W] in [0, 1], of the chosen assets, in the same order.
        attention_term: a key of :data:`~mifo.method.losses.ATTENTION_LOSSES`; needed with maps.
    """
    union = masks.amax(dim=0)[None, None]  # 1 1 H W
    union = F.interpolate(union, predicted.shape[-2:], mode="nearest")
    reconstruction = reconstruction_loss(predicted[-1:], target[-1:], union)
    loss = StepLoss(reconstruction, reconstruction)
    if len(predicted) > 1:
        loss.prior = F.mse_loss(predicted[:-1], target[:-1])
        loss.total = loss.total + prior_weight * loss.prior
    if maps:
        term, weight = ATTENTION_LOSSES[attention_term]
        for columns in maps.values():
            goals = F.interpolate(masks[None], columns.shape[-2:], mode="bilinear")[0]
            loss.attention += [term(a, g) for a, g in zip(columns, goals, strict=True)]
        loss.total = loss.total + attention_weight * weight * torch.stack(loss.attention).sum()
    return loss
