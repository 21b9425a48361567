"""What tests share: thin random models of Stable Diffusion's shapes, boxes, and small helpers."""

import socket
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imagelab.boxes import Box
from mifo.learning.prediction import predicting
from mifo.method.learning_loss import StepLoss, learning_loss
from mifo.method.regions import TokenRoles
from toybox.stable_diffusion.architecture import build_scheduler

#: start, a function word, subject 0, a function word, subject 1 in two tokens, end, padding
TOKENS = TokenRoles(subjects=((2,), (4, 5)), filtered=(1, 3), end=6, length=8, leading=(2, 5))
BOXES = (Box(0, 0, 0.5, 0.75), Box(0.5, 0.25, 1, 1))


GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> dict[str, torch.Tensor]:
    """All arrays of a golden file, as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def thin_unet(levels: int = 4, seed: int = 0, **settings) -> UNet2DConditionModel:
    """A UNet of one layer a block and 16 channels in two heads; ``settings`` go to its config."""
    plain = {
        "sample_size": 16,
        "block_out_channels": (16,) * levels,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "use_linear_projection": True,
    }
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(plain | settings)).requires_grad_(False).eval()


def batch_loss(model, batch, layers, attention_term=None, *weights) -> StepLoss:
    """The loss of a batch, as a step of learning computes it."""
    with predicting(model, batch, layers) as found:
        return learning_loss(
            found.predicted, found.target, found.maps, batch.masks, attention_term, *weights
        )


def thin_scheduler(**settings) -> DDIMScheduler:
    """Stable Diffusion's noise schedule; ``settings`` go to its config."""
    return DDIMScheduler.from_config(build_scheduler().config, **settings)


def thin_pipeline(
    tokenizer: Path, unet: UNet2DConditionModel, scheduler
) -> StableDiffusionPipeline:
    """A whole pipeline around a UNet, with an eightfold VAE and the tokenizer of a folder."""
    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=552, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=550, eos_token_id=551, pad_token_id=0,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=4, latent_channels=4,
        sample_size=8 * unet.config.sample_size,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
