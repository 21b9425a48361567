"""The names of the released weights, and where their tensors go in a model folder's parts.

Every tensor of a release has one place, and every place gets one: anything else is an error.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from imagelab.errors import UserError

State = dict[str, Tensor]

#: Names of a release, by prefix, and the part and the prefix that they get. The first that fits.
PREFIXES = (
    ("visual_encoder.", "vision_encoder", ""),
    ("ln_vision.", "vision_encoder", "post_layernorm."),
    ("Qformer.bert.", "qformer", ""),
    ("query_tokens", "fusion", "query_tokens"),
    ("FFM.", "fusion", "features."),
    ("t5_proj.", "fusion", "projection."),
    ("y_embedder.y_embedding", "fusion", "null_text"),
    ("t5_model.", "text_encoder", ""),
    ("", "transformer", ""),
)
#: What else changes in a part's names, as regular expressions, one after the other.
RENAMED = {
    "vision_encoder": (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"\.attn\.", ".self_attn."),
    ),
    "qformer": (
        (r"^embeddings\.LayerNorm\.", "layernorm."),
        (r"attention\.self\.", "attention.attention."),
    ),
    "fusion": (
        (r"\.q_proj_1\.", ".query."),
        (r"\.k_proj_1\.", ".key."),
        (r"\.v_proj_1\.", ".value."),
        (r"\.ln_q_1\.", ".norm_query."),
        (r"\.ln_k_1\.", ".norm_key."),
        (r"\.ln_v_1\.", ".norm_value."),
        (r"\.ln_out\.", ".norm_out."),
        (r"\.clip_attn\.", ".attention."),
        (r"\.mlp\.", ".mix."),
    ),
    "text_encoder": (),
    "transformer": (
        (r"^x_embedder\.proj\.", "pos_embed.proj."),
        (r"^t_embedder\.mlp\.0\.", "adaln_single.emb.timestep_embedder.linear_1."),
        (r"^t_embedder\.mlp\.2\.", "adaln_single.emb.timestep_embedder.linear_2."),
        (r"^t_block\.1\.", "adaln_single.linear."),
        (r"^y_embedder\.y_proj\.fc([12])\.", r"caption_projection.linear_\1."),
        (r"^blocks\.", "transformer_blocks."),
        (r"\.attn\.proj\.", ".attn1.to_out.0."),
        (r"\.attn\.qkv\.", ".attn1.qkv."),
        (r"\.cross_attn\.q_linear\.", ".attn2.to_q."),
        (r"\.cross_attn\.kv_linear\.", ".attn2.kv."),
        (r"\.cross_attn\.proj\.", ".attn2.to_out.0."),
        (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
        (r"\.mlp\.fc2\.", ".ff.net.2."),
        (r"^final_layer\.linear\.", "proj_out."),
        (r"^final_layer\.scale_shift_table$", "scale_shift_table"),
    ),
}
#: The trunk's positions, which follow from its size and are made anew.
POSITIONS = "pos_embed"


def split_release(state: Mapping[str, Tensor]) -> dict[str, State]:
    """The tensors of a release by part, under the names of diffusers and transformers.

    The positions of the transformer are left out.
    """
    parts: dict[str, State] = {name: {} for name in RENAMED}
    for name, tensor in state.items():
        if name == POSITIONS:
            continue
        part, renamed = place_of(name)
        parts[part][renamed] = tensor
    for name, finish in _FINISHED.items():
        parts[name] = finish(parts[name])
    return parts


def place_of(name: str) -> tuple[str, str]:
    """The part that a name of the release belongs to, and its name there."""
    start, part, prefix = next(each for each in PREFIXES if name.startswith(each[0]))
    renamed = prefix + name[len(start) :]
    for pattern, put in RENAMED[part]:
        renamed = re.sub(pattern, put, renamed)
    return part, renamed


def _join_biases(state: State) -> State:
    """The vision encoder's keys have no bias: [query's, 0, value's]."""
    done = dict(state)
    for name in [name for name in state if name.endswith(".self_attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        query, value = done.pop(name), done.pop(f"{stem}v_bias", None)
        if value is None:
            raise UserError(f"the release has {name} and no v_bias beside it; fetch it again")
        done[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return done


def _split_projections(state: State) -> State:
    """Queries, keys and values have a matrix each."""
    done: State = {}
    for name, tensor in state.items():
        stem, joint, end = re.fullmatch(r"(.*?)(?:\.(qkv|kv))?(\.[^.]*|[^.]*)", name).groups()
        if not joint:
            done[name] = tensor
            continue
        for letter, part in zip(joint, tensor.chunk(len(joint)), strict=True):
            done[f"{stem}.to_{letter}{end}"] = part.contiguous()
    return done


def _tie_embeddings(state: State) -> State:
    """The text encoder's embeddings have two names."""
    if "shared.weight" in state:
        return {**state, "encoder.embed_tokens.weight": state["shared.weight"]}
    return state


_FINISHED: dict[str, Callable[[State], State]] = {
    "vision_encoder": _join_biases,
    "transformer": _split_projections,
    "text_encoder": _tie_embeddings,
}


def load_exactly(module, state: State, name: str) -> None:
    """Give a part its tensors; a UserError where one is missing, unknown or of another shape."""
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise UserError(f"the release lacks {_few(missing)} of {name}; fetch it again")
    if unknown := sorted(state.keys() - own.keys()):
        raise UserError(f"the release has {_few(unknown)}, which {name} does not know")
    for key, tensor in state.items():
        if own[key].shape != tensor.shape:
            raise UserError(
                f"the release's {key} of {name} is {list(tensor.shape)} and not "
                f"{list(own[key].shape)}; it is of another size than the model"
            )
    module.load_state_dict(state, assign=True)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
