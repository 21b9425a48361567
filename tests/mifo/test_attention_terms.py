"""Which attention loss each step of a learning run uses."""

import pytest

import semantic_learning
from mifo.learning import stages
from mifo.learning.config import Recipe


@pytest.mark.parametrize(
    ("choice", "used"),
    [
        ("mifo", ["reward", "penalty", "penalty", "penalty", "penalty"]),
        ("reward", ["reward", "reward", "reward", None, None]),
        ("penalty", ["penalty"] * 5),
    ],
)
def test_attention_loss_of_each_step(choice, used, learn_argv, tmp_path, monkeypatch):
    """Three steps of stage 1, the first of them with the reward if it is MIFO; two of stage 2."""
    seen = []
    learning_loss = stages.learning_loss

    def watched(predicted, target, maps, masks, attention_term, *weights):
        seen.append(attention_term)
        return learning_loss(predicted, target, maps, masks, attention_term, *weights)

    monkeypatch.setattr(stages, "learning_loss", watched)
    semantic_learning.main([*learn_argv, "--output_dir", str(tmp_path), "--attention_loss", choice])
    assert seen == used


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({}, {"reward": 200, "penalty": 400}, {"penalty": 400}),
        ({"train_steps": 150}, {"reward": 150}, {"penalty": 400}),
        ({"train_steps": 200, "finetune": "none"}, {"reward": 200}, {}),
        ({"train_steps": 201}, {"reward": 200, "penalty": 1}, {"penalty": 400}),
        ({"reward_steps": 0}, {"penalty": 600}, {"penalty": 400}),
        ({"train_steps": 0, "finetune_steps": 90}, {}, {"penalty": 90}),
        ({"attention_loss": "reward"}, {"reward": 600}, {None: 400}),
        ({"attention_loss": "none"}, {None: 600}, {None: 400}),
    ],
)
def test_steps_of_each_term(settings, first, second):
    found = [Recipe(**settings).attention_steps(stage) for stage in (1, 2)]
    assert found == [first, second]
    assert [list(each) for each in found] == [list(first), list(second)]  # in this order


@pytest.mark.parametrize(
    ("options", "line", "told"),
    [
        ("--train_steps 600 --reward_steps 200",
         "mifo; stage 1: reward 200, then penalty 400; stage 2: penalty 2", ""),
        ("--train_steps 150 --reward_steps 200",
         "mifo; stage 1: reward 150; stage 2: penalty 2",
         "in all of its 150 steps, and in none the penalty, which is meant to keep the instances "
         "apart: give --reward_steps 50 (by default it is 200 of 600)"),
        ("--train_steps 2 --reward_steps 2 --finetune none", "mifo; stage 1: reward 2",
         "give --reward_steps 0 ("),
        ("--train_steps 0 --reward_steps 200", "mifo; stage 2: penalty 2", ""),
        ("--train_steps 9 --reward_steps 9 --attention_loss reward",
         "reward; stage 1: reward 9; stage 2: none 2", ""),
        ("--train_steps 9 --reward_steps 9 --attention_loss break_a_scene",
         "break_a_scene; stage 1: break_a_scene 9; stage 2: break_a_scene 2", ""),
        ("--train_steps 9 --reward_steps 9 --attention_loss none", "none", ""),
    ],
)  # fmt: skip
def test_the_plan_says_which_steps_have_which_term(
    options, line, told, learn_argv, tmp_path, capsys, caplog
):
    """And warns where stage 1 of MIFO has no penalty at all."""
    argv = [*learn_argv, "--output_dir", str(tmp_path), *options.split(), "--dry_run"]
    semantic_learning.main(argv)
    assert f"attention    {line}" in capsys.readouterr().out.splitlines()
    warned = [each for each in caplog.messages if "--reward_steps" in each]
    assert len(warned) == bool(told) and told in "".join(warned)
