"""Train MIGE on records in the release's format: accelerate launch -m mige.train.

    python -m mige.features --data D.json --root DIR --model M --output F
    accelerate launch -m mige.train --data D.json --root DIR --features F --model M --output O

Everything is checked before any weights are loaded; --dry_run ends there, and says how much memory
training takes. Ctrl-C saves, and --resume goes on from there. The trained model is O/model.
"""

import argparse
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, add_setting, report_errors, seed_option
from imagelab.models.device import PRECISIONS
from mige.training.config import OPTIMIZERS, PARTS, TrainingConfig

FILES = {
    "data": "JSON list of records; docs/mige_training.md has the format",
    "features": "folder that mige.features wrote, or the release's own features",
    "model": "model folder to begin with; docs/mige_training.md says how to make one",
    "output": "folder for checkpoint, curves, samples and the trained model",
}
#: Help of the method's numbers, in order.
RECIPE = {
    "batch_size": "samples of an update, over all processes",
    "epochs": "times that all records are seen",
    "steps": "updates, in place of --epochs",
    "learning_rate": "after the warm-up; None: the release's 3.54e-6, 1e-5 with "
    "--scale_rate, or 1e-4 for a LoRA",
    "conditioning_rate": "of all but the transformer; None: --learning_rate",
    "cooldown": "last share of the steps, in which the rates fall to 0 as a cosine",
    "timestep_shift": "above 1: noisier timesteps are drawn more often; 1: all alike",
    "weight_decay": "of every weight",
    "warmup_steps": "updates in which the rate rises",
    "max_grad_norm": "gradients of a larger norm are scaled down to it",
    "lora_rank": "rank of a LoRA of transformer and text encoder; 0: they train whole",
    "ema": "decay of an average of the weights, which is then the result; 0: none",
    "dropout": "within Q-Former and text encoder; None: as the model's configs say",
}
RUNNING = {
    "micro_batch_size": "samples that a process computes at a time",
    "device": "auto (cuda > mps > cpu), cuda, mps or cpu",
    "checkpoint_steps": "updates between two checkpoints",
    "sample_steps": "updates between two sheets of samples; 0: none",
    "sample_items": "records of each task on a sheet",
    "probe_steps": "updates between two looks at what pictures and words do; 0: none",
    "workers": "processes that read ahead, for each process that learns",
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    defaults = TrainingConfig()
    parser = Parser(prog="python -m mige.train", description=__doc__, formatter_class=HelpFormatter)
    for name, text in FILES.items():
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--root", help="where the list's paths start; None: the list's folder")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    parser.add_argument("--dry_run", action="store_true", help="check all, tell the plan, and end")
    add_setting(parser, defaults, "seed", "fixes order, noise and dropout", type=seed_option)
    group = parser.add_argument_group("the method")
    for name, text in RECIPE.items():
        add_setting(group, defaults, name, text)
    add_setting(
        group,
        defaults,
        "optimizer",
        choices=OPTIMIZERS,
        text="muon: of the matrices of the transformer's blocks; AdamW of all else",
    )
    group.add_argument(
        "--scale_rate",
        action="store_true",
        help="multiply the rate by sqrt(batch_size / 256), as the release does",
    )
    group.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
        help=f"what learns, of {', '.join(PARTS)}",
    )  # fmt: skip
    group = parser.add_argument_group("running")
    for name, text in RUNNING.items():
        add_setting(group, defaults, name, text)
    group.add_argument(
        "--gradient_checkpointing", action="store_true",
        help="compute activations twice, to save memory",
    )  # fmt: skip
    group.add_argument(
        "--shard", action="store_true",
        help="split weights, gradients and moments over the processes (FSDP)",
    )  # fmt: skip
    group.add_argument(
        "--mixed_precision", default=defaults.running.mixed_precision, choices=PRECISIONS,
        help="of the computation: bf16 or no; auto: bf16 where the hardware has it",
    )  # fmt: skip
    group.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        from imagelab.models.device import choose_device
        from imagelab.processes import Processes
        from mige.training.launcher import asked_to_shard
        from mige.training.memory import estimate
        from mige.training.plan import check_output, check_same, make_plan
        from mige.training.run import train

        names = TrainingConfig().settings()
        settings = {name: getattr(options, name) for name in names}
        if settings["root"] is None:
            settings["root"] = str(Path(options.data).parent)
        settings["shard"] |= asked_to_shard(TrainingConfig.from_settings(**settings))
        config = TrainingConfig.from_settings(**settings)
        processes = Processes(choose_device(config.running.device))
        check_output(config, options.resume, options.overwrite)
        plan = make_plan(config, processes)
        if options.resume:
            check_same(config, plan.inputs)
        if processes.is_first:
            print(describe(plan), flush=True)
            numbers = estimate(plan.folder, config, processes.count, plan.dtype, plan.device)
            print(numbers, flush=True)
        if not options.dry_run:
            folder = train(plan, options.resume, options.overwrite)
            if processes.is_first:
                print(folder)
        processes.end()


def describe(plan) -> str:
    """The plan of a training, in a few lines."""
    recipe, seen = plan.config.recipe, plan.steps * plan.config.recipe.batch_size
    epochs = seen / len(plan.which)
    precision = str(plan.dtype).removeprefix("torch.")
    left_out = len(plan.records) - len(plan.which)
    rate = f"rate {recipe.rate:.3g} after {recipe.warmup_steps:,} steps"
    if plan.steps <= recipe.warmup_steps:
        reached = recipe.rate * recipe.factor(plan.steps - 1, plan.steps)
        rate += f", of which it comes to {reached:.3g}: give fewer --warmup_steps"
    lines = [
        f"{len(plan.which):,} records" + (f", {left_out:,} are too wide" if left_out else ""),
        f"{plan.steps:,} steps of {recipe.batch_size} samples ({epochs:.3g} epochs), {rate}",
        f"seed {plan.config.seed}, {plan.processes.count} × {plan.device} in {precision}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
