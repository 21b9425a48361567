"""What accelerate's launcher asks for: FSDP, or DeepSpeed's ZeRO; torch's FSDP carries out both.

Of a config of DeepSpeed its ZeRO stage is taken over: stages 1 to 3 split what they split, and the
rest as well, which changes memory and no number. What else would change a number is an option of
the command, and has to be the same in both.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

from imagelab.errors import UserError
from imagelab.io.tensors import misfit, read_json
from mige.training.config import TrainingConfig

ADVICE = "give a DeepSpeed config as accelerate takes it"
LAUNCHER_STAGE = 2  # accelerate's, where neither its config nor a file names one
ENVIRONMENT = {  # accelerate's names of what its own config says
    "stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
NUMBER, WHOLE, FLAG = (float, str, None), (int, str, None), (bool, str, None)


def asked_to_shard(
    config: TrainingConfig, environment: MutableMapping[str, str] = os.environ
) -> bool:
    """Whether accelerate's launcher splits the weights over its processes.

    Takes DeepSpeed out of the environment, so that torch's own processes find each other.

    Raises:
        UserError: the launcher's DeepSpeed config does not fit the command's options, or asks for
            what training cannot do.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    stage = read_deepspeed(config, environment)
    del environment["ACCELERATE_USE_DEEPSPEED"]
    return stage > 0


def read_deepspeed(config: TrainingConfig, environment: MutableMapping[str, str]) -> int:
    """The ZeRO stage of the DeepSpeed config of accelerate's launcher: 0 to 3.

    A file's values win over those of the launcher, as in accelerate; "auto" fits all.
    """
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    file = {} if path == "none" else read_json(Path(path), {}, ADVICE)
    if path == "none":
        path = "accelerate's DeepSpeed config"

    def value(where: str, form: object, ours: str | None = None):
        """A value of the file, by its keys; or else the launcher's; None for "auto"."""
        found: object = file
        for key in where.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if wrong := misfit(found, form, where):
            raise UserError(f"{path}: {wrong}; {ADVICE}")
        if found in (None, "auto"):
            found = environment.get(ENVIRONMENT[ours]) if ours else None
        return None if found in (None, "auto", "none", "None") else found

    for part in ("optimizer", "scheduler"):
        if part in file:
            raise UserError(
                f"{path} has its own {part!r}; take it out, and give --learning_rate, "
                "--weight_decay and --warmup_steps"
            )
    for part in ("optimizer", "param"):
        device = value(f"zero_optimization.offload_{part}.device", (str, None), part)
        if device:
            raise UserError(
                f"{path} offloads to {device!r}, which training cannot do; take it out: "
                "--gradient_checkpointing and --lora_rank save memory"
            )
    if value("fp16.enabled", FLAG) is True:
        raise UserError(f"{path} asks for fp16, which overflows in T5; take it out")
    if value("bf16.enabled", FLAG) is True and config.running.mixed_precision == "no":
        raise UserError(f"{path} asks for bf16, and --mixed_precision is no; make them equal")
    pairs = {
        "max_grad_norm": value("gradient_clipping", NUMBER, "clipping"),
        "batch_size": value("train_batch_size", WHOLE),
        "micro_batch_size": value("train_micro_batch_size_per_gpu", WHOLE),
    }
    settings = config.settings()
    for name, theirs in pairs.items():
        if theirs is not None and _number(theirs, path) != settings[name]:
            raise UserError(
                f"{path} and --{name} do not agree: {theirs} there, {settings[name]} here; make "
                "them equal"
            )
    unset = 0 if file else LAUNCHER_STAGE  # 0: DeepSpeed's own
    stage = value("zero_optimization.stage", WHOLE, "stage")
    stage = unset if stage is None else _number(stage, path)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path} has a ZeRO stage of {stage:g}; give 0, 1, 2 or 3")
    return int(stage)


def _number(text: str | float, path: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{path} has {text!r} in place of a number; {ADVICE}") from error
