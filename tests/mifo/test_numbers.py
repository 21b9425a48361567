"""Numbers out of all bounds, and long values: one short sentence, before a model is loaded."""

import re
import shlex

import pytest

import mifo
import semantic_evaluation
import semantic_learning
import semantic_synthesis
import visual_box_mask
from imagelab.errors import UserError
from mifo import learned
from mifo.bounds import BOUNDS, check_bounds
from mifo.cli import learning, synthesis
from mifo.learning import plan
from mifo.learning.config import LearningConfig
from mifo.synthesis.config import SynthesisConfig

HUGE = "1" + "0" * 400
DIGITS = "a number of about 400 digits"


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


@pytest.fixture
def told(fails, examples, small_sd, learned_dir):
    """What a command says of more options: one line, without its name."""
    learn = f"--folder_path {examples} --instance toys --model_path {small_sd} --seed 1"
    paint = f"--models_dir {learned_dir} --model_id toys --prompt '<asset0> and <asset1>' --seed 1"
    commands = {
        "learn": (semantic_learning.main, learn + " --device cpu"),
        "plan": (semantic_learning.main, learn + " --device cpu --dry_run"),
        "paint": (semantic_synthesis.main, paint + " --device cpu"),
        "measure": (semantic_evaluation.main, paint + " --device cpu"),
        "draw": (visual_box_mask.main, ""),
    }

    def run(name, *more):
        command, options = commands[name]
        out, err = fails(command, [*shlex.split(options), *more])
        assert not out and len(err.splitlines()) == 1
        return err.strip().partition(": error: ")[2]

    return run


@pytest.mark.parametrize("command", ["learn", "plan"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (f"--lora_rank {10**30}", f"--lora_rank is {10**30}; give a whole number from 1 to 1024"),
        (f"--train_steps {HUGE}", f"--train_steps is {DIGITS}; give a whole number from 0 to 1000"),
        ("--num_class_images 1000000000", "--num_class_images is 1000000000; give a whole number"),
        ("--checkpoint_steps 0", "--checkpoint_steps is 0; give a whole number from 1 to 1000000"),
        ("--warmup_steps -1", "--warmup_steps is -1; give a whole number from 0 to 1000000"),
        ("--learning_rate 1e300", "--learning_rate is 1e+300; give a number from 0 to 1"),
        (f"--learning_rate {HUGE}", "--learning_rate is inf; give a number from 0 to 1"),
        ("--finetune_learning_rate 1.5", "--finetune_learning_rate is 1.5; give a number from 0"),
        ("--weight_decay nan", "--weight_decay is nan; give a number from 0 to 1000000"),
        ("--prior_weight=-1e-9", "--prior_weight is -1e-09; give a number from 0 to 1000000"),
        ("--attention_weight 2e6", "--attention_weight is 2000000.0; give a number from 0 to 1000"),
        ("--max_grad_norm 1e300", "--max_grad_norm is 1e+300; give a number from 0 to 1000000000"),
        ("--seed -1", "the seed is -1; give a whole number from 0 to 2**63 - 1"),
        (f"--seed {2**63}", f"the seed is {2**63}; give a whole number from 0 to 2**63 - 1"),
        (f"--seed {HUGE}", f"the seed is {DIGITS}; give a whole number from 0 to 2**63 - 1"),
    ],
)
def test_numbers_of_learning(told, command, options, says):
    assert told(command, *options.split()).startswith(says)


@pytest.mark.parametrize("command", ["paint", "measure"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--num_images 1000000000", "--num_images is 1000000000; give a whole number from 1 to 1"),
        (
            f"--num_images {HUGE}",
            f"--num_images is {DIGITS}; give a whole number from 1 to 1000000",
        ),
        (
            f"--batch_size {10**30}",
            f"--batch_size is {10**30}; give a whole number from 1 to 10000",
        ),
        (f"--num_inference_steps {HUGE}", f"--num_inference_steps is {DIGITS}; give a whole"),
        (f"--guidance_steps {HUGE}", f"--guidance_steps is {DIGITS}; give a whole number from 0"),
        (f"--refine_every {10**9}", "--refine_every is 1000000000; give a whole number from 0 to"),
        ("--guidance_scale 1e300", "--guidance_scale is 1e+300; give a number from 0 to 1000000"),
        ("--step_size 1e300", "--step_size is 1e+300; give a number from 0 to 1000000"),
        ("--step_scale nan", "--step_scale is nan; give a number from 0 to 1000000"),
        ("--seed -1", "the seed is -1; give a whole number from 0 to 2**63 - 1"),
        (f"--seed {2**63}", f"the seed is {2**63}; give a whole number from 0 to 2**63 - 1"),
        ("--seed one", "argument --seed: 'one' is no seed; give a whole number or None"),
    ],
)
def test_numbers_of_painting(told, command, options, says):
    assert told(command, *options.split()).startswith(says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        # With boxes in pixels of a size that no float can hold.
        (
            f"--width {HUGE} --height 128 --box <asset0>=0,0,64,64px",
            f"--width is {DIGITS}; give a whole number from 1 to 16384",
        ),
        ("--height 0", "--height is 0; give a whole number from 1 to 16384"),
        ("--width 100", "--width is 100; give a multiple of 64 from 128 to 512, such as 128"),
        ("--height 576", "--height is 576; give a multiple of 64 from 128 to 512, such as 128"),
    ],
)
def test_sizes(told, options, says):
    assert told("paint", *options.split()).startswith(says)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[[" + "9" * 5000 + "]]",
        f"[[{HUGE}]]",
        "[[1001]]",
        "[[-1]]",
        "[" + ",".join(["[1]"] * 1001) + "]",
        "[[" + ",".join(["1"] * 1001) + "]]",
    ],
)
def test_absurd_token_indices(told, text):
    says = told("paint", "--subject_token_indices", text)
    assert re.fullmatch(
        r"argument --subject_token_indices: '\[.{1,59}' (is no list of lists of positions|holds a "
        r"position that no prompt has, or too many); write it as \[\[4\]\] or \[\[4\],\[6\]\]",
        says,
    )


def test_from_python_the_bounds_are_the_same(learned_dir, examples):
    toys = mifo.load("toys", learned_dir)
    pixels = [[0, 0, 64, "64px"]]
    with pytest.raises(
        UserError, match=f"--width is {DIGITS}; give a whole number from 1 to 16384"
    ):
        toys.paint("<asset0>", pixels, width=10**400, height=128, seed=1)
    with pytest.raises(UserError, match="--num_images is 0; give a whole number from 1"):
        toys.paint("<asset0>", num_images=0)
    with pytest.raises(UserError, match=f"^guidance_scale is {DIGITS}; give a smaller number"):
        toys.paint("<asset0>", guidance_scale=10**400)
    with pytest.raises(UserError, match="--lora_rank is a number of about 5000 digits; give"):
        mifo.learn(examples / "toys", lora_rank=10**5000)
    with pytest.raises(UserError, match="^prompt is 'x{40,58}…; give a text|^prompt is"):
        toys.paint(10**5000)


def test_every_number_among_the_settings_has_bounds_that_hold_its_default():
    for config in (LearningConfig(), SynthesisConfig()):
        settings, kinds = config.settings(), config.open_kinds()
        check_bounds(settings)
        for name, value in settings.items():
            kind = kinds.get(name, type(value))
            if kind in (int, float) and name != "seed":
                assert {type(bound) for bound in BOUNDS[name]} == {kind}, name


def test_what_is_at_a_bound_is_in_it_and_what_is_open_is_too():
    check_bounds({"lora_rank": 1024, "learning_rate": 1.0, "num_images": None, "prompt": "x"})
    check_bounds({"lora_rank": 1, "learning_rate": 0.0, "train_steps": 0})
    for name, value in (("lora_rank", 1025), ("lora_rank", 0), ("learning_rate", 1.0001)):
        with pytest.raises(UserError, match=f"--{name} is"):
            check_bounds({name: value})


# ----------------------------------------------------------------------------------------------
# seeds of an evaluation


def test_an_evaluation_without_a_seed_draws_one_and_tells_it(learned_dir, monkeypatch, capsys):
    seeds = []
    monkeypatch.setattr("mifo.evaluation.choose_spaces", lambda *_: [])
    monkeypatch.setattr("mifo.evaluation.evaluate", lambda cases, *_: seeds.append(cases[0].seeds))
    monkeypatch.setattr("imagelab.evaluation.report.write_report", lambda *_: "done")
    options = (
        f"--models_dir {learned_dir} --model_id toys --num_images 3 --device cpu --seed".split()
    )
    for text in ("None", "none", "7"):
        semantic_evaluation.main([*options, text])
    (first, *more), other, given = seeds
    assert more == [first + 1, first + 2] and given == (7, 8, 9)
    assert first != other[0]  # of 2**31
    assert capsys.readouterr().out.split() == (
        f"seed {first} done seed {other[0]} done done".split()
    )


# ----------------------------------------------------------------------------------------------
# long values

CASES = [
    (
        command,
        action.option_strings[0],
        "9" * 5000 if action.type in (int, float) else "a word " * 700,
    )
    for command, parser in (
        ("plan", learning.parse_args([])[0]),
        ("paint", synthesis.parse_args([])[0]),
    )
    for action in parser._actions
    if action.nargs != 0 and action.dest != "help"
    # A model's tokenizer tells that these are too long.
    if action.dest not in ("initializer_tokens", "class_prompt", "negative_prompt")
]


@pytest.mark.parametrize(("command", "option", "value"), CASES, ids=lambda text: text[:20])
def test_no_message_shows_a_long_value_whole(told, command, option, value):
    says = told(command, option, value)
    assert 20 < len(says) < 450, says


@pytest.mark.parametrize("command", ["learn", "paint"])
def test_a_long_value_is_short_however_it_is_given(told, command):
    for options in (["--model_id=" + "x/" * 3000], ["--device", "é'\n" * 3000], ["y " * 3000]):
        if command == "learn":
            options = [options[0].replace("model_id", "instance"), *options[1:]]
        says = told(command, *options)
        assert "…" in says and len(says) < 450, says
