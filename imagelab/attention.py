"""Attention layers of a diffusers UNet: find them by name, record and replace what they compute.

Axes: b batch, h heads, n query pixels, m keys (pixels or tokens), d channels a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_layers(unet, kind: str | None = None) -> dict[str, torch.nn.Module]:
    """All attention modules of a UNet by dotted name, in module order.

    ``kind`` keeps ``"self"`` (``attn1``) or ``"cross"`` (``attn2``) layers only.
    """
    ending = {None: ("attn1", "attn2"), "self": ("attn1",), "cross": ("attn2",)}[kind]
    return {n: m for n, m in unet.named_modules() if n.rsplit(".", 1)[-1] in ending}


def layer_grid(unet, size: tuple[int, int], name: str) -> tuple[int, int]:
    """Rows and columns at which the layer (or block) ``name`` works, for latents of ``size``."""
    grids = list(pixel_grids(unet, size).values())
    block, _, rest = name.partition(".")
    if block == "mid_block":
        return grids[-1]
    level = int(rest.split(".")[0])
    return grids[level] if block == "down_blocks" else grids[-1 - level]


def pixel_grids(unet, size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Number of pixels → (rows, columns) at each level of a UNet over latents of ``size``."""
    rows, columns = size
    grids = {}
    for _ in unet.config.block_out_channels:
        grids[rows * columns] = (rows, columns)
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return grids


@dataclass(frozen=True)
class PixelGroups:
    """A self-attention mask of one sample, without n² entries: groups of pixels that see the same.

    Attributes:
        parts: (queries, keys) int64: the pixels of a group, and those that they may attend to.
        order: int64 [n], the place of each pixel in the concatenation of all groups' queries.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    order: Tensor


def attend(
    attn,
    hidden: Tensor,
    context: Tensor | None,
    mask: Tensor | Sequence[PixelGroups] | None,
    probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """One attention layer, as diffusers computes it.

    Args:
        attn: diffusers' ``Attention`` module; a LoRA in its projections takes part.
        hidden: [b, n, c] queries; ``context``: [b, m, c'] keys and values, None for self-attention.
        mask: added to the logits, broadcastable to [b, h, n, m]; or groups of pixels
            (:func:`attend_in_groups`), which give no probabilities; or None.
        probabilities: compute them, in float32; otherwise the fused kernel runs.

    Returns:
        [b, n, c] output and the probabilities [b, h, n, m] (None unless asked for).
    """
    context = hidden if context is None else context
    query, key, value = (
        projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # b n (h d) -> b h n d
        for projected in (attn.to_q(hidden), attn.to_k(context), attn.to_v(context))
    )
    attention = None
    if probabilities:
        with torch.autocast(query.device.type, enabled=False):
            logits = attn.scale * (query.float() @ key.float().transpose(-1, -2))
        if mask is not None:
            logits = logits + mask
        attention = logits.softmax(dim=-1)
        out = attention.to(value.dtype) @ value
    elif isinstance(mask, Sequence):
        out = attend_in_groups(query, key, value, mask, attn.scale)
    else:
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=attn.scale)
    out = out.transpose(1, 2).flatten(2)  # b h n d -> b n (h d)
    return attn.to_out[1](attn.to_out[0](out)), attention


def attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[PixelGroups], scale: float
) -> Tensor:
    """Self-attention [b, h, n, d] of pixels that see the keys of their group only.

    Sample i has ``groups[i % len(groups)]``: one entry serves all samples, and one for each image
    serves both halves of the classifier-free batch.
    """
    # (r g) h n d -> r h n d for each of the g entries
    samples = [x.unflatten(0, (-1, len(groups))).unbind(1) for x in (query, key, value)]
    out = []
    for of_sample, q, k, v in zip(groups, *samples, strict=True):
        parts = [
            F.scaled_dot_product_attention(
                q.index_select(2, queries),
                k.index_select(2, keys),
                v.index_select(2, keys),
                scale=scale,
            )
            for queries, keys in of_sample.parts
        ]
        out.append(torch.cat(parts, dim=2).index_select(2, of_sample.order))
    return torch.stack(out, dim=1).flatten(0, 1)  # r g h n d -> (r g) h n d


class Processor:
    """A function as diffusers' attention processor.

    diffusers inspects the signature of ``__call__`` whenever a layer runs, which takes ten times
    longer for a function than for an instance.
    """

    def __init__(self, process: Callable):
        self.process = process

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_
    ) -> Tensor:
        return self.process(attn, hidden_states, encoder_hidden_states, attention_mask)


class Recorder:
    """Keeps the last probabilities of the layers that it watches, averaged over heads.

    ``maps[name]`` is [b, n, m], float32, differentiable. ``recorder.processor(name)`` is the
    attention processor of a layer.
    """

    def __init__(self):
        self.maps: dict[str, Tensor] = {}

    def processor(self, name: str) -> Processor:
        def process(attn, hidden_states, encoder_hidden_states, attention_mask):
            mask = None if attention_mask is None else attention_mask[:, None]  # b 1 1 m
            out, attention = attend(
                attn, hidden_states, encoder_hidden_states, mask, probabilities=True
            )
            self.maps[name] = attention.mean(dim=1)
            return out

        return Processor(process)


@contextmanager
def processors(unet, new: dict[str, object]) -> Iterator[None]:
    """Within, layers have these attention processors, by name; afterwards their former ones."""
    layers = {name: unet.get_submodule(name) for name in new}
    former = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.processor = new[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.processor = former[name]


class LeaveEarly(Exception):
    """Raised by the last layer that a pass needs."""


@contextmanager
def leave_early() -> Iterator[None]:
    """Around a UNet call: :class:`LeaveEarly` within ends the call, and no more."""
    with suppress(LeaveEarly):
        yield
