"""Stable Diffusion 1 and 2: read from a folder or a single file, and checked."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError
from imagelab.io.tensors import tensor_names
from imagelab.models.base import Posterior
from imagelab.models.digests import weights_digest
from imagelab.models.loading import load_module, quiet_libraries, read_part
from imagelab.models.parts import STABLE_DIFFUSION, check_classes, checked_folder, read_config
from imagelab.models.sources import (
    MIRRORS,
    PARTS,
    check_folder,
    fetch_configs,
    locate_model,
)
from imagelab.models.tokenizers import ADVICE
from imagelab.prompts import encode_ids

log = logging.getLogger(__name__)

#: Keys of configs that change what a model does without changing the shapes of its weights.
MEANING = {
    "scheduler": (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "prediction_type", "rescale_betas_zero_snr",
    ),
    "vae": ("scaling_factor", "shift_factor", "norm_num_groups", "act_fn"),
    "unet": (
        "attention_head_dim", "num_attention_heads", "norm_num_groups", "norm_eps", "act_fn",
        "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "center_input_sample",
    ),
}  # fmt: skip
TEXT_MEANING = ("hidden_act", "num_attention_heads", "layer_norm_eps")
#: Where diffusers keeps the configs of Stable Diffusion 1, which a single file lacks.
CONFIGS_OF_1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass
class StableDiffusion:
    """A Stable Diffusion in parts, a :class:`~imagelab.models.base.DiffusionModel`.

    ``source`` is where it came from, ``digest`` the sha256 of its weights. :attr:`configs` says
    what the weights do not: two models with the same of both paint the same.
    """

    tokenizer: object
    text_encoder: object
    vae: object
    unet: object
    scheduler: object
    source: str
    digest: str

    @property
    def configs(self) -> str:
        """sha256 of what the configs say of the noise, the scale of latents, and the layers."""
        facts = {
            name: {key: _plain(getattr(self, name).config.get(key)) for key in keys}
            for name, keys in MEANING.items()
        }
        text = self.text_encoder.config.to_dict()
        facts["text_encoder"] = {key: _plain(text.get(key)) for key in TEXT_MEANING}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def vae_factor(self) -> int:
        """Pixels a latent."""
        return _halvings(self.vae.config)

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the model was trained for."""
        return picture_sizes(self.unet.config, self.vae.config)[0]

    @property
    def multiple(self) -> int:
        """What a picture's sides must be divisible by, in pixels, for the UNet to halve evenly."""
        return picture_sizes(self.unet.config, self.vae.config)[1]

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.vae.config.latent_channels

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision."""
        return self.unet.dtype

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """States [b, k, d] of prompts; a UserError when one is too long."""
        ids = torch.stack([encode_ids(self.tokenizer, prompt) for prompt in prompts])
        return self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state

    def encode(self, pixels: Tensor) -> Posterior:
        """The posterior of pictures [b, 3, H, W] in [-1, 1]."""
        code = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return Posterior(scale * code.mean.float(), scale * code.std.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures float32 [b, 3, H, W], about [-1, 1], of scaled latents [b, c, h, w]."""
        latents = latents / self.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.float()

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The UNet's prediction, float32 [b, c, h, w].

        Args:
            latents: noisy, [b, c, h, w]; timesteps: a scalar or [b]; text: [b, k, d].
        """
        text = text.to(self.device, self.dtype)
        return self.unet(latents.to(self.device, self.dtype), timesteps, text).sample.float()

    def to_pipeline(self):
        """diffusers' StableDiffusionPipeline of these very modules, without a safety checker."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def picture_sizes(unet: Mapping, vae: Mapping) -> tuple[int, int]:
    """A Stable Diffusion's ``resolution`` and ``multiple``, from its parts' configs."""
    size = unet["sample_size"]
    side = max(size) if isinstance(size, list | tuple) else size
    return side * _halvings(vae), _halvings(vae) * _halvings(unet)


def _plain(value: object) -> object:
    """A value of a config for JSON: a whole float as the int it equals, tuples as lists."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _halvings(config: Mapping) -> int:
    """By how much a UNet or a VAE divides the sides of what it reads."""
    return 2 ** (len(config["block_out_channels"]) - 1)


# ----------------------------------------------------------------------------------------------
# reading


def read_sizes(source: str, offline: bool = False) -> tuple[int, int] | None:
    """:func:`picture_sizes` of a diffusers folder, before its weights are read; None for a file."""
    path = locate_model(source, offline)
    if path.is_file():
        return None
    weights = check_folder(path)
    check_classes(path, STABLE_DIFFUSION)
    unet, vae = (
        read_config(path / part / "config.json", STABLE_DIFFUSION[part], weights[part])
        for part in ("unet", "vae")
    )
    return read_part(lambda _: picture_sizes(unet, vae), path / "unet")


def load_base(source: str, offline: bool = False) -> StableDiffusion:
    """Load a base model in float32 on the CPU, frozen, in evaluation mode.

    Raises UserError for a missing or broken part and for weights that are not finite.
    """
    quiet_libraries()
    path = locate_model(source, offline)
    if path.is_file():
        return _load_single_file(path, source, offline)
    weights = check_folder(path)
    with checked_folder(path, STABLE_DIFFUSION, weights) as ours:
        parts = {
            part: read_part(lambda _, p=part: LOADERS[p](ours / p), path / part)
            for part in STABLE_DIFFUSION
        }
    return _checked(StableDiffusion(**parts, source=source, digest=weights_digest(weights)))


def _load_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.name_or_path = ""
    return tokenizer


def _load_scheduler(folder: Path):
    from diffusers import DDIMScheduler

    config = json.loads((folder / "scheduler_config.json").read_text())
    return DDIMScheduler.from_config({k: v for k, v in config.items() if k != "_class_name"})


LOADERS = {
    "tokenizer": _load_tokenizer,
    **{
        part: partial(load_module, STABLE_DIFFUSION[part])
        for part in ("text_encoder", "vae", "unet")
    },
    "scheduler": _load_scheduler,
}


def _load_single_file(path: Path, source: str, offline: bool) -> StableDiffusion:
    """A checkpoint in Stability's format, with the configs of the diffusers folder it lies in.

    Elsewhere it takes those of a mirror on the hub, which no weights are fetched from.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    names = tensor_names(path, "give another --model_path")
    _check_no_addition(path, names)
    folder = path.parent
    if not (folder / "model_index.json").is_file():
        folder = fetch_configs(_configs_for(path, names), offline)

    def load(file: Path):
        with checked_folder(folder, STABLE_DIFFUSION, {}) as configs:
            return StableDiffusionPipeline.from_single_file(
                str(file), local_files_only=True, safety_checker=None, config=str(configs)
            )

    pipeline = read_part(load, path)
    model = StableDiffusion(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder.float(),
        vae=pipeline.vae.float(),
        unet=pipeline.unet.float(),
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config),
        source=source,
        digest=weights_digest({"single_file": path}),
    )
    return _checked(model)


def _check_no_addition(path: Path, names: Sequence[str]) -> None:
    """Raises UserError where a file holds what is added to a model, by its tensors' names."""
    if any("lora" in name for name in names):
        kind, option = "a LoRA", "--lora"
    elif len(names) == 1 and "." not in names[0]:
        kind, option = "a token file", "--tokens"
    else:
        return
    raise UserError(
        f"{path} is {kind}, not a base model; give it with {option}, and the model that it is for "
        "with --model_path"
    )


def _configs_for(path: Path, names: Sequence[str]) -> str:
    """The repository with the configs of a checkpoint that lies alone, by its tensors' names."""
    if any(name.startswith("cond_stage_model.model.") for name in names):
        log.warning(
            "%s is taken for Stable Diffusion 2.1 base (512 px, epsilon), since the file cannot "
            "tell; put one of 768 px (v-prediction) into its diffusers folder",
            path,
        )
        return MIRRORS[0]
    if any(name.startswith("cond_stage_model.transformer.") for name in names):
        return CONFIGS_OF_1
    raise UserError(
        f"{path} is no checkpoint of Stable Diffusion 1 or 2; give another --model_path, such as "
        "a diffusers folder"
    )


def _check_kind(unet: Mapping, vae: Mapping, text_encoder: Mapping, source: str) -> None:
    """Raises UserError unless the parts' configs are those of a plain text-to-image model."""
    channels, latents = unet["in_channels"], vae["latent_channels"]
    width, states = unet["cross_attention_dim"], text_encoder["hidden_size"]
    if channels != latents:
        why = f"its UNet reads {channels} channels and its latents have {latents}"
    elif width != states:
        why = f"its UNet reads text states of width {width}, its text encoder makes {states}"
    elif unet.get("addition_embed_type") or unet.get("class_embed_type"):
        why = "its UNet wants more than a text"
    else:
        return
    raise UserError(
        f"the model {source} is of another kind ({why}); give a text-to-image Stable Diffusion 1 "
        "or 2: no inpainting or depth model, no SDXL"
    )


def _check_words(model: StableDiffusion) -> None:
    """Raises UserError unless the text encoder knows all tokens; a text ends where it can."""
    tokenizer, config = model.tokenizer, model.text_encoder.config
    most, table = max(tokenizer.get_vocab().values()), config.vocab_size
    if most >= table:
        why = f"its tokenizer has a token of number {most}, its text encoder knows {table}"
    elif None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        why = "its tokenizer has no start, end or padding token"
    else:
        longest = min(tokenizer.model_max_length, config.max_position_embeddings)
        tokenizer.model_max_length = longest
        return
    raise UserError(f"the model {model.source} is damaged ({why}); {ADVICE}")


def _checked(model: StableDiffusion) -> StableDiffusion:
    _check_kind(
        model.unet.config, model.vae.config, model.text_encoder.config.to_dict(), model.source
    )
    _check_words(model)
    for part in PARTS:
        module = getattr(model, part)
        module.requires_grad_(False).eval()
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"the model {model.source} has weights that are not finite ({part}: {name}); "
                    "fetch it again"
                )
    return model
