"""Which attention loss each step of a learning run uses."""

import pytest

import semantic_learning
from mifo.learning import stages


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
