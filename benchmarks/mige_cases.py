"""What is measured of MIGE: random models of three sizes, requests, and the work of each side."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import mige_plain
from benchmarks.measure import operations
from imagelab.models.loading import quiet_libraries
from mige.config import DEFAULTS, Guidance
from mige.method.guidance import branches
from mige.method.instruction import Embedded
from mige.method.sampler import ContinuousDPMSolver
from mige.pipeline import MigePipeline
from mige.request import Request, make_request
from mige.sizes import build

SEED, SLOTS, PATCH = 0, 4, 2
TASKS = ("subject", "edit")
WORDS = ("a", "and", "on", "the", "beach", "make", "it", "snow", "in")
PIECES = ("<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS))
END, VAE_FACTOR = PIECES.index("</s>"), 8


@dataclass(frozen=True)
class Blocks:
    """Layers of a transformer: how many, heads, channels a head, width within its MLP."""

    layers: int
    heads: int
    head_width: int
    inner: int

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class Sizes:
    """Of a whole model."""

    latents: int  # rows and columns
    transformer: Blocks
    vision_encoder: Blocks
    vision_patches: int  # along each side
    qformer: Blocks
    queries: int
    fusion_heads: int
    text_encoder: Blocks
    text_length: int
    words: int
    vae: tuple[int, ...]  # channels of its levels

    @property
    def pixels(self) -> int:
        return VAE_FACTOR * self.latents


MODELS = {
    # for the tests: most of a picture is the autoencoder
    "tiny": Sizes(
        latents=8,
        transformer=Blocks(2, 2, 24, 192),
        vision_encoder=Blocks(2, 2, 16, 64),
        vision_patches=2,
        qformer=Blocks(2, 2, 16, 64),
        queries=4,
        fusion_heads=2,
        text_encoder=Blocks(2, 4, 16, 96),
        text_length=32,
        words=64,
        vae=(8, 8, 8, 8),
    ),
    # the proportions of the released one, of its parts as of its numbers of tokens
    "mid": Sizes(
        latents=32,
        transformer=Blocks(8, 4, 72, 1152),
        vision_encoder=Blocks(12, 4, 88, 1536),
        vision_patches=8,
        qformer=Blocks(4, 3, 64, 768),
        queries=8,
        fusion_heads=2,
        text_encoder=Blocks(19, 10, 64, 1600),
        text_length=64,
        words=64,
        vae=(16, 32, 64, 64),
    ),
    # the released one
    "full": Sizes(
        latents=64,
        transformer=Blocks(28, 16, 72, 4608),
        vision_encoder=Blocks(39, 16, 88, 6144),
        vision_patches=16,
        qformer=Blocks(12, 12, 64, 3072),
        queries=32,
        fusion_heads=8,
        text_encoder=Blocks(24, 64, 64, 10240),
        text_length=256,
        words=32128,
        vae=(128, 256, 512, 512),
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of the table: a request."""

    task: str
    references: int  # pictures; an edit has its source alone


# ----------------------------------------------------------------------------------------------
# models


def configs(sizes: Sizes) -> dict[str, dict]:
    """The configs of a model's parts, the largest part first."""
    trunk, vision, qformer = sizes.transformer, sizes.vision_encoder, sizes.qformer
    text = sizes.text_encoder
    return {
        "text_encoder": {
            "vocab_size": sizes.words, "d_model": text.width, "d_kv": text.head_width,
            "d_ff": text.inner, "num_layers": text.layers, "num_heads": text.heads,
            "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "pad_token_id": 0,
            "eos_token_id": END,
        },
        "transformer": {
            "num_attention_heads": trunk.heads, "attention_head_dim": trunk.head_width,
            "in_channels": 8, "out_channels": 8, "num_layers": trunk.layers,
            "cross_attention_dim": trunk.width, "sample_size": sizes.latents, "patch_size": PATCH,
            "caption_channels": text.width, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "attention_bias": True,
            "activation_fn": "gelu-approximate", "use_additional_conditions": False,
        },
        "vision_encoder": {
            "hidden_size": vision.width, "intermediate_size": vision.inner,
            "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
            "image_size": 14 * sizes.vision_patches, "patch_size": 14, "hidden_act": "gelu",
            "layer_norm_eps": 1e-6, "qkv_bias": True, "initializer_range": vision.width**-0.5,
        },
        "qformer": {
            "hidden_size": qformer.width, "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads, "intermediate_size": qformer.inner,
            "cross_attention_frequency": 2, "encoder_hidden_size": vision.width,
            "use_qformer_text_input": False, "initializer_range": qformer.width**-0.5,
        },
        "fusion": {
            "queries": sizes.queries, "width": qformer.width, "heads": sizes.fusion_heads,
            "patch_width": trunk.width, "text_width": text.width,
            "text_length": sizes.text_length,
        },
    }  # fmt: skip


def build_parts(sizes: Sizes, device: str, dtype: torch.dtype = torch.float32) -> dict:
    """Parts with random weights, always the same on a device; the autoencoder is in float32."""
    from diffusers import AutoencoderKL

    quiet_libraries()
    torch.manual_seed(SEED)
    parts = {}
    for name, config in configs(sizes).items():
        shapes = build(name, config)  # on the meta device
        make = getattr(type(shapes), "from_config", type(shapes))
        with torch.device(device):
            parts[name] = make(shapes.config).to(dtype)
    # it begins at zero, and then pictures' latents would change nothing
    torch.nn.init.trunc_normal_(parts["fusion"].features.mix.weight, std=0.02)
    with torch.device(device):
        parts["vae"] = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(sizes.vae),
            up_block_types=("UpDecoderBlock2D",) * len(sizes.vae),
            block_out_channels=sizes.vae,
            layers_per_block=2,
            norm_num_groups=min(32, sizes.vae[0]),
            sample_size=sizes.pixels,
        )
    for part in parts.values():
        part.eval().requires_grad_(False)
    return parts


def load_model(name: str, device: str, dtype: torch.dtype, offload: bool = False) -> MigePipeline:
    """A random model on a device, or ready to be brought there part by part."""
    from transformers import T5Tokenizer

    vocabulary = [(piece, -float(index)) for index, piece in enumerate(PIECES)]
    pipeline = MigePipeline(
        **build_parts(MODELS[name], "cpu" if offload else device, dtype),
        tokenizer=T5Tokenizer(vocab=vocabulary, extra_ids=0),
        scheduler=ContinuousDPMSolver(),
        slots=SLOTS,
        round_timesteps=dtype == torch.bfloat16,
    )
    pipeline.set_progress_bar_config(disable=True)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def weight_bytes(pipeline: MigePipeline) -> int:
    """What the weights of all parts take."""
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


# ----------------------------------------------------------------------------------------------
# work


def request_of(row: Row) -> Request:
    """A request with pictures of coarse noise, no two of a shape."""
    rng = np.random.default_rng(SEED)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((600 - 90 * i, 480))
        for i in range(row.references)
    ]
    if row.task == "edit":
        return make_request("make it snow", source=pictures[0])
    marks = " and ".join(["a <image>"] * row.references)
    return make_request(f"{marks} on the beach", tuple(pictures))


def guidance_of(row: Row, steps: int) -> Guidance:
    """The paper's scales."""
    return replace(DEFAULTS[row.task], steps=steps)


def make_work(pipeline: MigePipeline, row: Row, steps: int, is_plain: bool) -> Callable[[], Tensor]:
    """One whole picture, from PIL to PIL; what is returned are its latents [1, c, h, w]."""
    request, guidance = request_of(row), guidance_of(row, steps)

    def plain() -> Tensor:
        inputs = mige_plain.prepare(pipeline, request, SEED)
        noise = pipeline.noise(request, SEED)
        latents = mige_plain.denoise(pipeline, inputs, noise, guidance)
        pipeline.decode(latents)
        return latents

    def ours() -> Tensor:
        condition = pipeline.encode(request, SEED)
        noise = pipeline.noise(request, SEED)
        latents = pipeline.denoise([condition], noise[None], guidance)
        pipeline.decode(latents)
        pipeline.maybe_free_model_hooks()
        return latents

    return plain if is_plain else ours


@cache
def shapes_of(sizes: Sizes) -> SimpleNamespace:
    """The parts of a model on the meta device, where a run has operations and no numbers."""
    parts = SimpleNamespace(**build_parts(sizes, "meta"))
    # values of its mask would be read, and there are none; without it the operations are the same
    parts.text_encoder.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"attention_mask": None}), with_kwargs=True
    )
    return parts


@cache
@torch.no_grad()
def costs_of(sizes: Sizes, row: Row) -> dict[str, int]:
    """Operations of the parts of a picture's work, found without computing one.

    ``around``: the autoencoder's; ``slots`` and ``pictures``: encoding all slots, or the pictures
    alone; ``plain`` and ``ours``: one step of the branches of a side.
    """
    parts, is_edit = shapes_of(sizes), row.task == "edit"
    plain = mige_plain.EDIT if is_edit else mige_plain.SUBJECT
    ours = branches(is_edit, DEFAULTS[row.task].image_scale)
    side, latent = 14 * sizes.vision_patches, (4, sizes.latents, sizes.latents)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def inputs(pictures: int, asked=()) -> mige_plain.Inputs:
        segments = [[] for _ in range(row.references + 1)]
        seen, latents = empty(pictures, 3, side, side), empty(pictures, *latent)
        return mige_plain.Inputs(segments, seen, latents, empty(*latent), asked)

    def encoding(pictures: int) -> int:
        return operations(lambda: mige_plain.encode(parts, inputs(pictures), END))

    def step(asked) -> int:
        encoded = Embedded(
            empty(sizes.text_length, sizes.text_encoder.width), empty(sizes.text_length)
        )
        given = inputs(1, asked), encoded, empty(1, *latent), empty()
        return operations(lambda: mige_plain.predict_branches(parts, *given, False))

    reading = operations(lambda: parts.vae.encode(empty(1, 3, sizes.pixels, sizes.pixels)))
    writing = operations(lambda: parts.vae.decode(empty(1, *latent)))
    return {
        "around": row.references * reading + writing,
        "slots": encoding(SLOTS),
        "pictures": encoding(row.references),
        "plain": step(plain),
        "ours": step(ours),
    }


def count_operations(sizes: Sizes, row: Row, steps: int) -> dict[str, int]:
    """Operations of a picture on either side."""
    cost = costs_of(sizes, row)
    return {
        "plain": cost["around"] + steps * (cost["slots"] + cost["plain"]),
        "ours": cost["around"] + cost["pictures"] + steps * cost["ours"],
    }
