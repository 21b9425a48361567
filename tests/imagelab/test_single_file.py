"""A checkpoint in Stability's format beside its diffusers configs: read by diffusers for real."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from thin import thin_pipeline, thin_scheduler, thin_unet

from imagelab.models.stable_diffusion import load_base

TOKENIZER = Path(__file__).parents[1] / "golden" / "tiny_sd" / "tokenizer"


def renamed(name: str, *rules: tuple[str, object]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def unet_name(name: str) -> str:
    """Stability's name of a parameter of a UNet of two layers a block."""
    kinds = {"resnets": 0, "attentions": 1}

    def block(first: str):
        return lambda m: f"{first}.{3 * int(m[1]) + int(m[3]) + (first[0] == 'i')}.{kinds[m[2]]}"

    name = renamed(
        name,
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^down_blocks\.(\d)\.downs.*\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
        (r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)", block("input_blocks")),
        (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.2.1"),
        (r"^up_blocks\.(\d)\.ups.*\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2"),
        (r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)", block("output_blocks")),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    )
    if "transformer_blocks" not in name:
        name = renamed(
            name, ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
            ("conv_shortcut", "skip_connection"),
        )  # fmt: skip
    return f"model.diffusion_model.{name}"


def vae_name(name: str) -> str:
    return "first_stage_model." + renamed(
        name,
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_(\w)\.", r"\1."),
    )


def text_encoder_1(state: dict) -> dict:
    """CLIP's as Stable Diffusion 1 has it."""
    return {f"transformer.text_model.{name}": value for name, value in state.items()}


def text_encoder_2(state: dict) -> dict:
    """The same as OpenCLIP's, which Stable Diffusion 2 has: query, key and value in one."""
    found = {"model.text_projection": torch.eye(len(state["final_layer_norm.weight"]))}
    for name, value in state.items():
        if re.search(r"[kv]_proj", name):
            continue
        if "q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
        name = renamed(
            name, (r"embeddings\.token_embedding", "token_embedding"),
            (r"embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"encoder\.layers", "transformer.resblocks"), (r"layer_norm(\d)", r"ln_\1"),
            ("final_layer_norm", "ln_final"), (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj"),
            (r"self_attn\.q_proj\.", "attn.in_proj_"),
        )  # fmt: skip
        found[f"model.{name}"] = value
    return found


@pytest.mark.parametrize("text_encoder, linear", [(text_encoder_1, False), (text_encoder_2, True)])
def test_a_single_file_is_its_diffusers_folder(text_encoder, linear, tmp_path):
    unet = thin_unet(4, layers_per_block=2, use_linear_projection=linear)
    pipeline = thin_pipeline(TOKENIZER, unet, thin_scheduler())
    pipeline.save_pretrained(tmp_path)
    original = {unet_name(name): value for name, value in unet.state_dict().items()}
    for name, value in pipeline.vae.state_dict().items():
        convolution = "attentions" in name and value.ndim == 2
        original[vae_name(name)] = value[..., None, None] if convolution else value
    state = pipeline.text_encoder.state_dict()
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    for name, value in text_encoder(state).items():
        original[f"cond_stage_model.{name}"] = value
    save_file({k: v.contiguous() for k, v in original.items()}, tmp_path / "model.safetensors")

    ours, folder = (
        load_base(str(tmp_path / "model.safetensors"), offline=True),
        load_base(str(tmp_path)),
    )
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(base, part).state_dict() for base in (ours, folder))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
    assert ours.tokenizer.get_vocab() == folder.tokenizer.get_vocab()
    assert torch.equal(ours.scheduler.alphas_cumprod, folder.scheduler.alphas_cumprod)
