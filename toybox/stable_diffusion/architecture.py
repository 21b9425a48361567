"""What toybox is made of: Stable Diffusion's own classes, very small."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imagelab.errors import UserError
from imagelab.io.atomic import write_json
from imagelab.models.loading import quiet_libraries
from imagelab.models.stable_diffusion import StableDiffusion

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
UNET_GROUPS = 16  # of each of the UNet's group norms


@dataclass(frozen=True)
class ToyboxConfig:
    """Shape of the model. Latents have a side of ``resolution / 8`` with the default levels."""

    resolution: int = 128  # pixels
    latent_channels: int = 12
    vae_channels: tuple[int, ...] = (8, 16, 48, 64)
    unet_channels: tuple[int, ...] = (64, 128)
    unet_layers: int = 1  # a block
    head_channels: int = 32
    unet_heads: tuple[int, ...] | None = None  # of each level; None: as many as have head_channels
    text_width: int = 128
    text_layers: int = 2

    @property
    def latent_size(self) -> int:
        return self.resolution // 2 ** (len(self.vae_channels) - 1)


def build_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair CLIP vocabulary trained on captions (every word of them becomes one token).

    "!" has id 0 and pads, as in Stable Diffusion 2. A vocabulary that is in the folder already is
    kept.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not (folder / "merges.txt").exists():
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=4096,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        bpe.model.save(str(folder))
    return _clip_tokenizer(folder, alphabet)


def _clip_tokenizer(folder: Path, alphabet: list[str]) -> CLIPTokenizer:
    """Order a trained vocabulary as CLIP's: bytes, bytes ending a word, merges, start and end."""
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    letters = [PAD] + [letter for letter in alphabet if letter != PAD]
    words = letters + [letter + "</w>" for letter in letters]
    words += [merged for line in merges if (merged := line.replace(" ", "")) not in words]
    words += [START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=77,
    )


def trained_kinds(model: Path) -> list[str]:
    """The kinds of toys that a toybox was trained on, as its record says."""
    try:
        return json.loads((model / "record.json").read_text(encoding="utf-8"))["train"]["kinds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{model / 'record.json'} does not say which kinds of toys the model was trained on "
            f"({type(error).__name__}); give a folder that toybox.stable_diffusion.train wrote"
        ) from error


def build_vae(config: ToyboxConfig) -> AutoencoderKL:
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=4,
        sample_size=config.resolution,
        scaling_factor=1.0,  # set once the autoencoder is trained
        mid_block_add_attention=False,
        force_upcast=False,
    )
    with torch.no_grad():  # a narrow posterior to start from
        vae.quant_conv.bias[config.latent_channels :] = -6.0
        vae.quant_conv.weight[config.latent_channels :] *= 0.1
    return vae


def build_unet(config: ToyboxConfig) -> UNet2DConditionModel:
    levels = len(config.unet_channels)
    heads = config.unet_heads or tuple(c // config.head_channels for c in config.unet_channels)
    return UNet2DConditionModel(
        sample_size=config.latent_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        cross_attention_dim=config.text_width,
        attention_head_dim=heads,  # diffusers' name for their number
        norm_num_groups=UNET_GROUPS,
        use_linear_projection=True,
    )


def build_text_encoder(config: ToyboxConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_width // config.head_channels,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(vae, text_encoder, tokenizer, unet):
    quiet_libraries()
    model = StableDiffusion(
        tokenizer, text_encoder, vae, unet, build_scheduler(), source="toybox", digest=""
    )
    pipeline = model.to_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_half(pipeline, folder: Path) -> None:
    """Write a pipeline in half precision, so that it is read in float32 again.

    diffusers reads in float32 unless asked otherwise, transformers in what the config names: a text
    encoder in half precision beside a UNet in float32 could not draw.
    """
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    path = folder / "text_encoder" / "config.json"
    facts = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    write_json(path, facts)
