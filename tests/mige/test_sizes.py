"""The released model's sizes, on the meta device: shapes alone, nothing is computed."""

import pytest
import torch
from golden_mige import release

from imagelab.errors import UserError
from mige.release import check_exactly, split_release
from mige.sizes import build, configs_of

WIDTH, SEEN, MEANING, TEXT = 1152, 1408, 768, 4096


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, width: int) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def trunk() -> dict[str, tuple]:
    """PixArt-alpha XL/2-512 with eight input channels (mige.md, sections 1 and 6)."""
    shapes = {
        "pos_embed": (1, 1024, WIDTH),
        "x_embedder.proj.weight": (WIDTH, 8, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        "y_embedder.y_embedding": (256, TEXT),
        "final_layer.scale_shift_table": (2, WIDTH),
    }
    shapes |= linear("t_embedder.mlp.0", 256, WIDTH) | linear("t_embedder.mlp.2", WIDTH, WIDTH)
    shapes |= linear("t_block.1", WIDTH, 6 * WIDTH) | linear("final_layer.linear", WIDTH, 32)
    shapes |= linear("y_embedder.y_proj.fc1", TEXT, WIDTH)
    shapes |= linear("y_embedder.y_proj.fc2", WIDTH, WIDTH)
    for index in range(28):
        block = f"blocks.{index}"
        shapes |= {f"{block}.scale_shift_table": (6, WIDTH)}
        shapes |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.cross_attn.q_linear", WIDTH, WIDTH)
        shapes |= linear(f"{block}.cross_attn.kv_linear", WIDTH, 2 * WIDTH)
        shapes |= linear(f"{block}.cross_attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", WIDTH, 4608) | linear(f"{block}.mlp.fc2", 4608, WIDTH)
    return shapes


def vision() -> dict[str, tuple]:
    stem = "visual_encoder"
    shapes = {
        f"{stem}.cls_token": (1, 1, SEEN),
        f"{stem}.pos_embed": (1, 257, SEEN),
        f"{stem}.patch_embed.proj.weight": (SEEN, 3, 14, 14),
        f"{stem}.patch_embed.proj.bias": (SEEN,),
    }
    shapes |= norm("ln_vision", SEEN)
    for index in range(39):
        block = f"{stem}.blocks.{index}"
        shapes |= norm(f"{block}.norm1", SEEN) | norm(f"{block}.norm2", SEEN)
        shapes |= {f"{block}.attn.q_bias": (SEEN,), f"{block}.attn.v_bias": (SEEN,)}
        shapes |= linear(f"{block}.attn.qkv", SEEN, 3 * SEEN, bias=False)
        shapes |= linear(f"{block}.attn.proj", SEEN, SEEN)
        shapes |= linear(f"{block}.mlp.fc1", SEEN, 6144) | linear(f"{block}.mlp.fc2", 6144, SEEN)
    return shapes


def qformer() -> dict[str, tuple]:
    shapes = {"query_tokens": (1, 32, MEANING)} | norm("Qformer.bert.embeddings.LayerNorm", MEANING)
    for index in range(12):
        layer = f"Qformer.bert.encoder.layer.{index}"
        kinds = {"attention": MEANING} | ({"crossattention": SEEN} if index % 2 == 0 else {})
        for kind, seen in kinds.items():
            shapes |= linear(f"{layer}.{kind}.self.query", MEANING, MEANING)
            shapes |= linear(f"{layer}.{kind}.self.key", seen, MEANING)
            shapes |= linear(f"{layer}.{kind}.self.value", seen, MEANING)
            shapes |= linear(f"{layer}.{kind}.output.dense", MEANING, MEANING)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", MEANING)
        shapes |= linear(f"{layer}.intermediate_query.dense", MEANING, 3072)
        shapes |= linear(f"{layer}.output_query.dense", 3072, MEANING)
        shapes |= norm(f"{layer}.output_query.LayerNorm", MEANING)
    return shapes


def fusion() -> dict[str, tuple]:
    shapes = linear("FFM.q_proj_1", MEANING, MEANING, bias=False) | linear("t5_proj", MEANING, TEXT)
    for kind in ("k", "v"):
        shapes |= linear(f"FFM.{kind}_proj_1.0", WIDTH, MEANING)
        shapes |= linear(f"FFM.{kind}_proj_1.2", MEANING, MEANING)
    for name in ("ln_q_1", "ln_k_1", "ln_v_1", "ln_out"):
        shapes |= norm(f"FFM.{name}", MEANING)
    shapes |= {
        "FFM.clip_attn.in_proj_weight": (3 * MEANING, MEANING),
        "FFM.clip_attn.in_proj_bias": (3 * MEANING,),
    }
    shapes |= linear("FFM.clip_attn.out_proj", MEANING, MEANING)
    return shapes | linear("FFM.mlp", MEANING, MEANING)


def t5() -> dict[str, tuple]:
    shapes = {
        "t5_model.shared.weight": (32128, TEXT),
        "t5_model.encoder.final_layer_norm.weight": (TEXT,),
        "t5_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    }
    for index in range(24):
        block = f"t5_model.encoder.block.{index}.layer"
        for letter in "qkvo":
            shapes[f"{block}.0.SelfAttention.{letter}.weight"] = (TEXT, TEXT)
        for inner in ("wi_0", "wi_1"):
            shapes[f"{block}.1.DenseReluDense.{inner}.weight"] = (10240, TEXT)
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (TEXT, 10240)
        shapes |= {f"{block}.{part}.layer_norm.weight": (TEXT,) for part in (0, 1)}
    return shapes


def full_release() -> dict[str, torch.Tensor]:
    """Tensors without content under the released names, in the released sizes."""
    shapes = trunk() | vision() | qformer() | fusion() | t5()
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


CONFIGS = {
    "transformer": {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 8, "out_channels": 8,
        "num_layers": 28, "cross_attention_dim": 1152, "sample_size": 64, "patch_size": 2,
        "caption_channels": 4096, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "attention_bias": True, "activation_fn": "gelu-approximate",
        "use_additional_conditions": False,
    },
    "vision_encoder": {
        "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "qkv_bias": True,
    },
    "qformer": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12,
        "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
        "use_qformer_text_input": False,
    },
    "text_encoder": {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
        "num_heads": 64, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "fusion": {
        "queries": 32, "width": 768, "heads": 8, "patch_width": 1152, "text_width": 4096,
        "text_length": 256,
    },
}  # fmt: skip


def test_the_release_s_configs_are_read_off_its_shapes():
    assert configs_of(full_release()) == CONFIGS


@pytest.mark.parametrize(("every", "frequency"), [(3, 3), (5, 5), (12, 12)])
def test_layers_that_look_at_pictures_are_counted(every, frequency):
    """Of the twelve, those that cross are numbered 0, every, 2 * every, …"""
    state = full_release()
    for name in [name for name in state if ".crossattention." in name]:
        del state[name]
    stem = "Qformer.bert.encoder.layer"
    for layer in range(0, 12, every):
        name = f"{stem}.{layer}.crossattention.self.key.weight"
        state[name] = torch.empty(MEANING, SEEN, device="meta")
    assert configs_of(state)["qformer"]["cross_attention_frequency"] == frequency


@pytest.mark.parametrize(
    ("part", "inside", "count"),
    [
        ("transformer", "", 610_874_528),
        ("fusion", "features", 6_501_120),
        ("fusion", "projection", 3_149_824),
        ("qformer", "", 105_137_664),
        ("vision_encoder", "", 985_952_256),
        ("text_encoder", "", 4_762_310_656),
    ],
)
def test_parameters(part, inside, count):
    module = build(part, CONFIGS[part])
    parameters = dict(module.get_submodule(inside).named_parameters())
    parameters.pop("encoder.embed_tokens.weight", None)  # shared.weight once more
    assert all(each.is_meta for each in parameters.values())
    assert sum(each.numel() for each in parameters.values()) == count


def test_every_tensor_of_the_release_has_its_place_in_these_parts():
    states = split_release(full_release())
    assert sorted(states) == sorted(CONFIGS)
    for name, config in CONFIGS.items():
        check_exactly(build(name, config), states[name], name)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("blocks.3.scale_shift_table", (6, 999), "transformer_blocks.3.scale_shift_table"),
        ("ln_vision.weight", (1409,), r"post_layernorm.weight.*\[1409\].*\[1408\]"),
        ("FFM.mlp.bias", (2, 768), r"features.mix.bias.*\[2, 768\].*\[768\]"),
    ],
)
def test_another_shape_is_told(name, shape, told):
    state = full_release() | {name: torch.empty(shape, device="meta")}
    with pytest.raises(UserError, match=told):
        for part, tensors in split_release(state).items():
            check_exactly(build(part, CONFIGS[part]), tensors, part)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("x_embedder.proj.weight", (1152, 8), "4 sides"),
        ("pos_embed", (1, 1023, 1152), "1023 places"),
        ("visual_encoder.pos_embed", (1, 256, 1408), "256 places"),
        ("query_tokens", (1, 0, 768), "3 sides"),
        ("x_embedder.proj.weight", (1280, 8, 2, 2), "--heads transformer=16"),
        ("t5_proj.weight", None, "lacks t5_proj.weight"),
        ("blocks.28.attn.proj.bias", (1152,), None),
        ("blocks.29.attn.proj.bias", (1152,), "lacks blocks.28"),
    ],
)
def test_sizes_that_cannot_be(name, shape, told):
    state = full_release()
    del state["blocks.27.mlp.fc2.bias"]  # nothing that a size is read off
    state.pop(name, None)
    if shape:
        state[name] = torch.empty(shape, device="meta")
    if told is None:
        assert configs_of(state)["transformer"]["num_layers"] == 29
        return
    with pytest.raises(UserError, match=told):
        configs_of(state)


HEADS = {"transformer": 2, "vision_encoder": 2, "qformer": 4, "fusion": 8}


@pytest.mark.parametrize("part", HEADS)
def test_heads_of_other_widths_are_asked_for(part):
    """The golden arrays' parts are of widths 48, 24, 32 and 32."""
    given = {name: count for name, count in HEADS.items() if name != part}
    with pytest.raises(UserError, match=f"--heads {part}="):
        configs_of(release(), given)
    with pytest.raises(UserError, match="no multiple"):
        configs_of(release(), given | {part: 7})
    with pytest.raises(UserError, match="no multiple"):
        configs_of(release(), given | {part: 0})
