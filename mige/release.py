"""The names of the released weights, and where their tensors go in a model folder's parts.

Every tensor of a release has one place, and every place gets one: anything else is an error.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from imagelab.errors import UserError, shorten

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
#: What may be there and is not needed: the positions, and the numbers of words that have none here.
UNNEEDED = (POSITIONS, "Qformer.bert.embeddings.position_ids")
#: How far the positions may be off: as far as bfloat16 rounds numbers up to 1.
POSITIONS_OFF = 2e-3


def split_release(state: Mapping[str, Tensor]) -> dict[str, State]:
    """The tensors of a release by part, under the names of diffusers and transformers.

    Those in :data:`UNNEEDED` are left out.
    """
    parts: dict[str, State] = {name: {} for name in RENAMED}
    for name, tensor in state.items():
        if name in UNNEEDED:
            continue
        part, renamed = place_of(name)
        _put(parts[part], renamed, tensor)
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
    done = {name: tensor for name, tensor in state.items() if not name.endswith(_BIASES)}
    for stem in sorted({name[: -len(_BIASES[0])] for name in state.keys() - done.keys()}):
        query, value = (state.get(f"{stem}{end}") for end in _BIASES)
        if query is None or value is None or query.ndim != 1 or query.shape != value.shape:
            raise UserError(
                f"the release's {stem}{_BIASES[0]} and {_BIASES[1]} should both be there, and of "
                "one length; fetch it again"
            )
        _put(done, f"{stem}qkv.bias", torch.cat([query, torch.zeros_like(query), value]))
    return done


_BIASES = ("q_bias", "v_bias")


def _split_projections(state: State) -> State:
    """Queries, keys and values have a matrix each."""
    done: State = {}
    for name, tensor in state.items():
        stem, joint, end = re.fullmatch(r"(.*?)(?:\.(qkv|kv))?(\.[^.]*|[^.]*)", name).groups()
        if not joint:
            _put(done, name, tensor)
            continue
        if not tensor.ndim or len(tensor) % len(joint) or not len(tensor):
            raise UserError(
                f"the release's {name} of transformer is {list(tensor.shape)}, which is not "
                f"{len(joint)} in one; it is another model's, fetch MIGE's again"
            )
        for letter, part in zip(joint, tensor.chunk(len(joint)), strict=True):
            _put(done, f"{stem}.to_{letter}{end}", part.contiguous())
    return done


def _put(state: State, name: str, tensor: Tensor) -> None:
    if name in state:
        raise UserError(f"the release has {shorten(name, 100)} under two names; fetch it again")
    state[name] = tensor


def _tie_embeddings(state: State) -> State:
    """The text encoder's embeddings have two names."""
    one, other = "shared.weight", "encoder.embed_tokens.weight"
    if one not in state:
        return state
    if other in state and not torch.equal(state[one], state[other]):
        raise UserError(
            f"the release's {one} and {other} of text_encoder differ, and are one tensor in T5; "
            "fetch it again"
        )
    return {**state, other: state[one]}


_FINISHED: dict[str, Callable[[State], State]] = {
    "vision_encoder": _join_biases,
    "transformer": _split_projections,
    "text_encoder": _tie_embeddings,
}


def check_positions(positions: Tensor, transformer: Mapping[str, object]) -> None:
    """Raises UserError unless a release's positions are those that diffusers makes anew.

    Args:
        transformer: the config of the part that they belong to.
    """
    from diffusers.models.embeddings import PatchEmbed

    size, width = transformer["sample_size"], transformer["cross_attention_dim"]
    scale = max(size // 64, 1)
    made = PatchEmbed(
        size, size, transformer["patch_size"], 1, width, interpolation_scale=scale
    ).pos_embed
    fits = made.shape == positions.shape
    off = (positions.float() - made).abs().max().item() if fits else float("inf")
    if not off <= POSITIONS_OFF:
        raise UserError(
            f"the release's {POSITIONS} is {off:.2g} away from sines and cosines of the places, "
            "which this program would put there; it is another model's, fetch MIGE's again"
        )


def check_exactly(module: nn.Module, state: State, name: str) -> None:
    """Raises UserError where a tensor of a part is missing, unknown or of another shape."""
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise UserError(f"the release lacks {_few(missing)} of {name}; fetch it again")
    if unknown := sorted(state.keys() - own.keys()):
        raise UserError(
            f"the release has {_few(unknown)}, which {name} does not know; it is another model's, "
            "fetch MIGE's again"
        )
    other = [key for key in sorted(state) if own[key].shape != state[key].shape]
    if other:
        sizes = ", ".join(f"{list(state[key].shape)}" for key in other[:3])
        wanted = ", ".join(f"{list(own[key].shape)}" for key in other[:3])
        raise UserError(
            f"the release's {_few(other)} of {name}: the shapes are {sizes} and should be "
            f"{wanted}; it is of another size than the model"
        )


def load_exactly(module: nn.Module, state: State, name: str) -> None:
    """Give a part its tensors, without a copy; see :func:`check_exactly`."""
    check_exactly(module, state, name)
    module.load_state_dict(state, assign=True)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shorten(name, 100) for name in names[:3]) + more
