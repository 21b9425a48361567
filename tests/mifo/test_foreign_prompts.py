"""Weights of A1111 and ComfyUI, and bytes that are not UTF-8, in every prompt of every command."""

import shlex

import pytest

import mifo
import semantic_evaluation
import semantic_learning
import semantic_synthesis
from imagelab.errors import UserError
from mifo import learned
from mifo.learning import plan

BYTES = "caf\udce9"  # what Python makes of a byte that is not UTF-8
WRONG = [
    ("(<asset0>:1.3)", "weights are not supported; write '<asset0>'"),
    ("a ((red)) car", "weights are not supported; write 'red'"),
    ("a [red] car", "weights are not supported; write 'red'"),
    (
        "<lora:toy:0.7>",
        "a prompt loads no LoRA; leave it out, and give the file with --lora, its strength with "
        "--lora_scale",
    ),
    ("<asset0:1.2>", "weights are not supported; write '<asset0>'"),
    (BYTES, "is not UTF-8 text; write it in a terminal, or a script, of that encoding"),
]


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch, tmp_path):
    """No base model may be loaded, and nothing written."""

    def loaded(*args):
        raise AssertionError("the base model was loaded before the input was checked")

    for module in (plan, learned):
        monkeypatch.setattr(module, "load_base", loaded)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


def run(fails, command, options, *more) -> str:
    out, err = fails(command, [*shlex.split(options), *more])
    assert not out and len(err.splitlines()) == 1
    return err.strip().partition(": error: ")[2]


@pytest.mark.parametrize(("words", "says"), WRONG)
@pytest.mark.parametrize("option", ["--class_prompt", "--initializer_tokens"])
def test_learning(fails, examples, small_sd, option, words, says):
    options = f"--folder_path {examples} --instance toys --model_path {small_sd} --device cpu"
    for more in ([], ["--dry_run"]):
        told = run(fails, semantic_learning.main, options, option, words, *more)
        assert told.startswith(option) and told.endswith(says)


@pytest.mark.parametrize(("words", "says"), WRONG)
@pytest.mark.parametrize("command", [semantic_synthesis.main, semantic_evaluation.main])
def test_painting(fails, learned_dir, command, words, says):
    options = f"--models_dir {learned_dir} --model_id toys --device cpu"
    for option in ("--prompt", "--negative_prompt"):
        told = run(fails, command, options, option, words)
        assert told.startswith(option) and told.endswith(says)


@pytest.mark.parametrize(("words", "says"), WRONG)
def test_from_python(learned_dir, examples, words, says):
    toys = mifo.load("toys", learned_dir)
    for prompts in ({"prompt": words}, {"prompt": "<asset0>", "negative_prompt": words}):
        with pytest.raises(UserError) as error:
            toys.paint(**prompts)
        assert str(error.value).endswith(says)
    with pytest.raises(UserError) as error:
        mifo.learn(examples / "toys", class_prompt=words)
    assert str(error.value).startswith("--class_prompt") and str(error.value).endswith(says)
