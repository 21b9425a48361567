"""Learn the instances of one picture as tokens <asset0>, <asset1>, … (MIFO).

Reads {folder_path}/{instance}/img.jpg, mask0.png, mask1.png, … and writes {output_dir}/{instance}.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from imagelab.cli import (
    HelpFormatter,
    Parser,
    add_runtime_options,
    add_setting,
    random_seed_if_none,
    report_errors,
    seed_option,
)
from imagelab.errors import FAILURES, UserError, memory_errors, sentence
from mifo.learning.config import CHOICES, LearningConfig
from mifo.learning.instance import list_instances

DEFAULTS = LearningConfig()


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(prog="semantic_learning.py", description=__doc__, formatter_class=HelpFormatter)
    add = partial(add_setting, parser, DEFAULTS)
    add("folder_path", "folder of the instance folders")
    parser.add_argument(
        "--instance",
        nargs="+",
        default=[DEFAULTS.instance],
        help="names of instance folders, or all; processes share them",
    )
    parser.add_argument(
        "--mask_label",
        nargs="+",
        default=DEFAULTS.mask_label,
        metavar="LABEL",
        help="what is inside (of all masks, or of each) where masks have several labels: a number "
        "such as 1, or a colour such as '#800000'",
    )
    add("model_path", "diffusers folder, .safetensors file, hub id, or toybox")
    add("seed", "fixes the initial tokens and every other draw; None: random", type=seed_option)
    add("output_dir", "where the learned folder goes")
    add("resize", "keep the picture's aspect, or squash it to a square", choices=CHOICES["resize"])
    add_token_options(parser.add_argument_group("stage 1: the tokens"))
    add_finetuning_options(parser.add_argument_group("stage 2: fine-tuning"))
    add_running_options(parser.add_argument_group("running"))
    return parser, parser.parse_args(argv)


def add_token_options(group) -> None:
    """What stage 1 does, and the attention loss of both stages."""
    add = partial(add_setting, group, DEFAULTS)
    add("train_steps", "steps of stage 1")
    add("reward_steps", "how many of the first train_steps use the reward in place of the penalty")
    text = "learning rate of stage 1; None: the model's own, or 5e-3"
    add("learning_rate", text)
    add("warmup_steps", "steps over which the learning rate rises")
    add(
        "attention_loss",
        "mifo: the reward, then the penalty; reward: the reward in stage 1, nothing in stage 2; "
        "penalty: the penalty throughout; break_a_scene: that paper's loss throughout",
        choices=CHOICES["attention_loss"],
    )
    add("attention_weight", "factor on the weight of the attention loss, in both stages")
    group.add_argument(
        "--initializer_tokens",
        nargs="+",
        default=DEFAULTS.recipe.initializer_tokens,
        metavar="WORDS",
        help="start the tokens from these words (for all, or for each instance), such as car or "
        '"blue car" "teal car", not at random',
    )
    text = "deviation of random first tokens, over the vocabulary's; None: the model's own, or 1"
    add("initializer_scale", text)
    group.add_argument(
        "--initialize_from_class",
        action="store_true",
        help="start the tokens from the class in instance.json, not at random",
    )


def add_finetuning_options(group) -> None:
    """What stage 2 trains, and the class images."""
    add = partial(add_setting, group, DEFAULTS)
    add(
        "finetune",
        "lora: a LoRA; full: the UNet and the text encoder; none: the tokens alone",
        choices=CHOICES["finetune"],
    )
    add("finetune_steps", "steps of stage 2")
    text = "learning rate of stage 2; None: the model's own, or 1e-4 (lora), 2e-6 (full)"
    add("finetune_learning_rate", text)
    add("lora_rank", "rank of the LoRA")
    text = "prompt of the class images; None: of the class in instance.json, or of a chair"
    add("class_prompt", text)
    text = (
        "how many class images are made; runs of one --seed share them; None: the model's own, or "
        "100"
    )
    add("num_class_images", text)
    add("class_images", "folder of your own class images, in place of made ones")
    add("prior_weight", "weight of the class images' loss; 0: none are used")
    group.add_argument(
        "--save_pipeline", action="store_true", help="also save a whole merged diffusers pipeline"
    )


def add_running_options(group) -> None:
    """On what a run runs, the optimiser, checkpoints and resuming."""
    add = partial(add_setting, group, DEFAULTS)
    add_runtime_options(group, DEFAULTS.runtime)
    text = "adamw8bit: its moments in 8 bits, by bitsandbytes"
    add("optimizer", text, choices=CHOICES["optimizer"])
    add("weight_decay", "weight decay of AdamW")
    add("max_grad_norm", "largest norm of the gradient; a larger one is scaled down")
    add("checkpoint_steps", "steps between checkpoints")
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory, more time"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with an unfinished run; of several folders, with every one that is not "
        "finished",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a finished folder")
    group.add_argument(
        "--dry_run", action="store_true", help="check all, print the plan, draw the masks, stop"
    )


def learn_one(
    config: LearningConfig, options: argparse.Namespace, device: str, seed: int, resume: bool
) -> None:
    """Check one instance folder, print the plan, and carry it out unless it is a dry run.

    ``seed`` is for a config without one; an unfinished run that goes on keeps its own.
    """
    from mifo.learning.checks import check_target
    from mifo.learning.description import describe
    from mifo.learning.estimate import estimate_seconds
    from mifo.learning.overlay import write_preview
    from mifo.learning.plan import make_plan
    from mifo.learning.resume import resumed
    from mifo.learning.run import learn

    check_target(config, resume, options.overwrite or options.dry_run)
    if resume:
        config = resumed(config)
    elif config.seed is None:
        config = replace(config, seed=seed)
    plan = make_plan(config, device)
    print(describe(plan))
    if options.dry_run:
        print(f"time         about {estimate_seconds(plan) / 60:.0f} minutes (an estimate)")
        print(f"masks        {write_preview(config, plan.instance)} shows them as they were read")
    else:
        print(f"learned: {learn(plan, resume, overwrite=options.overwrite)}")


def learn_of_several(
    config: LearningConfig, options: argparse.Namespace, device: str, seed: int
) -> str:
    """Learn one of several instances; returns what became of it.

    With --resume one that is unfinished goes on, one that is learned stays (unless it was learned
    otherwise, and --overwrite is given), any other begins.
    """
    from mifo.learning.places import is_begun, is_learned
    from mifo.learning.resume import learned_otherwise

    resume = options.resume and is_begun(config)
    if options.resume and not resume and is_learned(config):
        difference = learned_otherwise(config)
        if not difference:
            return "learned already"
        if not options.overwrite:
            return f"learned already, {difference}; add --overwrite to learn it anew"
    learn_one(config, options, device, seed, resume)
    return "checked" if options.dry_run else "learned"


def learn_all(configs: list[LearningConfig], options: argparse.Namespace, processes) -> bool:
    """Learn several instances, shared over processes, and print what became of each.

    Returns whether all went well. A failure of one does not keep the others from learning.
    """
    # One seed for all, since they share class images.
    seed = processes.agree(random_seed_if_none(options.seed))
    ends, failures = {}, set()
    for config in processes.share(configs):
        try:
            with memory_errors():
                ends[config.instance] = learn_of_several(config, options, processes.device, seed)
        except FAILURES as error:
            ends[config.instance] = sentence(error)
            failures.add(config.instance)
    ends = {name: end for part in processes.gather(ends) for name, end in part.items()}
    failures = set().union(*processes.gather(failures))
    if processes.is_first:
        for config in configs:
            print(f"{config.instance}: {ends[config.instance]}", flush=True)
    return not failures


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        names = instance_names(options.folder_path, options.instance)
        settings = {name: getattr(options, name) for name in LearningConfig().settings()}
        settings["initializer_tokens"] = tuple(options.initializer_tokens)
        settings["mask_label"] = tuple(options.mask_label)
        configs = [LearningConfig.from_settings(**settings | {"instance": n}) for n in names]
        from imagelab.models.device import choose_device
        from imagelab.models.sources import choose_model
        from imagelab.processes import Processes

        processes = Processes(choose_device(options.device))
        if len(configs) == 1 and processes.count == 1:
            seed = random_seed_if_none(options.seed)
            return learn_one(configs[0], options, processes.device, seed, options.resume)
        model = choose_model(options.model_path, processes.device)
        configs = [replace(config, model_path=model) for config in configs]
        is_well = learn_all(configs, options, processes)
        processes.end(0 if is_well else 2)


def instance_names(folder_path: str, names: list[str]) -> list[str]:
    """The instances to learn; ``all`` stands for every instance folder there is."""
    if names != ["all"]:
        return list(dict.fromkeys(names))
    if found := list_instances(Path(folder_path)):
        return found
    raise UserError(f"--instance all: {folder_path} holds no instance folder; give --folder_path")
