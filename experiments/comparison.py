"""The paper's comparison on toybox: MIFO against other losses, ranks and ways of painting.

Makes instance folders of look-alikes from a seed, learns each of them in every variant, paints it
with fixed seeds and measures the pictures as semantic_evaluation.py does. Writes comparison.md,
comparison.json, sheet.png and confusion.png into {work}, anew after each variant. The same command
goes on where it was stopped. Processes share the folders:

    torchrun --nproc_per_node 2 -m experiments.comparison            # about 70 minutes on two cores
    torchrun --nproc_per_node 2 -m experiments.comparison --short    # ten minutes
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

from experiments.comparison_settings import (
    FREE_SETTINGS,
    HELP,
    LONG,
    SHORT,
    SHORT_VARIANTS,
    STAGE_2_SETTINGS,
    VARIANTS,
    WORDS,
    Settings,
    Variant,
)
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import FAILURES, UserError, memory_errors, sentence
from imagelab.io.atomic import write_json
from mifo.learning.config import LearningConfig
from mifo.method.guidance import GuidanceConfig
from mifo.synthesis.config import Runtime, SynthesisConfig

# ----------------------------------------------------------------------------------------------
# instance folders


def folder_name(index: int) -> str:
    """Such as kind2_000: look-alikes of one kind, two of them."""
    alike, count = _sort(index)
    return f"{alike}{count}_{index:03d}"


def _sort(index: int) -> tuple[str, int]:
    """What a folder's toys share, and how many they are; all four sorts in four folders.

    In this order the work of two processes is alike.
    """
    return (("kind", 2), ("kind", 3), ("hue", 3), ("hue", 2))[index % 4]


def folder_seed(seed: int, name: str) -> int:
    """A folder's own seed, so that folders are independent draws."""
    return seed + 1000 * int(name.rpartition("_")[2])


def make_folder(folder: Path, seed: int, index: int, kinds: Sequence[str]) -> None:
    """Write instance folder ``index``, unless it is there.

    Raises UserError for one that is there and shows other toys.
    """
    import numpy as np

    from toybox.scenes.instances import look_alikes, read_looks, with_looks, write_folder
    from toybox.scenes.scenes import draw_scene

    alike, count = _sort(index)
    rng = np.random.default_rng((seed, index))
    looks = look_alikes(rng, count, alike, kinds)
    if not (folder / "instance.json").is_file():  # which is written last
        scene = with_looks(draw_scene(rng, count), looks)
        write_folder(folder, scene, seed, overwrite=True)
    elif read_looks(folder) != list(looks):
        raise UserError(f"{folder} holds other toys than --seed {seed} makes; give another --work")


def prepare(work: Path, settings: Settings) -> list[str]:
    """Check that ``work`` is this comparison's, and make its instance folders; their names."""
    from imagelab.io.folders import check_writable
    from imagelab.models.sources import check_folder, locate_model, model_digest
    from mifo.learning.plan import check_settings
    from toybox.stable_diffusion.architecture import trained_kinds

    check_writable(work, "work")
    model = locate_model(settings.model_path, offline=True)
    kinds = trained_kinds(model)
    now = {k: v for k, v in asdict(settings).items() if k not in FREE_SETTINGS}
    now["base model"] = model_digest(check_folder(model))[:12]
    path = work / "settings.json"
    then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    if differ := ", ".join(f"{key} {then.get(key)}" for key in now if then.get(key) != now[key]):
        raise UserError(
            f"{work} holds a comparison with other settings ({differ}); go on with those, or give "
            "another --work"
        )
    names = [folder_name(index) for index in range(settings.folders)]
    for index, name in enumerate(names):
        make_folder(work / "folders" / name, settings.seed, index, kinds)
    check_settings(learning_config(work, settings, VARIANTS["mifo"], names[0]))
    if not path.is_file():
        write_json(path, now)
    return names


# ----------------------------------------------------------------------------------------------
# learning


def learning_config(work: Path, settings: Settings, variant: Variant, name: str) -> LearningConfig:
    """Tokens start from what a person would call the toys; the class images show their kinds."""
    from toybox.scenes.instances import read_looks

    looks = read_looks(work / "folders" / name)
    kinds = [look.kind.replace("_", " ") for look in looks]
    words = kinds
    if settings.words == "phrase":
        words = [f"{look.nearest_colour} {kind}" for look, kind in zip(looks, kinds, strict=True)]
    shown = " and ".join(f"{'an' if k[0] in 'aeiou' else 'a'} {k}" for k in sorted(set(kinds)))
    full = variant.learning.get("finetune") == "full"
    shared = LearningConfig(
        instance=name,
        folder_path=str(work / "folders"),
        model_path=settings.model_path,
        output_dir=str(work / "learned" / variant.learned),
        seed=folder_seed(settings.seed, name),
        train_steps=settings.train_steps,
        reward_steps=settings.train_steps // 3,
        learning_rate=settings.learning_rate,
        finetune_steps=settings.finetune_steps,
        finetune_learning_rate=settings.full_learning_rate if full else settings.lora_learning_rate,
        class_prompt=f"a photo of {shown}",
        num_class_images=settings.num_class_images,
        initializer_tokens=tuple(words),
        mixed_precision=settings.mixed_precision,
    )
    return replace(shared, **variant.learning)


def learn_folder(work: Path, config: LearningConfig, device: str) -> None:
    """Learn an instance folder, going on from what an earlier run left; nothing if it is learned.

    Stage 1 is kept: the next learning with the same stage 1 starts behind it, and ends as if it
    had gone through it.
    """
    from imagelab.training.checkpoint import read_checkpoint, write_checkpoint
    from mifo.learning.places import CHECKPOINT, is_learned
    from mifo.learning.plan import kept_settings, make_plan
    from mifo.learning.run import learn

    if is_learned(config):
        return
    plan = make_plan(config, device)
    checkpoint, kept = plan.work / CHECKPOINT, work / "stage1" / stage_1_name(plan)
    if kept.is_file() and not checkpoint.is_file():
        saved = read_checkpoint(kept)
        saved.facts["settings"] = kept_settings(config)
        plan.work.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, saved)

    def keep(stage: int, path: Path) -> None:
        if stage == 1 and not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(kept, read_checkpoint(path))

    share_class_images(work / "learned", Path(config.output_dir))
    learn(plan, checkpoint.is_file(), keep)


def stage_1_name(plan) -> str:
    """A file name that is the same for plans whose stage 1 is the same."""
    import torch

    from mifo.learning.plan import kept_settings

    config = plan.config
    settings = {k: v for k, v in kept_settings(config).items() if k not in STAGE_2_SETTINGS}
    autocast = config.finetune == "full" and plan.dtype != torch.float32
    facts = json.dumps([settings, str(plan.dtype), autocast], sort_keys=True)
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
            shutil.copy(path, target)


# ----------------------------------------------------------------------------------------------
# painting and measuring


def make_case(work: Path, settings: Settings, variant: Variant, name: str):
    """What is painted of a learned folder: all its assets, in the boxes of the presets."""
    from mifo.evaluation import plan_cases
    from mifo.synthesis.layouts import preset_boxes

    config = SynthesisConfig(
        models_dir=str(work / "learned" / variant.learned),
        num_images=settings.seeds,
        seed=folder_seed(settings.seed, name),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        box_control=variant.painting.get("box_control", True),
        guidance=GuidanceConfig(
            guidance_steps=settings.guidance_steps,
            guidance_iterations=settings.guidance_iterations,
            step_size=settings.step_size,
            final_step_size=settings.final_step_size,
            refine_every=variant.painting.get("refine_every", GuidanceConfig().refine_every),
        ),
        runtime=Runtime(batch_size=settings.batch_size, mixed_precision=settings.mixed_precision),
    )
    return plan_cases(config, [name], [], str(work / "folders"), preset_boxes)[0]


def compare(settings: Settings, variants: Sequence[Variant], work: Path, processes):
    """Learn, paint and measure everything that is not there yet.

    Returns sentences about what failed, by "variant, folder".
    """
    from experiments.comparison_report import Comparison, Result, write_comparison
    from imagelab.evaluation.features import load_features
    from mifo.evaluation import evaluate

    with processes.first_alone():
        names = prepare(work, settings)
    spaces = [load_features("toybox")]

    def result_of(variant: Variant, name: str) -> Result | str:
        try:
            learn_folder(work, learning_config(work, settings, variant, name), processes.device)
            case = make_case(work, settings, variant, name)
            output = work / "evaluation" / variant.name / name
            with memory_errors():
                [records] = evaluate([case], spaces, output, processes.device)
            return Result(records, case.learned.manifest["separation"])
        except FAILURES as error:
            return sentence(error)

    results: dict[str, dict[str, Result]] = {}
    failures: dict[str, str] = {}
    for number, variant in enumerate(variants, 1):
        mine = {}
        for name in processes.share(names):
            started = time.monotonic()
            found = mine[name] = result_of(variant, name)
            told = found if isinstance(found, str) else f"{time.monotonic() - started:.0f} s"
            print(f"[{number}/{len(variants)}] {variant.name}, {name}: {told}", flush=True)
        everyone = {k: v for part in processes.gather(mine) for k, v in part.items()}
        for name in names:
            if isinstance(everyone[name], str):
                failures[f"{variant.name}, {name}"] = everyone[name]
            else:
                results.setdefault(variant.name, {})[name] = everyone[name]
        if processes.is_first:
            drawn = next((row for row in variants if row.name in results), variant)
            found = Comparison(settings, variants, results, failures)
            write_comparison(found, work, partial(make_case, work, settings, drawn))
    return failures


# ----------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.comparison", description=__doc__, formatter_class=HelpFormatter
    )
    unset = argparse.SUPPRESS
    parser.add_argument(
        "--work",
        type=Path,
        default=unset,
        help="where everything goes (default: comparison, with --short comparison_short)",
    )
    parser.add_argument("--short", action="store_true", help="a small comparison in minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=unset,
        metavar="VARIANT",
        help=f"some of {', '.join(VARIANTS)} (default: all, with --short "
        f"{', '.join(SHORT_VARIANTS)})",
    )
    for one in fields(Settings):
        long, short = getattr(LONG, one.name), getattr(SHORT, one.name)
        shown = f"{long}" if short == long else f"{long}, with --short {short}"
        text = f"{HELP[one.name]} (default: {shown})"
        choices = WORDS if one.name == "words" else None
        parser.add_argument(
            f"--{one.name}", type=type(long), choices=choices, default=unset, help=text
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> tuple[Settings, list[Variant], Path]:
    """What the options ask for; a UserError for what makes no sense."""
    given = vars(options)
    names = {one.name for one in fields(Settings)} & given.keys()
    settings = replace(SHORT if options.short else LONG, **{name: given[name] for name in names})
    if settings.folders < 1 or settings.seeds < 1:
        name = "folders" if settings.folders < 1 else "seeds"
        raise UserError(f"--{name} is {getattr(settings, name)}; give a whole number from 1 on")
    wanted = given.get("only", SHORT_VARIANTS if options.short else VARIANTS)
    work = given.get("work", Path("comparison_short" if options.short else "comparison"))
    return settings, [VARIANTS[name] for name in VARIANTS if name in wanted], work


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        settings, variants, work = chosen(options)
        from imagelab.models.device import choose_device
        from imagelab.processes import Processes

        processes = Processes(choose_device(settings.device))
        try:
            failures = compare(settings, variants, work, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        if processes.is_first:
            print((work / "comparison.md").read_text(encoding="utf-8"))
        processes.leave()  # the table comes before the launcher hears of a failure
        if failures:
            sys.exit(2)


if __name__ == "__main__":
    main()
