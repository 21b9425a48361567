"""Attention layers of a UNet: choose them by name, watch and bound what they attend to.

Axes: b batch, h heads, n query pixels, m keys (pixels or tokens), d channels a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.errors import UserError
from mifo.method.losses import box_mass
from mifo.method.regions import PixelGroups, Refiner, RegionSet, TokenRoles

#: From so many pixels on, bounded self-attention goes by groups of pixels instead of an n² mask:
#: twice as fast at 4096 on a CPU, slower at 256 (benchmarks/README.md).
GROUPED_PIXELS = 1024

Masses = tuple[Tensor, Tensor]  # F and B of each subject, [b, s]


def attention_layers(unet, kind: str | None = None) -> dict[str, torch.nn.Module]:
    """All attention modules of a diffusers UNet by dotted name, in module order.

    ``kind`` keeps ``"self"`` (``attn1``) or ``"cross"`` (``attn2``) layers only.
    """
    ending = {None: ("attn1", "attn2"), "self": ("attn1",), "cross": ("attn2",)}[kind]
    return {n: m for n, m in unet.named_modules() if n.rsplit(".", 1)[-1] in ending}


def decoder_block(unet) -> str:
    """Name prefix of decoder-1, the block whose maps tell instances apart: ``up_blocks.1.``."""
    prefix = "up_blocks.1."
    if not any(name.startswith(prefix) for name in attention_layers(unet, "cross")):
        raise UserError(
            "the UNet has no attention in up_blocks.1, whose maps MIFO reads; "
            "use a Stable Diffusion 1 or 2 model"
        )
    return prefix


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


def attend(
    attn,
    hidden: Tensor,
    context: Tensor | None,
    mask: Tensor | Sequence[PixelGroups] | None,
    probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """One attention layer, as diffusers computes it.

    Args:
        attn: diffusers' ``Attention`` module (LoRA in its projections is honoured).
        hidden: [b, n, c] queries; ``context``: [b, m, c'] keys and values, None for self-attention.
        mask: added to the logits, broadcastable to [b, h, n, m]; or None; or groups of pixels
            (:func:`attend_in_groups`), which give no probabilities.
        probabilities: materialise them, in float32; otherwise the fused kernel runs.

    Returns:
        [b, n, c] output and the probabilities [b, h, n, m] (None unless asked for).
    """
    context = hidden if context is None else context
    query, key, value = (
        projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # b n (h d) -> b h n d
        for projected in (attn.to_q(hidden), attn.to_k(context), attn.to_v(context))
    )
    if probabilities:
        with torch.autocast(query.device.type, enabled=False):
            logits = attn.scale * (query.float() @ key.float().transpose(-1, -2))
        if mask is not None:
            logits = logits + mask
        attention = logits.softmax(dim=-1)
        out = attention.to(value.dtype) @ value
    elif isinstance(mask, Sequence):
        attention = None
        out = attend_in_groups(query, key, value, mask, attn.scale)
    else:
        attention = None
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
    return torch.stack(out, dim=1).flatten(0, 1)


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

    ``maps[name]`` is [b, n, m], float32, differentiable. A diffusers attention processor for a
    layer is ``recorder.processor(name)``.
    """

    def __init__(self):
        self.maps: dict[str, Tensor] = {}

    def processor(self, name: str):
        def process(attn, hidden_states, encoder_hidden_states, attention_mask):
            mask = None if attention_mask is None else attention_mask[:, None]  # b 1 1 m
            out, attention = attend(
                attn, hidden_states, encoder_hidden_states, mask, probabilities=True
            )
            self.maps[name] = attention.mean(dim=1)
            return out

        return Processor(process)


class BoxControl:
    """Bounds every attention layer to its regions, in guidance and in denoising passes.

    Args:
        unet: the UNet, for its layers and how they halve the latents.
        tokens: roles of the prompt's tokens.
        size: rows and columns of the latents.

    Attributes:
        regions: the current :class:`~mifo.method.regions.RegionSet`; whoever owns the loop replaces it.
        refiner: takes in the denoising passes' maps of the decoder's first attention block.
    """

    def __init__(self, unet, tokens: TokenRoles, size: tuple[int, int], regions: RegionSet):
        self.unet, self.tokens, self.regions = unet, tokens, regions
        self.grids = pixel_grids(unet, size)
        decoder = decoder_block(unet)
        self.layers = list(attention_layers(unet))
        self.map_layers = [n for n in self.layers if n.startswith(decoder)]
        self.loss_layers = [n for n in self.layers if n.startswith("mid_block.")] + self.map_layers
        self.map_grid = layer_grid(unet, size, decoder)
        self.refiner: Refiner | None = None
        self._masses: dict[str, Masses] = {}
        context = torch.zeros(1, len(tokens.subjects), tokens.length, dtype=torch.bool)
        for row, positions in zip(context[0], tokens.subjects, strict=True):
            row[[*positions, tokens.end]] = True
        self._token_context = context

    def guidance(self):
        """Context manager: processors of a guidance pass, which has the conditional half only.

        The pass ends (see :func:`leave_early`) after the last layer that the box loss reads.
        """
        self._masses.clear()
        return processors(self.unet, {name: self._guidance_processor(name) for name in self.layers})

    def denoising(self):
        """Context manager: processors of a denoising pass over [unconditional; conditional].

        Both halves start from the same latents.
        """
        return processors(
            self.unet, {name: self._denoising_processor(name) for name in self.layers}
        )

    def take_masses(self) -> tuple[Masses, Masses]:
        """Of the cross- and of the self-attention, F and B of the last guidance pass, each [b, s].

        They are means over the loss layers of a kind. They are handed over: what is kept here would
        keep the graph of the pass alive.
        """

        def mean(ending: str) -> Masses:
            found = [mass for name, mass in self._masses.items() if name.endswith(ending)]
            foreground, background = zip(*found, strict=True)
            return torch.stack(foreground).mean(0), torch.stack(background).mean(0)

        taken = mean("attn2"), mean("attn1")
        self._masses.clear()
        return taken

    def _self_bounds(
        self, hidden_states: Tensor, probabilities: bool
    ) -> Tensor | list[PixelGroups]:
        """What bounds a self-attention layer of such states, in the faster form."""
        samples, pixels, _ = hidden_states.shape
        grid = self.grids[pixels]
        if pixels >= GROUPED_PIXELS and not probabilities:
            return self.regions.groups(*grid)
        return self.regions.bias(*grid, "self", samples, hidden_states.dtype)

    def _guidance_processor(self, name: str):
        read = name in self.loss_layers
        last = name == self.loss_layers[-1]

        def process(attn, hidden_states, encoder_hidden_states, attention_mask):
            grid = self.grids[hidden_states.shape[1]]
            regions = self.regions.at(*grid)
            if encoder_hidden_states is None:
                mask, context = self._self_bounds(hidden_states, read), regions
            else:
                samples, dtype = len(hidden_states), hidden_states.dtype
                mask = self.regions.bias(*grid, "guidance", samples, dtype)
                context = self._token_context.to(regions.device)
            out, attention = attend(attn, hidden_states, encoder_hidden_states, mask, read)
            if read:
                self._masses[name] = box_mass(attention, regions, context)
            if last:
                raise _Left
            return out

        return Processor(process)

    def _denoising_processor(self, name: str):
        record = name in self.map_layers
        first = name == self.layers[0] and name.startswith("down_blocks.")

        def process(attn, hidden_states, encoder_hidden_states, attention_mask):
            if first:  # no text has been seen: both halves are the same yet
                half = hidden_states.chunk(2)[0]
                mask = self._self_bounds(half, probabilities=False)
                return attend(attn, half, None, mask, probabilities=False)[0].repeat(2, 1, 1)
            recording = record and self.refiner is not None
            crosswise = encoder_hidden_states is not None
            if crosswise:
                samples, pixels, _ = hidden_states.shape
                mask = self.regions.bias(
                    *self.grids[pixels], "denoising", samples, hidden_states.dtype
                )
            else:
                mask = self._self_bounds(hidden_states, recording)
            out, attention = attend(attn, hidden_states, encoder_hidden_states, mask, recording)
            if recording:
                attention = attention.chunk(2)[1].mean(dim=1)
                if crosswise:
                    attention = attention[..., list(self.tokens.leading)]
                self.refiner.add("cross" if crosswise else "self", attention)
            return out

        return Processor(process)


class _Left(Exception):
    """Raised by the last layer that a pass needs."""


@contextmanager
def leave_early() -> Iterator[None]:
    """Around a UNet call: ends it where a processor says that nothing further is read."""
    with suppress(_Left):
        yield


@contextmanager
def processors(unet, new: dict[str, object]) -> Iterator[None]:
    """Install attention processors by layer name; put the former ones back, whatever happens."""
    layers = {name: unet.get_submodule(name) for name in new}
    former = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.processor = new[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.processor = former[name]
