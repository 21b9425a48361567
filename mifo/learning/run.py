"""Semantic learning: from a plan to a learned folder."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from imagelab.errors import UserError, memory_errors
from imagelab.io.atomic import folder_lock, sweep
from imagelab.training.checkpoint import Checkpoint, read_checkpoint
from imagelab.training.loop import Trainer
from mifo.learning.checks import check_target
from mifo.learning.places import CHECKPOINT
from mifo.learning.plan import Plan, inputs_of
from mifo.learning.result import write_result
from mifo.learning.resume import FACTS, check_same, kept_settings
from mifo.learning.session import Session
from mifo.learning.stages import finetuning_stage, token_stage

log = logging.getLogger(__name__)


def learn(
    plan: Plan,
    resume: bool = False,
    after_stage: Callable[[str, Path], None] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Run both stages and write the learned folder, which appears only when complete.

    Args:
        plan: what to do.
        resume: go on from the checkpoint of an unfinished run.
        after_stage: called with the name of each stage that has ended and the path of its last
            checkpoint.
        overwrite: replace a result that is there.

    Returns:
        The learned folder.

    Raises:
        Interrupted: Ctrl-C; the step was finished and saved.
        UserError: a result is there, maybe since the plan was made; another process learns this
            instance; or ``resume`` with other settings than the unfinished run's.
        FloatingPointError: a loss was not finite; nothing was overwritten.
        MemoryError: there was not enough memory, on the device or off it.
    """
    checkpoint = plan.work / CHECKPOINT
    with folder_lock(plan.target, "--instance or --output_dir"):
        check_target(plan.config, resume, overwrite)  # once more: others may have been here
        sweep(plan.work)
        saved = read_checkpoint(checkpoint, FACTS) if resume else None
        if saved:
            check_same(saved, plan)
            plan = replace(plan, origins=saved.facts.get("origins", plan.origins))
        try:
            with memory_errors():
                _run(plan, saved, after_stage)
        except (KeyboardInterrupt, OSError, MemoryError, FloatingPointError, UserError):
            if checkpoint.is_file():
                log.warning("saved in %s: go on with the same command and --resume", plan.work)
            raise
        shutil.rmtree(plan.work, ignore_errors=True)
    return plan.target


def _run(
    plan: Plan, saved: Checkpoint | None, after_stage: Callable[[str, Path], None] | None
) -> None:
    checkpoint, recipe = plan.work / CHECKPOINT, plan.config.recipe
    session = Session(plan)
    trainer = Trainer(
        checkpoint,
        {
            "settings": kept_settings(plan.config),
            "origins": plan.origins,
            "inputs": inputs_of(plan),
        },
        max_grad_norm=recipe.max_grad_norm,
        device=plan.device,
        fp16=plan.dtype == torch.float16,
        checkpoint_steps=plan.config.runtime.checkpoint_steps,
    )
    if not saved:
        shutil.rmtree(plan.work, ignore_errors=True)
    makers = {1: token_stage, 2: finetuning_stage}
    stages = {f"stage {number}": partial(makers[number], session) for number in recipe.steps}
    trainer.run(stages, saved, after_stage and (lambda name: after_stage(name, checkpoint)))
    write_result(session, trainer.curves)
