"""What the tests of toybox's MIGE share: a tiny shape, and triplets whose pictures are blank."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mige.method.loss import Diffusion
from toybox.mige.architecture import ToyMigeConfig, build_parts, build_tokenizer, load_vae
from toybox.mige.pretraining import reading_model
from toybox.scenes import triplets

TINY = ToyMigeConfig(
    width=32, head_width=16, blocks=1,
    text_width=32, text_heads=2, text_inner=32, text_layers=1,
    vision_width=32, vision_heads=2, vision_inner=32, vision_layers=1,
    queries=3, query_width=32, query_heads=2, query_inner=32, query_layers=2,
)  # fmt: skip
SHORT = (
    "--views", "8", "--vision_steps", "4", "--triplets", "8", "--stack_steps", "4", "--batch", "4",
    "--held_out", "6", "--warmup", "1", "--device", "cpu",
)  # fmt: skip


@cache
def the_vae():
    return load_vae()


@cache
def the_tokenizer():
    return build_tokenizer()


def tiny_parts(seed: int = 0) -> dict:
    return build_parts(TINY, the_vae(), the_tokenizer(), seed)


def tiny_model(seed: int = 0):
    parts = tiny_parts(seed)
    model = reading_model(parts, the_tokenizer(), Diffusion.of(parts["scheduler"]))
    return model.eval()


def words_alone(patch) -> None:
    """Let triplets be drawn without painting them, which takes a tenth of the time."""
    blank = Image.new("RGB", (2, 2))

    def paint(scene):
        return blank, np.ones((len(scene.toys), 2, 2), bool)

    patch.setattr(triplets, "_paint", paint)
    patch.setattr(triplets, "_closed", lambda mask: mask)
    patch.setattr("toybox.scenes.layouts.stands_out", lambda scene: True)
    patch.setattr("toybox.scenes.edits.stands_out", lambda scene: True)


def weights_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)
