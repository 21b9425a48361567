"""The sizes of a release's parts, read off the shapes of its tensors, and parts of such sizes.

What no shape shows is a fact of the released model: epsilons, activations, and numbers of heads.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from imagelab.errors import UserError

Config = dict[str, object]

#: Heads of attention that the released parts have, and the width that tells these parts.
HEADS = {
    "transformer": (16, 1152),
    "vision_encoder": (16, 1408),
    "qformer": (12, 768),
    "fusion": (8, 768),
}


def configs_of(state: Mapping[str, Tensor], heads: Mapping[str, int] | None = None) -> dict:
    """The configs of all parts that a release holds, by part: what their classes are built from.

    Args:
        state: tensors under the release's names.
        heads: numbers of heads of parts that are not as wide as the released ones.

    Raises:
        UserError: a tensor that shows a size is missing, or of an impossible shape.
    """
    shapes = _Shapes(state, heads or {})
    return {name: make(shapes) for name, make in _CONFIGS.items()}


def build(part: str, config: Config) -> nn.Module:
    """A part of these sizes on the meta device: its tensors have shapes alone."""
    import diffusers
    import transformers

    from mige.method.fusion import InstructionFusion

    def from_transformers(settings: str, kind: str) -> nn.Module:
        return getattr(transformers, kind)(getattr(transformers, settings)(**config))

    with torch.device("meta"):
        if part == "transformer":
            return diffusers.PixArtTransformer2DModel(**config)
        if part == "fusion":
            return InstructionFusion(**config)
        if part == "vision_encoder":
            return from_transformers("Blip2VisionConfig", "Blip2VisionModel")
        if part == "qformer":
            return from_transformers("Blip2QFormerConfig", "Blip2QFormerModel")
        return from_transformers("T5Config", "T5EncoderModel")


class _Shapes:
    """The shapes of a release's tensors, by the release's names."""

    def __init__(self, state: Mapping[str, Tensor], heads: Mapping[str, int]):
        self.state, self.given_heads = state, heads

    def of(self, name: str, sides: int) -> tuple[int, ...]:
        """The shape of a tensor, which has so many sides."""
        if name not in self.state:
            raise UserError(f"the release lacks {name}; fetch it again")
        shape = tuple(self.state[name].shape)
        if len(shape) != sides or 0 in shape:
            raise UserError(
                f"the release's {name} is {list(shape)}, and should have {sides} sides; it is "
                "another model's, fetch MIGE's again"
            )
        return shape

    def square(self, name: str, more: int = 0) -> tuple[int, int]:
        """Rows of the square of places that a tensor [1, more + places, width] has, and width."""
        _, places, width = self.of(name, 3)
        side = math.isqrt(max(places - more, 0))
        if side < 1 or side * side != places - more:
            raise UserError(f"the release's {name} has {places} places, which are no square")
        return side, width

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that names with such a beginning have, sorted."""
        found = (re.match(pattern, name) for name in self.state)
        return sorted({int(each[1]) for each in found if each})

    def count(self, stem: str) -> int:
        """How many blocks there are, numbered from 0 on."""
        found = self.numbers(re.escape(stem) + r"(\d{1,6})\.")
        if not found or found[-1] != len(found) - 1:
            missing = min(set(range(len(found) + 1)) - set(found))
            raise UserError(f"the release lacks {stem}{missing}; fetch it again")
        return len(found)

    def heads(self, part: str, width: int) -> int:
        """A part's heads: those that were given, or the released ones of this width."""
        heads, released = HEADS[part]
        if part in self.given_heads:
            heads = self.given_heads[part]
        elif width != released:
            raise UserError(
                f"{part} is {width} wide, and the released one {released}, so its number of heads "
                f"is not known; give it, as in --heads {part}={heads}"
            )
        if heads < 1 or width % heads:
            raise UserError(
                f"--heads {part}={heads}: its width, {width}, is no multiple of that; give another"
            )
        return heads


def _transformer(shapes: _Shapes) -> Config:
    width, channels, patch, _ = shapes.of("x_embedder.proj.weight", 4)
    outputs, _ = shapes.of("final_layer.linear.weight", 2)
    _, text_width = shapes.of("y_embedder.y_proj.fc1.weight", 2)
    side, _ = shapes.square("pos_embed")
    heads = shapes.heads("transformer", width)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": outputs // patch**2,
        "num_layers": shapes.count("blocks."),
        "cross_attention_dim": width,
        "sample_size": side * patch,
        "patch_size": patch,
        "caption_channels": text_width,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "use_additional_conditions": False,
    }


def _vision_encoder(shapes: _Shapes) -> Config:
    width, _, patch, _ = shapes.of("visual_encoder.patch_embed.proj.weight", 4)
    side, _ = shapes.square("visual_encoder.pos_embed", more=1)
    inner, _ = shapes.of("visual_encoder.blocks.0.mlp.fc1.weight", 2)
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": shapes.count("visual_encoder.blocks."),
        "num_attention_heads": shapes.heads("vision_encoder", width),
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }


def _qformer(shapes: _Shapes) -> Config:
    stem = "Qformer.bert.encoder.layer."
    (width,) = shapes.of("Qformer.bert.embeddings.LayerNorm.weight", 1)
    inner, _ = shapes.of(f"{stem}0.intermediate_query.dense.weight", 2)
    _, seen = shapes.of(f"{stem}0.crossattention.self.key.weight", 2)
    layers = shapes.count(stem)
    crossing = [*shapes.numbers(re.escape(stem) + r"(\d{1,6})\.crossattention\."), layers]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": shapes.heads("qformer", width),
        "intermediate_size": inner,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "cross_attention_frequency": crossing[1] - crossing[0],
        "encoder_hidden_size": seen,
        "use_qformer_text_input": False,
    }


def _text_encoder(shapes: _Shapes) -> Config:
    words, width = shapes.of("t5_model.shared.weight", 2)
    block = "t5_model.encoder.block.0.layer"
    buckets, heads = shapes.of(f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    inside, _ = shapes.of(f"{block}.0.SelfAttention.q.weight", 2)
    inner, _ = shapes.of(f"{block}.1.DenseReluDense.wi_0.weight", 2)
    return {
        "vocab_size": words,
        "d_model": width,
        "d_kv": inside // heads,
        "d_ff": inner,
        "num_layers": shapes.count("t5_model.encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _fusion(shapes: _Shapes) -> Config:
    _, queries, width = shapes.of("query_tokens", 3)
    _, patch_width = shapes.of("FFM.k_proj_1.0.weight", 2)
    text_width, _ = shapes.of("t5_proj.weight", 2)
    length, _ = shapes.of("y_embedder.y_embedding", 2)
    return {
        "queries": queries,
        "width": width,
        "heads": shapes.heads("fusion", width),
        "patch_width": patch_width,
        "text_width": text_width,
        "text_length": length,
    }


_CONFIGS: dict[str, Callable[[_Shapes], Config]] = {
    "transformer": _transformer,
    "vision_encoder": _vision_encoder,
    "qformer": _qformer,
    "text_encoder": _text_encoder,
    "fusion": _fusion,
}
