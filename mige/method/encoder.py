"""The multimodal encoder: one sequence of states for words and pictures (MIGE, section 3.2).

Axes: b instructions, r pictures, q queries, n patches, k tokens, d width of the text, c latent
channels, h and w latent rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mige.method.fusion import InstructionFusion
from mige.method.instruction import Embedded, interleave

#: Epsilon of the norm behind the vision encoder, which its config does not hold.
VISION_NORM_EPS = 1e-5


def embed_patches(transformer, latents: Tensor) -> Tensor:
    """Latents [r, c, h, w] as the transformer embeds them, without positions: [r, n, p].

    The transformer's input has a second half for the source picture; it is zero here.
    """
    layer = transformer.pos_embed.proj
    padded = torch.cat([latents, torch.zeros_like(latents)], dim=1).to(layer.weight)
    patches = F.conv2d(padded, layer.weight, layer.bias, stride=layer.stride)
    return patches.flatten(2).transpose(1, 2)


def see(vision_encoder, qformer, fusion: InstructionFusion, pictures: Tensor) -> Tensor:
    """What pictures [r, 3, h, w] mean, as the Q-Former puts it: [r, q, width].

    The vision encoder's norm is trained, and is the last thing that it does.
    """
    tokens = vision_encoder(pictures.to(vision_encoder.dtype)).last_hidden_state
    queries = fusion.query_tokens.to(tokens.device, qformer.dtype).expand(len(pictures), -1, -1)
    seen = qformer(query_embeds=queries, encoder_hidden_states=tokens.to(qformer.dtype))
    return seen.last_hidden_state


def embed_instruction(
    fusion: InstructionFusion,
    text_encoder,
    segments: Sequence[Sequence[int]],
    vectors: Tensor | None,
    end: int,
) -> Embedded:
    """An instruction's words and pictures as the text encoder reads them.

    Args:
        segments: token ids before, between and behind the marks.
        vectors: [r, q, d] of its pictures; None: there are none, and every mark takes zeros.
        end: id of the end token.
    """
    found = embed_instructions(fusion, text_encoder, [segments], [vectors], end)
    return Embedded(*(each[0] for each in found))


def embed_instructions(
    fusion: InstructionFusion,
    text_encoder,
    segments: Sequence[Sequence[Sequence[int]]],
    vectors: Sequence[Tensor | None],
    end: int,
) -> Embedded:
    """What :func:`embed_instruction` does, for several: [b, k, d] and [b, k].

    Args:
        segments, vectors: of each instruction; each may have another number of pictures.
    """
    table = text_encoder.get_input_embeddings().weight
    queries, width = fusion.config.queries, table.shape[1]
    pictures = [
        table.new_zeros(len(mine) - 1, queries, width) if given is None else given
        for mine, given in zip(segments, vectors, strict=True)
    ]
    pad = text_encoder.config.pad_token_id
    return interleave(segments, pictures, table, fusion.config.text_length, end, pad)


def encode_text(text_encoder, embedded: Embedded) -> Tensor:
    """The text encoder's states of an instruction, [k, d], or of several, [b, k, d]."""
    is_single = embedded.embeddings.ndim == 2
    if is_single:
        embedded = Embedded(*(each[None] for each in embedded))
    states = text_encoder(
        inputs_embeds=embedded.embeddings.to(text_encoder.device),
        attention_mask=embedded.mask.to(text_encoder.device),
    ).last_hidden_state
    return states[0] if is_single else states
