"""Going on: what a resumed run has to share, and what is learned already."""

import hashlib
from collections.abc import Collection

from imagelab.errors import UserError
from imagelab.training.checkpoint import Checkpoint, read_facts
from mifo.learned import read_manifest
from mifo.learning.config import LearningConfig
from mifo.learning.instance import find_files
from mifo.learning.places import CHECKPOINT, instance_folder, target_folder, work_folder
from mifo.learning.plan import Plan, inputs_of

#: Settings that a config may leave open, which is None: a resumed run keeps its own.
OPEN = (
    "seed", "initializer_scale", "learning_rate", "finetune_learning_rate", "class_prompt",
    "num_class_images",
)  # fmt: skip
#: Settings that may differ between a run and its resumption.
FREE_SETTINGS = {
    "folder_path", "output_dir", "model_path", "class_images", "offline", "checkpoint_steps",
    "save_pipeline", "device", "mixed_precision", "gradient_checkpointing",
}  # fmt: skip
#: What a checkpoint has to say of a run of learning; see `imagelab.io.tensors.misfit`.
FACTS = {
    "settings": {"seed": int},
    "inputs": {"base model": str, "picture": str, "set of masks": [str]},
}
ANEW = "start anew with --overwrite in place of --resume"


def resumed(config: LearningConfig) -> LearningConfig:
    """The config that an unfinished run goes on with: it takes the run's own for what is open.

    Raises UserError for other settings than the unfinished run's.
    """
    then = read_facts(work_folder(config) / CHECKPOINT, FACTS)["settings"]
    config = config.with_settings(**{name: then.get(name) for name in _open_settings(config)})
    _check_same_settings(then, config, ANEW)
    return config


def _open_settings(config: LearningConfig) -> list[str]:
    settings = config.settings()
    return [name for name in OPEN if settings[name] is None]


def check_same(saved: Checkpoint, plan: Plan, otherwise: str = ANEW) -> None:
    """Raises UserError unless an unfinished run had the settings and the files of a plan.

    ``otherwise``: what else to do about it than to put back what has changed.
    """
    _check_same_settings(saved.facts["settings"], plan.config, otherwise)
    now = inputs_of(plan)
    then = saved.facts["inputs"]
    if changed := [name for name, digest in then.items() if digest != now.get(name)]:
        raise UserError(
            f"the {changed[0]} is not what the unfinished run had; put that back, or {otherwise}"
        )


def _check_same_settings(then: dict, config: LearningConfig, otherwise: str) -> None:
    if changed := _changed_settings(then, config):
        raise UserError(
            f"the unfinished run had other settings ({changed}); go on with those, or {otherwise}"
        )


def kept_settings(config: LearningConfig, free: Collection[str] = FREE_SETTINGS) -> dict:
    """The settings that a resumed run has to share, all but the free ones, in JSON's types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.settings().items()
        if name not in free
    }


def _changed_settings(
    then: dict, config: LearningConfig, free: Collection[str] = FREE_SETTINGS
) -> str:
    """The options in which a run went by other settings than a config; empty if there are none.

    What the run itself left open, as runs of earlier versions did, goes with any. A setting that it
    does not know, since it is older, then was as it is by default.
    """
    now = kept_settings(config, free)
    then = kept_settings(LearningConfig(), free) | then
    kept = [name for name in then if name not in free]
    kept = [name for name in kept if name not in OPEN or then[name] is not None]
    return ", ".join(f"--{name} {then[name]}" for name in kept if then[name] != now.get(name))


def learned_otherwise(config: LearningConfig) -> str:
    """How what was learned differs from what a config asks for; empty if it does not.

    What the config leaves open goes with any. Its model_path is one that choose_model returned.
    """
    manifest = read_manifest(target_folder(config))
    then = manifest["settings"] | {"model_path": manifest["base_model"]["source"]}
    then |= dict.fromkeys(_open_settings(config))
    free = FREE_SETTINGS - {"model_path", "class_images"}
    if changed := _changed_settings(then, config, free):
        return f"with {changed}"
    picture, masks = find_files(instance_folder(config))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (picture, *masks)]
    is_same = hashes == [manifest["image_sha256"], *manifest["mask_sha256"]]
    return "" if is_same else "from another photo or other masks"
