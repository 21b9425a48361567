"""What accelerate's launcher asks of mige.train: FSDP and DeepSpeed."""

import json

import pytest

from imagelab.errors import UserError
from mige.training.config import TrainingConfig
from mige.training.launcher import asked_to_shard

#: As `accelerate launch` with the release's config sets it, but for names of launching itself.
LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_CONFIG_DS_FIELDS": "gradient_clipping,zero_stage",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}
FILE = {
    "bf16": {"enabled": "auto"},
    "gradient_clipping": 0.01,
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "offload_optimizer": {"device": "none", "nvme_path": None},
    },
}


def settings(**changed):
    return TrainingConfig.from_settings(**{**TrainingConfig().settings(), **changed})


def asked(tmp_path, file=None, launcher=None, **changed):
    environment = LAUNCHED | (launcher or {})
    if file is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(file))
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    answer = asked_to_shard(settings(**changed), environment)
    assert "ACCELERATE_USE_DEEPSPEED" not in environment  # torch's processes would look for it
    return answer


def test_a_launcher_that_asks_for_nothing():
    assert asked_to_shard(settings(), {}) is False
    assert asked_to_shard(settings(), {"ACCELERATE_USE_DEEPSPEED": "false"}) is False


def test_fsdp():
    assert asked_to_shard(settings(), {"ACCELERATE_USE_FSDP": "True"}) is True


@pytest.mark.parametrize("stage, splits", [(0, False), (1, True), (2, True), (3, True)])
def test_the_stage_says_what_is_split(stage, splits, tmp_path):
    assert asked(tmp_path, {"zero_optimization": {"stage": stage}}) is splits
    assert asked(tmp_path, launcher={"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}) is splits


def test_a_stage_that_nobody_names(tmp_path):
    assert asked(tmp_path) is True  # accelerate's is 2
    assert asked(tmp_path, {"train_batch_size": 32}) is False  # DeepSpeed's is 0


def test_a_file_wins_over_the_launcher(tmp_path):
    launcher = {"ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    assert asked(tmp_path, FILE, launcher) is True


def test_auto_takes_the_launcher_s_and_else_the_command_s(tmp_path):
    auto = FILE | {"gradient_clipping": "auto", "train_batch_size": "auto"}
    assert asked(tmp_path, auto, max_grad_norm=3.0, batch_size=7) is True
    with pytest.raises(UserError, match="--max_grad_norm do not agree: 0.5 there, 0.01 here"):
        asked(tmp_path, auto, {"ACCELERATE_GRADIENT_CLIPPING": "0.5"})


@pytest.mark.parametrize(
    "change, changed, sentence",
    [
        ({"gradient_clipping": 1}, {}, "--max_grad_norm do not agree: 1 there, 0.01 here; make"),
        ({}, {"batch_size": 64}, "--batch_size do not agree: 32 there, 64 here; make them equal"),
        ({}, {"micro_batch_size": 4}, "--micro_batch_size do not agree: 8 there, 4 here"),
        ({"bf16": {"enabled": True}}, {"mixed_precision": "no"}, "asks for bf16, and --mixed_prec"),
        ({"fp16": {"enabled": True}}, {}, "asks for fp16, which overflows in T5; take it out"),
        ({"optimizer": {"type": "Adam"}}, {}, "has its own 'optimizer'; take it out, and give --l"),
        ({"scheduler": {}}, {}, "has its own 'scheduler'; take it out"),
        ({"zero_optimization": {"stage": 4}}, {}, "has a ZeRO stage of 4; give 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1.5}}, {}, "zero_optimization.stage is 1.5 and not"),
        ({"zero_optimization": {"stage": "two"}}, {}, "has 'two' in place of a number"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            {},
            "offloads to 'nvme', which training cannot do; take it out",
        ),
    ],
)
def test_what_is_refused(change, changed, sentence, tmp_path):
    assert asked(tmp_path, FILE) is True
    with pytest.raises(UserError) as told:
        asked(tmp_path, FILE | change, **changed)
    assert str(told.value).startswith(str(tmp_path / "ds.json")) and sentence in str(told.value)


def test_the_launcher_s_own_config_is_refused_likewise(tmp_path):
    with pytest.raises(UserError, match="accelerate's DeepSpeed config offloads to 'cpu'"):
        asked(tmp_path, launcher={"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no file .*none.json; give a DeepSpeed config"):
        asked(tmp_path, launcher={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "none.json")})
