"""The plan of a learning run: everything read and checked before anything long starts."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagelab.errors import UserError
from imagelab.models.device import choose_precision
from imagelab.models.sources import choose_model
from imagelab.models.stable_diffusion import StableDiffusion, load_base, read_sizes
from imagelab.prompts import encode_ids
from mifo.defaults import Own, read_own, settle
from mifo.learning.checks import check_settings
from mifo.learning.classes import DESCRIPTION, class_prompt, read_classes
from mifo.learning.config import CLASS_PROMPT, LearningConfig, Recipe
from mifo.learning.instance import Instance, fit_instance, open_instance
from mifo.learning.leftovers import check_leftovers
from mifo.learning.places import instance_folder, target_folder, work_folder
from mifo.learning.priors import find_class_images
from mifo.tokens import add_asset_tokens, initial_rows, view_prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked run: what it will do, before anything long has started.

    Attributes:
        model: the base model, to which the asset tokens have been added.
        ids, rows: the asset tokens and their first embeddings, [assets, width].
        class_images: the user's own pictures of the class; None: the model makes them.
        origins: where each setting that the config left open got its value, by name.
    """

    config: LearningConfig
    model: StableDiffusion
    instance: Instance
    ids: list[int]
    rows: Tensor
    device: str
    dtype: torch.dtype
    class_images: list[Path] | None
    origins: dict[str, str]

    @property
    def target(self) -> Path:
        """Where the finished folder goes."""
        return target_folder(self.config)

    @property
    def work(self) -> Path:
        """Where an unfinished run keeps its checkpoint."""
        return work_folder(self.config)


def make_plan(config: LearningConfig, device: str = "cpu") -> Plan:
    """Read and check everything that a run on a torch device needs, the cheapest first."""
    check_settings(config)
    recipe, offline = config.recipe, config.runtime.offline
    dtype = choose_precision(config.runtime.mixed_precision, device)
    folder = instance_folder(config)
    files = open_instance(folder, config.mask_label)  # before a model is fetched
    classes = read_classes(folder, len(files.masks))
    words = first_words(recipe, classes, folder)
    pictures = find_class_images(config.class_images) if config.class_images else None
    source = choose_model(config.model_path, device)
    config, origins = settle_learning(config, read_own(source, offline), classes)
    check_settings(config)  # once more, with the numbers that were open
    recipe = config.recipe
    model, sizes = None, read_sizes(source, offline)
    if sizes is None:  # a single file shows its sizes only when it is loaded
        model = load_base(source, offline)
        sizes = model.resolution, model.multiple
    instance = fit_instance(files, *sizes, recipe.resize)
    model = model or load_base(source, offline)
    check_leftovers(model, recipe, instance)
    tokenizer, text_encoder = model.tokenizer, model.text_encoder
    encode_ids(tokenizer, recipe.class_prompt)
    ids = add_asset_tokens(tokenizer, text_encoder, len(instance.masks))
    check_count(tokenizer, len(ids), folder)
    scale = recipe.initializer_scale
    rows = initial_rows(tokenizer, text_encoder, ids, words, config.seed, scale)
    warn_of_no_penalty(recipe)
    return Plan(config, model, instance, ids, rows, device, dtype, pictures, origins)


def settle_learning(
    config: LearningConfig, own: Own, classes: tuple[str, ...]
) -> tuple[LearningConfig, dict[str, str]]:
    """Give each open setting its value: of the model, of the instance folder, or the default.

    Returns the config, and where each value is from, by setting.
    """
    wanted = {name: name for name in ("initializer_scale", "learning_rate", "num_class_images")}
    if config.recipe.finetune != "none":
        wanted["finetune_learning_rate"] = f"{config.recipe.finetune}_learning_rate"
    prompt = (class_prompt(classes), DESCRIPTION) if classes else (CLASS_PROMPT, "default")
    return settle(config, own, wanted, {"class_prompt": prompt})


def warn_of_no_penalty(recipe: Recipe) -> None:
    """Log that MIFO's reward takes all steps of stage 1, so that none is left for its penalty."""
    steps, first = recipe.train_steps, Recipe()
    if "penalty" in recipe.attention_steps(1) or recipe.attention_loss != "mifo" or not steps:
        return
    log.warning(
        "stage 1 uses the reward in all of its %d steps, and in none the penalty, which is meant "
        "to keep the instances apart: give --reward_steps %d (by default it is %d of %d)",
        steps, steps * first.reward_steps // first.train_steps, first.reward_steps,
        first.train_steps,
    )  # fmt: skip


def check_count(tokenizer, count: int, folder: Path) -> None:
    """Raises UserError for more asset tokens, which the tokenizer has, than a prompt can name."""

    def fits(assets: int) -> bool:
        try:
            encode_ids(tokenizer, view_prompt(tuple(range(assets))))  # the longest of all views
        except UserError:
            return False
        return True

    if not fits(count):
        most = max(filter(fits, range(count)), default=0)
        raise UserError(
            f"{folder} has {count} masks, and a prompt of this model can name {most} at most; take "
            "masks away, or put some into another instance folder with the same photo"
        )


def first_words(recipe: Recipe, classes: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """What the tokens start from; nothing: they start at random."""
    if not recipe.initialize_from_class:
        return recipe.initializer_tokens
    if not classes:
        raise UserError(
            f"--initialize_from_class: {folder} says no class; write {folder / DESCRIPTION}, such "
            'as {"class": "car"}, or give the words with --initializer_tokens'
        )
    return classes


def inputs_of(plan: Plan) -> dict:
    """What a run reads, by hash."""
    pictures = plan.class_images or ()
    return {
        "base model": plan.model.digest,
        "set of the base model's configs": plan.model.configs,
        "picture": plan.instance.image_hash,
        "set of masks": list(plan.instance.mask_hashes),
        "set of class images": [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures],
    }
