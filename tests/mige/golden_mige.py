"""The golden arrays of MIGE (tests/golden/mige/INDEX.md), and toy parts with the golden weights."""

import json
from binascii import crc32
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    T5Config,
    T5EncoderModel,
)

from mige.method.encoder import VISION_NORM_EPS
from mige.method.fusion import InstructionFusion
from mige.release import load_exactly, split_release

GOLDEN = Path(__file__).parents[1] / "golden" / "mige"
PROMPTS = (
    "make<imagehere>into the sky of<imagehere>",
    "<imagehere>in a field of long green grass",
)


class WordTokenizer:
    """The golden arrays' own: words are what blanks divide, ids 2 + crc32 % 62."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text: str, add_special_tokens: bool = True):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[2 + crc32(w.encode()) % 62 for w in text.split()])


def arrays(name: str) -> dict[str, torch.Tensor]:
    """The arrays of a golden file, by name."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {
            key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"
        }


def facts(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def release() -> dict[str, torch.Tensor]:
    """The golden weights under the release's names."""
    return load_file(GOLDEN / "model.safetensors")


def build_parts() -> dict[str, torch.nn.Module]:
    """Parts of the golden arrays' sizes, with weights of their own."""
    size = facts("config")
    vit, qformer, t5 = size["vit"], size["qformer"], size["t5"]
    return {
        "transformer": PixArtTransformer2DModel(
            num_attention_heads=size["heads"],
            attention_head_dim=size["hidden"] // size["heads"],
            in_channels=2 * size["in_ch"],
            out_channels=2 * size["in_ch"],
            num_layers=size["depth"],
            cross_attention_dim=size["hidden"],
            sample_size=size["latent"],
            patch_size=size["patch"],
            caption_channels=t5["d_model"],
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            attention_bias=True,
            activation_fn="gelu-approximate",
            use_additional_conditions=False,
        ),
        "vision_encoder": Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=vit["dim"],
                intermediate_size=int(vit["dim"] * vit["mlp_ratio"]),
                num_hidden_layers=vit["depth"],
                num_attention_heads=vit["heads"],
                image_size=vit["img"],
                patch_size=vit["patch"],
                layer_norm_eps=vit["eps"],
            )
        ),
        "qformer": Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=qformer["hidden"],
                num_hidden_layers=qformer["layers"],
                num_attention_heads=qformer["heads"],
                intermediate_size=qformer["inter"],
                cross_attention_frequency=qformer["cross_freq"],
                encoder_hidden_size=vit["dim"],
                layer_norm_eps=qformer["eps"],
                use_qformer_text_input=False,
            )
        ),
        "text_encoder": T5EncoderModel(
            T5Config(
                vocab_size=t5["vocab"],
                d_model=t5["d_model"],
                d_kv=t5["d_kv"],
                d_ff=t5["d_ff"],
                num_layers=t5["layers"],
                num_heads=t5["heads"],
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        ),
        "fusion": InstructionFusion(
            queries=qformer["queries"],
            width=qformer["hidden"],
            heads=size["ffm"]["heads"],
            patch_width=size["hidden"],
            text_width=t5["d_model"],
            text_length=size["max_len"],
        ),
    }


@cache
def golden_parts() -> dict[str, torch.nn.Module]:
    """The parts with the golden weights, in evaluation mode."""
    parts = build_parts()
    for name, state in split_release(release()).items():
        load_exactly(parts[name], state, name)
        parts[name].eval().requires_grad_(False)
    parts["vision_encoder"].post_layernorm.eps = VISION_NORM_EPS
    return parts


def close(found: torch.Tensor, wanted: torch.Tensor, absolute: float, relative: float = np.inf):
    """Assert that two arrays differ by so much at most, also over the largest value."""
    assert found.shape == wanted.shape
    apart = (found.double() - wanted.double()).abs().max().item()
    assert apart <= absolute, f"{apart:.2g} apart"
    largest = wanted.double().abs().max().item()
    assert apart <= relative * largest, f"{apart / largest:.2g} of the largest value apart"
