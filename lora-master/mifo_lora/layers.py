"""The LoRA layer: a frozen Linear plus a trainable branch of low rank.

    y = W x + b + (alpha / r) · B A x        W [out, in], A [r, in], B [out, r]

A is drawn as torch draws the weight of a Linear, B is zero: a fresh layer computes what its base
computes (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685).
"""

import math

import loralib
import torch
from torch import nn
from torch.nn import functional


class LoRALinear(loralib.Linear):
    """A `loralib.Linear` around an existing `nn.Linear`, whose weight and bias it shares.

    The base keeps its dtype and device and is frozen; A and B are float32 on the same device.
    Merging happens in `merge()` alone, never in `train()` or `eval()`.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        # On "meta" the parent allocates nothing and draws nothing from torch's own generator.
        super().__init__(
            base.in_features,
            base.out_features,
            r=rank,
            lora_alpha=alpha,
            merge_weights=False,
            bias=base.bias is not None,
            device="meta",
        )
        self.weight, self.bias = base.weight, base.bias
        self.lora_dropout = nn.Dropout(dropout)
        # Drawn where the generator lives, the CPU by default: a seed means the same on any device.
        a = torch.empty(
            rank,
            base.in_features,
            dtype=torch.float32,
            device="cpu" if generator is None else generator.device,
        )
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(base.out_features, rank, dtype=torch.float32)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(b.to(base.weight.device))
        self.train(base.training)

        self._base = (base,)  # in a tuple, which torch does not list as a submodule
        self._base_trainable = {name: p.requires_grad for name, p in base.named_parameters()}
        self._unmerged_weight: torch.Tensor | None = None
        base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out] in the base's dtype; the branch is in float32 or autocasts."""
        result = functional.linear(x, self.weight, self.bias)
        if self.merged:
            return result
        down = functional.linear(self.lora_dropout(x).to(self.lora_A.dtype), self.lora_A)
        return result + (functional.linear(down, self.lora_B) * self.scaling).to(result.dtype)

    def set_alpha(self, alpha: float) -> None:
        """Set the strength of the branch: its factor is alpha / rank."""
        self.lora_alpha, self.scaling = alpha, alpha / self.r

    @torch.no_grad()
    def merge(self) -> None:
        """Add (alpha / r) · B A to the weight; the weight before is kept for `unmerge`."""
        if self.merged:
            return
        self._unmerged_weight = self.weight.data
        merged = self.weight + (self.lora_B @ self.lora_A) * self.scaling  # summed in float32
        self.weight.data = merged.to(self.weight.dtype)
        self.merged = True

    def unmerge(self) -> None:
        """Put back the very weight from before `merge`, to the bit."""
        if not self.merged:
            return
        # Follows the weight, should the model have moved or changed its dtype in between.
        self.weight.data = self._unmerged_weight.to(self.weight)
        self._unmerged_weight = None
        self.merged = False

    def release(self) -> nn.Linear:
        """The original module, as trainable as it was, with the weight and bias held now."""
        (base,) = self._base
        base.weight, base.bias = self.weight, self.bias
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._base_trainable[name])
        return base.train(self.training)
