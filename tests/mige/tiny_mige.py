"""A MIGE of the golden arrays' sizes and weights, with a small autoencoder and tokenizer."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from golden_mige import golden_parts
from transformers import T5Tokenizer

from mige.method.sampler import ContinuousDPMSolver
from mige.pipeline import MigePipeline

WORDS = (
    "a", "the", "beach", "dog", "cat", "cup", "replace", "with", "in", "of", "make", "it", "snow",
    "beside", "on", "shelf", "red", "blue",
)  # fmt: skip
PREFIXES = {
    "subject": "paint: \n", "subject_inference": "paint \n", "edit": "edit: \n",
    "subject_edit": "put: \n",
}  # fmt: skip


def tiny_tokenizer() -> T5Tokenizer:
    """Words and letters, 64 pieces in all."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS)]
    pieces += [letter for letter in "abcdefghijklmnopqrstuvwxyz:,"]
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def tiny_vae() -> AutoencoderKL:
    """Four pixels a latent: pictures of 32×32."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.18215,
    ).eval()


def tiny_pipeline(**settings) -> MigePipeline:
    settings = {"slots": 4, "prefixes": PREFIXES} | settings
    return MigePipeline(
        **golden_parts(), vae=tiny_vae(), tokenizer=tiny_tokenizer(),
        scheduler=ContinuousDPMSolver(), **settings,
    )  # fmt: skip


def save_tiny(folder: Path) -> Path:
    tiny_pipeline().save_pretrained(folder)
    return folder
