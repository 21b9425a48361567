"""Learn the instances of one picture as tokens <asset0>, <asset1>, … (MIFO).

Reads {folder_path}/{instance}/img.jpg, mask0.png, mask1.png, … and writes {output_dir}/{instance}.
"""

import argparse
import sys
from dataclasses import fields, replace

from mifo.cli import HelpFormatter, add_runtime_options, chosen_seed, seed_option, told_failures
from mifo.config import LearningConfig


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    defaults = LearningConfig()
    parser = argparse.ArgumentParser(
        prog="semantic_learning.py", description=__doc__, formatter_class=HelpFormatter
    )

    def add(name: str, text: str, into=parser, **more) -> None:
        default = getattr(defaults, name)
        more.setdefault("type", type(default) if default is not None else str)
        into.add_argument(f"--{name}", default=default, help=text, **more)

    add("folder_path", "folder of the instance folders")
    add("instance", "name of the instance folder")
    add("model_path", "diffusers folder, .safetensors file, hub id, or toybox")
    add("seed", "fixes the initial tokens and every other draw; None: random", type=seed_option)
    add("output_dir", "where the learned folder goes")
    add(
        "resize",
        "keep the picture's aspect, or squash it to a square",
        choices=("aspect", "squash"),
    )

    stage = parser.add_argument_group("stage 1: the tokens")
    add("train_steps", "steps", stage)
    add("reward_steps", "first steps, with the reward in place of the penalty", stage)
    add("learning_rate", "learning rate", stage)
    add("warmup_steps", "warm-up of the learning rate", stage)
    add("attention_loss", "regularisation", stage, choices=("mifo", "break_a_scene", "none"))
    stage.add_argument(
        "--initializer_tokens",
        nargs="+",
        default=defaults.initializer_tokens,
        metavar="WORD",
        help="start the tokens from these words (one, or one an instance), not at random",
    )

    stage = parser.add_argument_group("stage 2: fine-tuning")
    add(
        "finetune", "what is trained along with the tokens", stage, choices=("lora", "full", "none")
    )
    add("finetune_steps", "steps", stage)
    add(
        "finetune_learning_rate", "learning rate; None: 1e-4 (lora), 2e-6 (full)", stage, type=float
    )
    add("lora_rank", "rank of the LoRA", stage)
    add("class_prompt", "prompt of the class images", stage)
    add("num_class_images", "how many class images are made", stage)
    add("class_images", "folder of your own class images, in place of made ones", stage)
    add("prior_weight", "weight of the class images' loss; 0: none are used", stage)
    stage.add_argument(
        "--save_pipeline", action="store_true", help="also save a whole merged diffusers pipeline"
    )

    runtime = parser.add_argument_group("running")
    add_runtime_options(runtime, defaults)
    add("weight_decay", "weight decay of AdamW", runtime)
    add("max_grad_norm", "gradient clipping", runtime)
    add("checkpoint_steps", "steps between checkpoints", runtime)
    runtime.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory, a third more time"
    )
    runtime.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    runtime.add_argument("--overwrite", action="store_true", help="replace a finished folder")
    runtime.add_argument("--dry_run", action="store_true", help="check all, print the plan, stop")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with told_failures(parser, options.debug):
        values = {f.name: getattr(options, f.name) for f in fields(LearningConfig)}
        values["initializer_tokens"] = tuple(values["initializer_tokens"])
        config = LearningConfig(**values)
        from mifo import learning

        learning.check_target(config, options.resume, options.overwrite or options.dry_run)
        if options.resume and config.seed is None:
            config = replace(config, seed=learning.saved_seed(config))
        config = replace(config, seed=chosen_seed(config.seed))
        plan = learning.make_plan(config)
        print(learning.describe(plan))
        if options.dry_run:
            return
        try:
            print(f"learned: {learning.learn(plan, options.resume)}")
        except learning.Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
