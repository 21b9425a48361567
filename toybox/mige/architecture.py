"""What toybox's MIGE is made of: the very classes of the full one, very small.

The autoencoder is toybox's own, as it is; all else is drawn here, and `toybox.mige.begin` teaches
the parts that read before training begins.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from imagelab.io.atomic import folder_lock, replacing, write_json
from imagelab.io.folders import check_only
from imagelab.models.loading import quiet_libraries
from imagelab.training.seeds import seed_for
from mige.folder import CONTENTS, PARTS
from mige.method.fusion import InstructionFusion
from mige.method.sampler import ContinuousDPMSolver
from mige.method.wording import TASKS
from mige.pipeline import MigePipeline
from mige.targets import check_output
from toybox.mige.folders import RECORDS
from toybox.scenes.triplets import WORDS
from toybox.stable_diffusion import FOLDER

VAE = Path(FOLDER) / "vae"
#: Sentences before instructions. They are one word each, which no instruction has, so that training
#: and inference read the same: nothing in them is cleaned away.
PREFIXES = {
    "subject": "compose ",
    "subject_inference": "compose ",
    "edit": "edit ",
    "subject_edit": "combine ",
}
#: How it is sampled.
GUIDANCE = dict.fromkeys(TASKS, {"steps": 20, "text_scale": 4.0, "image_scale": 1.0})
#: T5's own first pieces, and what words are spelled with that the vocabulary does not have.
SPECIAL, LETTERS = ("<pad>", "</s>", "<unk>"), "abcdefghijklmnopqrstuvwxyz0123456789,-'?&/%"
WORD_SCORE, LETTER_SCORE = -1.0, -10.0  # log-probabilities, so that a word stays whole


@dataclass(frozen=True)
class ToyMigeConfig:
    """The sizes of the parts."""

    slots: int = 2  # pictures that an instruction may have
    # the trunk, over the autoencoder's latents
    width: int = 192
    head_width: int = 32
    blocks: int = 6
    patch: int = 2  # latents along a side
    # T5
    text_width: int = 128
    text_heads: int = 4
    text_inner: int = 256
    text_layers: int = 4
    text_length: int = 48  # the longest prompt of a triplet takes 34, its pictures included
    # the vision encoder
    vision_side: int = 64  # pixels
    vision_patch: int = 8
    vision_width: int = 128
    vision_heads: int = 4
    vision_inner: int = 384
    vision_layers: int = 4
    # the Q-Former and the fusion
    queries: int = 8
    query_width: int = 128
    query_heads: int = 4
    query_inner: int = 384
    query_layers: int = 4


def load_vae() -> AutoencoderKL:
    """toybox's autoencoder, float32 and frozen."""
    quiet_libraries()
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


def build_tokenizer() -> T5Tokenizer:
    """A vocabulary in which every word of triplets and prefixes is one piece."""
    words = sorted({*WORDS, *" ".join(PREFIXES.values()).split()})
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(f"▁{word}", WORD_SCORE) for word in words]
    known = {piece for piece, _ in pieces}
    letters = [letter for letter in ("▁", *LETTERS) if letter not in known]
    pieces += [(letter, LETTER_SCORE) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_parts(config: ToyMigeConfig, vae: AutoencoderKL, tokenizer, seed: int) -> dict:
    """New parts by the names of the pipeline's arguments, but for the autoencoder and tokenizer."""
    quiet_libraries()
    makers: dict[str, Callable[[], nn.Module]] = {
        "transformer": lambda: _transformer(config, vae),
        "text_encoder": lambda: _text_encoder(config, tokenizer),
        "vision_encoder": lambda: _vision_encoder(config),
        "qformer": lambda: _qformer(config),
        "fusion": lambda: _fusion(config),
    }
    parts = {}
    for name, make in makers.items():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(seed, "part", name))
            parts[name] = make()
    parts["scheduler"] = ContinuousDPMSolver(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )  # fmt: skip
    return parts


def build_pipeline(parts: dict, vae: AutoencoderKL, tokenizer, slots: int) -> MigePipeline:
    """The pipeline of all parts."""
    return MigePipeline(
        **parts, vae=vae, tokenizer=tokenizer, slots=slots, round_timesteps=False,
        prefixes=PREFIXES, guidance=GUIDANCE,
    )  # fmt: skip


def save(
    pipeline: MigePipeline,
    folder: Path,
    records: Mapping[str, dict] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder, which appears when it is whole; the autoencoder's files are toybox's.

    So features that were made with the one autoencoder are known to be the other's.

    Args:
        records: facts of JSON files that lie in it, by their names.
        overwrite: take the place of a model that is there.

    Raises:
        UserError: the folder holds something else, or another process writes it.
    """
    records = records or {}
    own = (*RECORDS, *records)
    with folder_lock(folder, "--output"):
        check_output(folder, [], overwrite, own)
        with replacing(folder, partial(check_only, own=(*CONTENTS, *own))) as aside:
            pipeline.save_pretrained(aside)
            for name, facts in records.items():
                write_json(aside / name, facts)
            for name in (PARTS["vae"].config, f"{PARTS['vae'].weights}.safetensors"):
                shutil.copyfile(VAE / name, aside / "vae" / name)


def new_parameters(parts: dict) -> dict[str, int]:
    """How many numbers each new part has."""
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


# ----------------------------------------------------------------------------------------------
# parts


def _transformer(config: ToyMigeConfig, vae: AutoencoderKL) -> PixArtTransformer2DModel:
    """The trunk, drawn as PixArt-α's authors do.

    Its layers that follow the attention to the text, and the last one, begin at zero.
    """
    channels = 2 * vae.config.latent_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    trunk = PixArtTransformer2DModel(
        num_attention_heads=config.width // config.head_width,
        attention_head_dim=config.head_width,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.blocks,
        cross_attention_dim=config.width,
        sample_size=vae.config.sample_size // factor,
        patch_size=config.patch,
        caption_channels=config.text_width,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        attention_bias=True,
        activation_fn="gelu-approximate",
        use_additional_conditions=False,
    )
    for layer in trunk.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    embedding = trunk.pos_embed.proj
    nn.init.xavier_uniform_(embedding.weight.view(len(embedding.weight), -1))
    nn.init.zeros_(embedding.bias)
    times = trunk.adaln_single
    embedder = times.emb.timestep_embedder
    for layer in (embedder.linear_1, embedder.linear_2, times.linear):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (*(block.attn2.to_out[0] for block in trunk.transformer_blocks), trunk.proj_out):
        nn.init.zeros_(layer.weight)
    return trunk


def _text_encoder(config: ToyMigeConfig, tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=config.text_width,
            d_kv=config.text_width // config.text_heads,
            d_ff=config.text_inner,
            num_layers=config.text_layers,
            num_heads=config.text_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _vision_encoder(config: ToyMigeConfig) -> Blip2VisionModel:
    """A vision encoder that learns from few pictures.

    Its places begin as sines and cosines, so that neighbours are alike, and its queries as its
    keys, so that a patch looks at what is like itself (Trockman and Kolter, arXiv 2305.09828).
    """
    encoder = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=config.vision_inner,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_heads,
            image_size=config.vision_side,
            patch_size=config.vision_patch,
            qkv_bias=True,
        )
    )
    scaled(encoder)
    with torch.no_grad():
        for layer in encoder.encoder.layers:
            query, key, _ = layer.self_attn.qkv.weight.chunk(3)
            key.copy_(query)
        patches = encoder.embeddings.patch_embedding
        nn.init.normal_(patches.weight, std=1 / math.sqrt(patches.weight[0].numel()))
        side = config.vision_side // config.vision_patch
        places = get_2d_sincos_pos_embed(config.vision_width, side, output_type="pt")
        encoder.embeddings.position_embedding[0, 1:] = places
    return encoder


def _qformer(config: ToyMigeConfig) -> Blip2QFormerModel:
    return scaled(
        Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.query_width,
                num_hidden_layers=config.query_layers,
                num_attention_heads=config.query_heads,
                intermediate_size=config.query_inner,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                cross_attention_frequency=2,
                encoder_hidden_size=config.vision_width,
                use_qformer_text_input=False,
            )
        )
    )


def _fusion(config: ToyMigeConfig) -> InstructionFusion:
    """Queries of the deviation .02; pictures stand among words of about the same size."""
    fusion = InstructionFusion(
        queries=config.queries,
        width=config.query_width,
        heads=config.query_heads,
        patch_width=config.width,
        text_width=config.text_width,
        text_length=config.text_length,
    )
    scaled(fusion.projection)
    return fusion


def scaled(module: nn.Module) -> nn.Module:
    """Draw each Linear of a module with the deviation 1/√inputs, which keeps a signal's size."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module
