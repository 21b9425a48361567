"""Learn, paint and measure every folder in every variant."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.comparison.folders import prepare
from experiments.comparison.learning import learn_folder, learning_config
from experiments.comparison.settings import Settings, Variant, folder_seed
from imagelab.errors import FAILURES, memory_errors, sentence
from mifo.method.guidance import GuidanceConfig
from mifo.synthesis.config import Runtime, SynthesisConfig


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
    from experiments.comparison.report import Comparison, Result, write_comparison
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
            outcome = found if isinstance(found, str) else f"{time.monotonic() - started:.0f} s"
            print(f"[{number}/{len(variants)}] {variant.name}, {name}: {outcome}", flush=True)
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
