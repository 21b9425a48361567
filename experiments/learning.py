"""Learning the folders of a study: what one way has made serves the next."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from imagelab.errors import UserError
from imagelab.io.atomic import written_aside
from mifo.learning.config import LearningConfig

#: Settings of learning that stage 1 does not depend on.
STAGE_2_SETTINGS = {
    "finetune", "finetune_steps", "finetune_learning_rate", "lora_rank", "prior_weight",
    "class_prompt", "num_class_images",
}  # fmt: skip
ELSEWHERE = "give another --work"


def learn_folder(work: Path, config: LearningConfig, device: str) -> None:
    """Learn an instance folder, going on from what an earlier run left; nothing if it is learned.

    Stage 1 is kept: the next learning with the same stage 1 starts behind it, and ends as if it
    had gone through it. Raises UserError for a folder that was learned otherwise, or whose photo or
    masks are not those that were begun with.
    """
    from imagelab.training.checkpoint import read_checkpoint, write_checkpoint
    from mifo.learning.places import CHECKPOINT, is_learned, target_folder
    from mifo.learning.plan import make_plan
    from mifo.learning.resume import FACTS, check_same, kept_settings, learned_otherwise
    from mifo.learning.run import learn

    if is_learned(config):
        if difference := learned_otherwise(config):
            raise UserError(f"{target_folder(config)} was learned {difference}; {ELSEWHERE}")
        return
    plan = make_plan(config, device)
    checkpoint, kept = plan.work / CHECKPOINT, work / "stage1" / stage_1_name(plan)
    if kept.is_file() and not checkpoint.is_file():
        saved = read_checkpoint(kept, FACTS, f"delete {kept}")
        saved.facts["settings"] = kept_settings(plan.config)
        check_same(saved, plan, ELSEWHERE)
        plan.work.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, saved)
    elif checkpoint.is_file():
        check_same(read_checkpoint(checkpoint, FACTS, f"delete {checkpoint}"), plan, ELSEWHERE)

    def keep(stage: str, path: Path) -> None:
        if stage == "stage 1" and not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(kept, read_checkpoint(path))

    share_class_images(work / "learned", Path(config.output_dir))
    learn(plan, checkpoint.is_file(), keep)


def stage_1_name(plan) -> str:
    """A file name that is the same for plans whose stage 1 is the same."""
    import torch

    from mifo.learning.resume import kept_settings

    config = plan.config
    settings = {k: v for k, v in kept_settings(config).items() if k not in STAGE_2_SETTINGS}
    autocast = config.recipe.finetune == "full" and plan.dtype != torch.float32
    model = [plan.model.digest, plan.model.configs]
    facts = json.dumps([settings, model, str(plan.dtype), autocast], sort_keys=True)
    return f"{config.instance}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.safetensors"


def share_class_images(learned: Path, mine: Path) -> None:
    """Link the class images that any variant has made into the cache of one of them."""
    cache = mine / ".class_images"
    cache.mkdir(parents=True, exist_ok=True)
    for path in learned.glob("*/.class_images/[!.]*.safetensors"):
        target = cache / path.name
        if target.exists():  # its own, or linked before
            continue
        try:
            os.link(path, target)
        except FileExistsError:  # by another process, just now
            continue
        except OSError:  # a disk without hard links
            with written_aside(target) as aside:
                shutil.copy(path, aside)
