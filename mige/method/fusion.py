"""From pictures to vectors that stand among the words (MIGE, section 3.2).

Axes: r pictures, q queries, n patches of the autoencoder's latents, w width of the fusion, p width
of the patch embedding, d width of the text.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class FeatureFusion(nn.Module):
    """What a picture means, out of the Q-Former, looks up what it shows, in the latents.

    With q = LN(W c), k = LN(A₂ gelu(A₁ v)), u = LN(B₂ gelu(B₁ v)) and a = MHA(q, k, u), the result
    is LN(c + M a + m). M and m begin at zero, so that it begins as LN(c).
    """

    def __init__(self, width: int, heads: int, patch_width: int, eps: float = 1e-6):
        super().__init__()

        def reader() -> nn.Sequential:
            return nn.Sequential(nn.Linear(patch_width, width), nn.GELU(), nn.Linear(width, width))

        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = reader(), reader()
        self.norm_query, self.norm_key, self.norm_value, self.norm_out = (
            nn.LayerNorm(width, eps=eps) for _ in range(4)
        )
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mix = nn.Linear(width, width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.mix.weight)

    def forward(self, meaning: Tensor, patches: Tensor) -> Tensor:
        """Vectors [r, q, w] of the Q-Former's [r, q, w] and embedded patches [r, n, p]."""
        query = self.norm_query(self.query(meaning))
        key = self.norm_key(self.key(patches))
        value = self.norm_value(self.value(patches))
        found, _ = self.attention(query, key, value, need_weights=False)
        return self.norm_out(meaning + self.mix(found))


class InstructionFusion(ModelMixin, ConfigMixin):
    """The parts between the encoders of pictures and the text encoder.

    They are the Q-Former's queries, the feature fusion, its projection to the text's width, and the
    states that stand for "no text".

    Args:
        queries, width: of the Q-Former.
        heads: of the fusion's attention.
        patch_width: of the transformer's patch embedding.
        text_width, text_length: of the text encoder's states.
        reads_latents: False leaves out what pictures show, as in the paper's ablation: vectors say
            what they mean alone.
    """

    @register_to_config
    def __init__(
        self,
        queries: int = 32,
        width: int = 768,
        heads: int = 8,
        patch_width: int = 1152,
        text_width: int = 4096,
        text_length: int = 256,
        reads_latents: bool = True,
    ):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.features = FeatureFusion(width, heads, patch_width)
        self.projection = nn.Linear(width, text_width)
        null = torch.randn(text_length, text_width) / text_width**0.5
        self.register_buffer("null_text", null)

    def forward(self, meaning: Tensor, patches: Tensor) -> Tensor:
        """Vectors [r, q, d] that stand for pictures among the words.

        Args:
            meaning: [r, q, w], the Q-Former's.
            patches: [r, n, p], the latents as the transformer embeds them, without positions.
        """
        if not self.config.reads_latents:
            return self.projection(self.features.norm_out(meaning))
        return self.projection(self.features(meaning, patches))
