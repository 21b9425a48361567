"""What has to hold before a run begins: its settings, and the folders that it writes."""

from importlib.util import find_spec

from imagelab.errors import UserError, shorten
from imagelab.io.atomic import readable
from imagelab.io.folders import check_name, check_writable
from imagelab.prompts import check_prompt
from imagelab.training.seeds import check_seed
from mifo.bounds import check_bounds
from mifo.learned import check_own
from mifo.learning.config import CHOICES, LearningConfig, check_choice
from mifo.learning.places import is_begun, is_learned, target_folder, work_folder
from mifo.tokens import ASSET


def check_target(config: LearningConfig, resume: bool, overwrite: bool) -> None:
    """Raises UserError where a result or an unfinished run is in the way, or nothing to resume.

    And where a result that would be replaced holds files of the user's.
    """
    check_name(config.instance, "instance")
    target, work = target_folder(config), work_folder(config)
    check_writable(target.parent, "output_dir")
    is_there = readable(target).exists() or target.is_symlink()
    if is_there and not is_learned(config):
        raise UserError(f"{target} is there and is no learned folder; give another --output_dir")
    if resume and not is_begun(config):
        raise UserError(f"there is no unfinished run at {work}; leave out --resume")
    if is_there and not (overwrite or resume):
        raise UserError(f"{target} is there already; give --overwrite to learn it anew")
    if is_there:
        check_own(readable(target))
    if is_begun(config) and not (overwrite or resume):
        raise UserError(
            f"{work} holds an unfinished run; go on with --resume, or start anew with --overwrite"
        )


def check_settings(config: LearningConfig) -> None:
    """Raises UserError for settings that make no sense."""
    if config.seed is None:
        raise UserError("there is no seed; give one (only the command draws it)")
    check_seed(config.seed)
    recipe, settings = config.recipe, config.settings()
    for name in CHOICES:
        check_choice(name, settings[name])
    check_bounds(settings)
    if not recipe.max_grad_norm:
        raise UserError(f"--max_grad_norm is {recipe.max_grad_norm}; give a number above 0")
    if not recipe.steps:
        raise UserError("there is nothing to learn: --train_steps and --finetune_steps are 0")
    if recipe.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    if recipe.initialize_from_class and recipe.initializer_tokens:
        raise UserError(
            "--initialize_from_class and --initializer_tokens are both given; give one of them"
        )
    for words in recipe.initializer_tokens:
        check_prompt(words, "--initializer_tokens")
    check_prompt(recipe.class_prompt or "", "--class_prompt")
    if ASSET.search(recipe.class_prompt or ""):
        raise UserError(
            f"--class_prompt {shorten(recipe.class_prompt)!r} names an asset, which the base model "
            "does not know; name the kind of thing, as in 'a photo of a chair'"
        )
