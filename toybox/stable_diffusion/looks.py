"""Looks that no word names, and tokens whose embeddings say them.

MIFO learns tokens that begin at random. A toybox that knows its words alone has nothing between
them for such a token to become, so it is trained with placeholder tokens as well, whose embeddings
lie where random ones lie and say continuously how a toy looks.

Axes: b batch, t tokens, l looks (of the toys of a scene), f features, w width of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toybox.scenes.scenes import Scene
from toybox.scenes.toys import KINDS, Look

FEATURES = len(KINDS) + 4
LEAST_GAIN = 0.8  # of saturation and value, as in instance folders


def with_free_looks(
    scene: Scene,
    rng: np.random.Generator,
    kinds: Sequence[str] = KINDS,
    shares: Sequence[float] | None = None,
) -> Scene:
    """A scene whose toys have any hue, and gains of saturation and value from 0.8 to 1.

    A third of the scenes of several toys have one kind, a sixth several kinds in one hue.
    ``shares``: how probable each of the kinds is, 1 in all (default: all alike).
    """
    count = len(scene.toys)
    chosen = rng.choice(len(kinds), size=count, replace=False, p=shares)
    hues, gains = rng.uniform(0, 360, count), rng.uniform(LEAST_GAIN, 1, (count, 2))
    alike = rng.random()
    if alike < 1 / 3:
        chosen[:] = chosen[0]
    elif alike < 1 / 2:
        hues[:] = hues[0]
    looks = [
        Look(kinds[kind], float(hue), float(saturation), float(value))
        for kind, hue, (saturation, value) in zip(chosen, hues, gains, strict=True)
    ]
    toys = zip(scene.toys, looks, strict=True)
    return replace(scene, toys=tuple(replace(placed, look=look) for placed, look in toys))


def features(kinds: Tensor, numbers: Tensor) -> Tensor:
    """Looks as a network reads them.

    Args:
        kinds: [..., l] indices in :data:`~toybox.scenes.scenes.KINDS`.
        numbers: [..., l, 3] hue in degrees, gain of saturation, gain of value.

    Returns:
        [..., l, f]: the kind one-hot, cosine and sine of the hue, and the gains from -1 to 1.
    """
    which = kinds[..., None] == torch.arange(len(KINDS), device=kinds.device)
    angle = torch.deg2rad(numbers[..., :1].float())
    gains = (numbers[..., 1:].float() - LEAST_GAIN) * (2 / (1 - LEAST_GAIN)) - 1
    return torch.cat([which.float(), angle.cos(), angle.sin(), gains], dim=-1)


class LookEmbedder(nn.Module):
    """From looks [..., f] to directions [..., w], each of mean 0 and variance 1.

    It is needed for the training alone.
    """

    def __init__(self, width: int, hidden: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width),
            nn.LayerNorm(width, elementwise_affine=False),
        )

    def forward(self, looks: Tensor) -> Tensor:
        return self.layers(looks)


def placeholder_embeddings(
    directions: Tensor, noise: Tensor, share: Tensor, table: Tensor
) -> Tensor:
    """Embeddings [..., w] that lie where random ones do, partly a look and partly noise.

    mean + std · (√(1 − b²) · direction + b · noise), with the mean and the standard deviation of
    each channel of the vocabulary: a token that MIFO begins at random is one with b = 1.

    Args:
        directions: [..., w] of a :class:`LookEmbedder`.
        noise: [..., w], normal.
        share: b, [..., 1], from 0 to 1.
        table: [vocabulary, w] embeddings of the words; no gradient goes there.
    """
    table = table.detach().float()
    mixed = (1 - share.square()).sqrt() * directions.float() + share * noise
    return table.mean(0) + table.std(0) * mixed


def encode_text(text_encoder, ids: Tensor, slots: Tensor, placeholders: Tensor) -> Tensor:
    """The text encoder's states [b, t, w] with placeholders' embeddings in place of words'.

    Args:
        text_encoder: CLIP's.
        ids: [b, t] tokens.
        slots: [b, t]; 1 + l where the token is the placeholder of look l, 0 where it is a word.
        placeholders: [b, l, w] embeddings.
    """
    rows = F.pad(placeholders, (0, 0, 1, 0))  # a row for the words, which is not taken
    chosen = rows.gather(1, slots[..., None].expand(-1, -1, rows.shape[-1]))

    def put(module, arguments, embedded: Tensor) -> Tensor:
        return torch.where(slots[..., None] > 0, chosen.to(embedded.dtype), embedded)

    hook = text_encoder.get_input_embeddings().register_forward_hook(put)
    try:
        return text_encoder(ids).last_hidden_state
    finally:
        hook.remove()
