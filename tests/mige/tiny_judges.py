"""CLIP, DINO, GroundingDINO and SAM of a few numbers, saved as their users find them."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from thin import GOLDEN
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "cat", "dog", "red", "##s"]


def save_clip(folder: Path) -> Path:
    """Pictures of 16×16, the words of the tiny Stable Diffusion."""
    torch.manual_seed(0)
    layers = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    words = {"vocab_size": 552, "bos_token_id": 550, "eos_token_id": 551, "pad_token_id": 0}
    words["max_position_embeddings"] = 20
    CLIPModel(
        CLIPConfig(
            text_config=layers | words,
            vision_config=layers | {"image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    for path in (GOLDEN / "tiny_sd/tokenizer").iterdir():
        shutil.copy(path, folder)
    return folder


def save_dino(folder: Path) -> Path:
    """Pictures of 14×14, out of 16×16."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=14, patch_size=7,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_detector(folder: Path) -> Path:
    """Pictures of 96 to 128 pixels, ten boxes."""
    torch.manual_seed(2)
    layers = partial(dict, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4,
            window_size=2, out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            **layers(), num_attention_heads=1, vocab_size=len(WORDS), max_position_embeddings=32
        ),
        num_queries=10, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, d_model=32,
        max_text_len=16,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    size = {"size": {"shortest_edge": 96, "longest_edge": 128}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return folder


def save_sam(folder: Path) -> Path:
    """Pictures of 64 pixels."""
    torch.manual_seed(3)
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "window_size": 2,
            "global_attn_indexes": [0], "num_pos_feats": 8, "mlp_dim": 16,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    SamModel(config).save_pretrained(folder)
    return folder


SAVE = {"clip": save_clip, "dino": save_dino, "detector": save_detector, "sam": save_sam}


def save_judges(folder: Path) -> dict[str, Path]:
    """All four, by the name of their option."""
    return {name: save(folder / name) for name, save in SAVE.items()}
