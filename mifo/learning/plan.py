"""The plan of a learning run: everything read and checked before anything long starts."""

import hashlib
import time
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError
from imagelab.models.device import choose_precision
from imagelab.models.sources import choose_model
from imagelab.models.stable_diffusion import StableDiffusion, load_base, read_sizes
from imagelab.training.checkpoint import Checkpoint, read_facts
from mifo.learned import MANIFEST, check_name, check_writable, open_learned, recover
from mifo.learning.config import CHOICES, LearningConfig, check_choice
from mifo.learning.instance import Instance, coverage_report, find_files, read_instance
from mifo.learning.priors import STEPS, find_class_images
from mifo.tokens import ASSET, add_asset_tokens, initial_rows, view_prompt
from imagelab.prompts import encode_ids

CHECKPOINT = "checkpoint.safetensors"
KEPT = 40  # by the peaks in benchmarks/results
#: Settings that may differ between a run and its resumption.
FREE_SETTINGS = {
    "folder_path", "output_dir", "model_path", "class_images", "offline", "checkpoint_steps",
    "save_pipeline", "device", "mixed_precision", "gradient_checkpointing",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A checked run: what it will do, before anything long has started.

    ids, rows: the asset tokens, which the base model has got, and their first embeddings.
    """

    config: LearningConfig
    base: StableDiffusion
    instance: Instance
    ids: list[int]
    rows: Tensor
    device: str
    dtype: torch.dtype
    class_images: list[Path] | None

    @property
    def target(self) -> Path:
        """Where the finished folder goes."""
        return target_folder(self.config)

    @property
    def work(self) -> Path:
        """Where an unfinished run keeps its checkpoint."""
        return work_folder(self.config)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(stage, steps) of the stages that have steps."""
        steps = {1: self.config.train_steps, 2: self.config.finetune_steps}
        if self.config.finetune == "none":
            steps[2] = 0
        return tuple((stage, count) for stage, count in steps.items() if count)

    @property
    def has_prior(self) -> bool:
        """Whether class images are needed."""
        return bool(self.config.prior_weight) and any(stage == 2 for stage, _ in self.stages)


def instance_folder(config: LearningConfig) -> Path:
    """Where the photo and the masks are."""
    return Path(config.folder_path) / config.instance


def target_folder(config: LearningConfig) -> Path:
    """Where the learned folder will be."""
    return Path(config.output_dir) / config.instance


def work_folder(config: LearningConfig) -> Path:
    """Where the checkpoint of the unfinished run lies."""
    return Path(config.output_dir) / f".{config.instance}.work"


def is_begun(config: LearningConfig) -> bool:
    """Is there an unfinished run to go on with?"""
    return (work_folder(config) / CHECKPOINT).is_file()


def is_learned(config: LearningConfig) -> bool:
    """Is the learned folder there?"""
    recover(target_folder(config))
    return (target_folder(config) / MANIFEST).is_file()


def check_target(config: LearningConfig, resume: bool, overwrite: bool) -> None:
    """Raises UserError where a result or an unfinished run is in the way, or nothing to resume."""
    check_name(config.instance, "instance")
    target, work = target_folder(config), work_folder(config)
    check_writable(target.parent, "output_dir")
    if not is_learned(config) and target.exists():
        raise UserError(f"{target} is there and is no learned folder; give another --output_dir")
    if resume and not is_begun(config):
        raise UserError(f"there is no unfinished run at {work}; leave out --resume")
    if target.exists() and not (overwrite or resume):
        raise UserError(f"{target} is there already; give --overwrite to learn it anew")
    if is_begun(config) and not (overwrite or resume):
        raise UserError(
            f"{work} holds an unfinished run; go on with --resume, or start anew with --overwrite"
        )


def check_settings(config: LearningConfig) -> None:
    """Raises UserError for settings that make no sense."""
    if config.seed is None:
        raise UserError("there is no seed; give one (only the command draws it)")
    for name in CHOICES:
        check_choice(name, getattr(config, name))
    positive = ("lora_rank", "num_class_images", "checkpoint_steps")
    for name in (*positive, "train_steps", "finetune_steps", "reward_steps", "warmup_steps"):
        value, least = getattr(config, name), int(name in positive)
        if value < least:
            raise UserError(f"--{name} is {value}; give a whole number from {least} on")
    rates = ("learning_rate", "finetune_learning_rate", "weight_decay")
    for name in (*rates, "prior_weight", "attention_weight"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name} is {value}; give a number from 0 on")
    if not 0 < config.max_grad_norm < float("inf"):
        raise UserError(f"--max_grad_norm is {config.max_grad_norm}; give a number above 0")
    if not config.train_steps and (config.finetune == "none" or not config.finetune_steps):
        raise UserError("there is nothing to learn: --train_steps and --finetune_steps are 0")
    if config.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    if ASSET.search(config.class_prompt):
        raise UserError(
            f"--class_prompt {config.class_prompt!r} names an asset, which the base model does not "
            "know; name the kind of thing, as in 'a photo of a chair'"
        )


def make_plan(config: LearningConfig, device: str = "cpu") -> Plan:
    """Read and check everything that a run on a torch device needs, the cheapest first."""
    check_settings(config)
    dtype = choose_precision(config.mixed_precision, device)
    folder = instance_folder(config)
    find_files(folder)  # before a model is fetched
    source = choose_model(config.model_path, device)
    pictures = find_class_images(config.class_images) if config.class_images else None
    base, sizes = None, read_sizes(source, config.offline)
    if sizes is None:  # a single file tells its sizes only when it is loaded
        base = load_base(source, config.offline)
        sizes = base.resolution, base.multiple
    instance = read_instance(folder, *sizes, config.resize)
    base = base or load_base(source, config.offline)
    encode_ids(base.tokenizer, config.class_prompt)
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, len(instance.masks))
    encode_ids(base.tokenizer, view_prompt(tuple(range(len(ids)))))  # the longest of all views
    words = config.initializer_tokens
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, words, config.seed)
    return Plan(config, base, instance, ids, rows, device, dtype, pictures)


def describe(plan: Plan) -> str:
    """The plan in words, with an estimate of memory and work."""
    config, base = plan.config, plan.base
    height, width = plan.instance.image.shape[:2]
    images = config.class_images or f"{config.num_class_images} to make"
    lines = [
        f"base model   {base.source} on {plan.device} in {str(plan.dtype).removeprefix('torch.')}",
        f"instance     {plan.instance.folder}: {len(plan.instance.masks)} masks, {width}×{height}",
        *(f"             {line}" for line in coverage_report(plan.instance).splitlines()),
        *(f"stage {stage}      {steps} steps" for stage, steps in plan.stages),
        f"fine-tuning  {config.finetune}; attention loss {config.attention_loss}",
        f"seed         {config.seed}",
        f"class images {images if plan.has_prior else 'none'}",
        f"memory       about {estimate_bytes(plan) / 2**30:.2f} GiB (an estimate)",
        f"writes       {plan.target}",
    ]
    return "\n".join(lines)


def estimate_bytes(plan: Plan) -> int:
    """About how much memory a run takes on its device: the weights, and what is kept for gradients.

    The backward pass is taken to need KEPT values for each layer, channel and pixel of the UNet,
    and an eighth of them with gradient checkpointing.
    """
    config, base, unet = plan.config, plan.base, plan.base.unet.config
    unet_size, text_size = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (base.unet, base.text_encoder)
    )
    bytes_each = torch.finfo(plan.dtype).bits // 8
    if config.finetune == "full":  # weights, gradients and two moments, these of 4 or of 1 byte
        weights = (16 if config.optimizer == "adamw" else 10) * (unet_size + text_size)
    else:
        weights = bytes_each * unet_size + 4 * text_size
    height, width = plan.instance.image.shape[:2]
    pixels = height * width // base.vae_factor**2
    values = sum(
        channels * (pixels // 4**level) for level, channels in enumerate(unet.block_out_channels)
    )
    layers = 2 * unet.layers_per_block + 1  # of a level, downward and upward
    kept = bytes_each * KEPT * layers * values * (1 + plan.has_prior)
    return weights + kept // (8 if config.gradient_checkpointing else 1)


def estimate_seconds(plan: Plan) -> float:
    """About how long a run takes, from one timed pass of its UNet; a backward pass counts twice."""
    base, (height, width) = plan.base, plan.instance.image.shape[:2]
    unet = base.unet.to(plan.device, plan.dtype)
    latents = torch.zeros(
        1, unet.config.in_channels, height // base.vae_factor, width // base.vae_factor
    )
    text = torch.zeros(1, base.tokenizer.model_max_length, base.text_encoder.config.hidden_size)
    latents, text = (x.to(plan.device, plan.dtype) for x in (latents, text))
    with torch.inference_mode():
        for _ in range(2):  # the first pass also warms up
            start = time.perf_counter()
            unet(latents, torch.zeros(1, device=plan.device), text).sample.cpu()
            seconds = time.perf_counter() - start
    passes = sum(3 * steps for _, steps in plan.stages)
    if plan.has_prior:
        passes += 3 * plan.config.finetune_steps
        passes += 0 if plan.class_images else 2 * STEPS * plan.config.num_class_images
    return passes * seconds


def resumed(config: LearningConfig) -> LearningConfig:
    """The config that an unfinished run goes on with: without a seed, it takes the run's own.

    Raises UserError for other settings than the unfinished run's.
    """
    then = read_facts(work_folder(config) / CHECKPOINT)["settings"]
    if config.seed is None:
        config = replace(config, seed=then["seed"])
    _check_same_settings(then, config)
    return config


def check_same(saved: Checkpoint, plan: Plan) -> None:
    """Raises UserError unless an unfinished run had the settings and the files of a plan."""
    _check_same_settings(saved.facts["settings"], plan.config)
    inputs = inputs_of(plan)
    if changed := [
        name for name, digest in saved.facts["inputs"].items() if digest != inputs[name]
    ]:
        raise UserError(
            f"the {changed[0]} is not what the unfinished run had; put that back, or start anew "
            "with --overwrite in place of --resume"
        )


def _check_same_settings(then: dict, config: LearningConfig) -> None:
    if differ := _other_settings(then, config):
        raise UserError(
            f"the unfinished run had other settings ({differ}); go on with those, or start anew "
            "with --overwrite in place of --resume"
        )


def inputs_of(plan: Plan) -> dict:
    """What a run reads, by hash."""
    pictures = plan.class_images or ()
    return {
        "base model": plan.base.digest,
        "picture": plan.instance.image_hash,
        "set of masks": list(plan.instance.mask_hashes),
        "set of class images": [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures],
    }


def kept_settings(config: LearningConfig, free: Collection[str] = FREE_SETTINGS) -> dict:
    """The settings that a resumed run has to share, all but the free ones, in JSON's types."""
    return {
        field.name: list(value)
        if isinstance(value := getattr(config, field.name), tuple)
        else value
        for field in fields(config)
        if field.name not in free
    }


def _other_settings(
    then: dict, config: LearningConfig, free: Collection[str] = FREE_SETTINGS
) -> str:
    """The options of a run that went by other settings than a config's; empty if by the same."""
    now = kept_settings(config, free)
    kept = (name for name in then if name not in free)
    return ", ".join(f"--{name} {then[name]}" for name in kept if then[name] != now.get(name))


def learned_otherwise(config: LearningConfig) -> str:
    """How what was learned differs from what a config asks for; empty if it does not.

    A config without a seed goes with any. Its model_path is one that choose_model returned.
    """
    manifest = open_learned(target_folder(config)).manifest
    then = manifest["settings"] | {"model_path": manifest["base_model"]["source"]}
    if config.seed is None:
        then["seed"] = None
    if differ := _other_settings(then, config, FREE_SETTINGS - {"model_path", "class_images"}):
        return f"with {differ}"
    picture, masks = find_files(instance_folder(config))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (picture, *masks)]
    same = hashes == [manifest["image_sha256"], *manifest["mask_sha256"]]
    return "" if same else "from another photo or other masks"
