"""Bounds attention to regions and reads what the box loss and the refinement need.

Axes: b images, s subjects, n query pixels, m keys (tokens, or pixels), k tokens.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from imagelab.attention import (
    LeaveEarly,
    PixelGroups,
    Processor,
    attend,
    attention_layers,
    layer_grid,
    pixel_grids,
    processors,
)
from imagelab.boxes import Box
from mifo.method.layers import decoder_block, loss_layers, map_layers
from mifo.method.losses import box_mass
from mifo.method.regions import Refiner, RegionSet, TokenRoles

#: From so many pixels on, bounded self-attention goes by groups of pixels instead of an n² mask:
#: twice as fast at 4096 on a CPU, slower at 256 (benchmarks/README.md).
GROUPED_PIXELS = 1024

Masses = tuple[Tensor, Tensor]  # F and B of each subject, [b, s]


class BoxControl:
    """Attention of one batch of images, bounded to the regions of its subjects.

    Args:
        unet: the UNet; its attention processors are replaced within the passes below only.
        tokens: roles of the prompt's tokens.
        boxes: one a subject, the first regions of all images.
        size: rows and columns of the latents.
        seeds: one an image.

    Attributes:
        regions: the current :class:`~mifo.method.regions.RegionSet`.
        recording: whether denoising passes give their maps to ``refiner``; off at first.
        map_grid: rows and columns of these maps.
    """

    def __init__(
        self,
        unet,
        tokens: TokenRoles,
        boxes: Sequence[Box],
        size: tuple[int, int],
        seeds: Sequence[int],
    ):
        self.unet, self.tokens = unet, tokens
        self.regions = RegionSet(boxes, tokens, unet.device)
        self.grids = pixel_grids(unet, size)
        self.map_grid = layer_grid(unet, size, decoder_block(unet))
        self.refiner = Refiner(self.map_grid, boxes, seeds)
        self.recording = False
        self._layers = list(attention_layers(unet))
        self._map_layers, self._loss_layers = map_layers(unet), loss_layers(unet)
        self._masses: dict[str, Masses] = {}
        context = torch.zeros(1, len(tokens.subjects), tokens.length, dtype=torch.bool)  # 1 s k
        for row, positions in zip(context[0], tokens.subjects, strict=True):
            row[[*positions, tokens.end]] = True
        self._token_context = context.to(unet.device)

    def guidance_pass(self) -> AbstractContextManager:
        """Around a UNet call on the conditional half alone: keeps F and B for :meth:`pop_masses`.

        The last layer that the box loss reads raises :class:`~imagelab.attention.LeaveEarly`.
        """
        self._masses.clear()
        return processors(self.unet, {n: self._guidance_processor(n) for n in self._layers})

    def denoising_pass(self) -> AbstractContextManager:
        """Around a UNet call on [unconditional; conditional], both halves of equal latents."""
        return processors(self.unet, {n: self._denoising_processor(n) for n in self._layers})

    def pop_masses(self) -> tuple[Masses, Masses]:
        """F and B, each [b, s], of the cross- and of the self-attention of the last guidance pass.

        They are means over the loss layers of a kind. They are kept no longer, since they hold the
        graph of the pass.
        """

        def mean(ending: str) -> Masses:
            found = [mass for name, mass in self._masses.items() if name.endswith(ending)]
            foreground, background = zip(*found, strict=True)
            return torch.stack(foreground).mean(0), torch.stack(background).mean(0)

        masses = mean("attn2"), mean("attn1")
        self._masses.clear()
        return masses

    def refine(self, step: int) -> None:
        """Replace the regions, before denoising step ``step``, by what the recorded maps show."""
        refined = self.refiner.refine(self.regions.at(*self.map_grid), step)
        self.regions = RegionSet(refined, self.tokens, self.unet.device)

    def _self_bounds(
        self, hidden_states: Tensor, probabilities: bool
    ) -> Tensor | list[PixelGroups]:
        """The self mask of a layer over ``hidden_states`` [b, n, c], in the faster form."""
        samples, pixels, _ = hidden_states.shape
        grid = self.grids[pixels]
        if pixels >= GROUPED_PIXELS and not probabilities:
            return self.regions.groups(*grid)
        return self.regions.bias(*grid, "self", samples, hidden_states.dtype)

    def _cross_bounds(self, hidden_states: Tensor, kind: str) -> Tensor:
        samples, pixels, _ = hidden_states.shape
        return self.regions.bias(*self.grids[pixels], kind, samples, hidden_states.dtype)

    def _guidance_processor(self, name: str) -> Processor:
        read = name in self._loss_layers
        last = name == self._loss_layers[-1]

        def process(attn, hidden_states, encoder_hidden_states, attention_mask):
            regions = self.regions.at(*self.grids[hidden_states.shape[1]])  # b|1 s n
            if encoder_hidden_states is None:
                mask, context = self._self_bounds(hidden_states, read), regions
            else:
                mask = self._cross_bounds(hidden_states, "guidance")
                context = self._token_context
            out, attention = attend(attn, hidden_states, encoder_hidden_states, mask, read)
            if read:
                self._masses[name] = box_mass(attention, regions, context)
            if last:
                raise LeaveEarly
            return out

        return Processor(process)

    def _denoising_processor(self, name: str) -> Processor:
        is_map = name in self._map_layers
        is_first = name == self._layers[0] and name.startswith("down_blocks.")

        def process(attn, hidden_states, encoder_hidden_states, attention_mask):
            if is_first:  # no layer has read the text yet: both halves are equal
                half = hidden_states.chunk(2)[0]
                mask = self._self_bounds(half, probabilities=False)
                return attend(attn, half, None, mask, probabilities=False)[0].repeat(2, 1, 1)
            recording = is_map and self.recording
            is_cross = encoder_hidden_states is not None
            if is_cross:
                mask = self._cross_bounds(hidden_states, "denoising")
            else:
                mask = self._self_bounds(hidden_states, recording)
            out, attention = attend(attn, hidden_states, encoder_hidden_states, mask, recording)
            if recording:
                attention = attention.chunk(2)[1].mean(dim=1)  # (2 b) h n m -> b n m
                if is_cross:
                    attention = attention[..., list(self.tokens.leading)]  # b n k -> b n s
                self.refiner.add("cross" if is_cross else "self", attention)
            return out

        return Processor(process)
