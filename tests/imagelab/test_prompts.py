"""What a prompt may not hold: weights of other programs, and what is not UTF-8."""

import re
import time

import pytest

from imagelab.errors import UserError
from imagelab.prompts import check_prompt


def told(prompt: str) -> str:
    with pytest.raises(UserError) as error:
        check_prompt(prompt, "--prompt")
    return str(error.value)


@pytest.mark.parametrize(
    ("prompt", "written", "instead"),
    [
        ("a photo of (<asset0>:1.3) in snow", "(<asset0>:1.3)", "write '<asset0>'"),
        ("(red car:0.8), grass", "(red car:0.8)", "write 'red car'"),
        ("(red, wet car : 1.2 )", "(red, wet car : 1.2 )", "write 'red, wet car'"),
        ("(car:2)", "(car:2)", "write 'car'"),
        ("(car:.5)", "(car:.5)", "write 'car'"),
        ("(car:-1)", "(car:-1)", "write 'car'"),
        ("(car2:1.5)", "(car2:1.5)", "write 'car2'"),
        ("a (small (car:1.2))", "(car:1.2)", "write 'car'"),
        ("((car:1.2))", "(car:1.2)", "write 'car'"),
        ("a ((red)) car", "((red))", "write 'red'"),
        ("a (((red))) car", "((red))", "write 'red'"),
        ("a ((red\nold)) car", "((red\\nold))", "write 'red\\nold'"),
        ("a [red] car", "[red]", "write 'red'"),
        ("a [[red]] car", "[red]", "write 'red'"),
        ("a {red} car", "{red}", "write 'red'"),
        ("<asset0:1.2> in snow", "<asset0:1.2>", "write '<asset0>'"),
    ],
)
def test_weights_are_refused_with_what_to_write(prompt, written, instead):
    assert told(prompt) == f"--prompt writes '{written}', and weights are not supported; {instead}"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (
            "a car <lora:toy:1>",
            "'<lora:toy:1>', and a prompt loads no LoRA; leave it out, and give",
        ),
        (
            "<lora:toy:0.8:0.5>",
            "a prompt loads no LoRA; leave it out, and give the file with --lora, its strength "
            "with --lora_scale",
        ),
        ("<lyco:toy:1>", "'<lyco:toy:1>', and a prompt loads no LoRA"),
        ("<hypernet:toy:1>", "'<hypernet:toy:1>', and this is not supported; leave it out"),
        ("a [red|blue] car", "'[red|blue]', and words that change are not supported; write one"),
        ("a [red:blue:0.5] car", "'[red:blue:0.5]', and words that change are not supported"),
        ("a {red|blue} car", "'{red|blue}', and words that change are not supported; write one"),
        (
            "embedding:toy in snow",
            "'embedding:toy', and a prompt loads no file; give it with --tok",
        ),
        (r"a cat \(sitting\)", r"'\\(', and parentheses are text; write '(' without the backslash"),
        ("(" + "very " * 100 + "red:1.3)", "'(very very"),
    ],
)
def test_what_else_only_other_programs_read(prompt, says):
    message = told(prompt)
    assert says in message and len(message) < 200


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat (sitting) and a dog (asleep)",
        "(<asset0>) and <asset1>",
        "a cat (on a mat (red)), asleep",
        "a clock (12:30) at noon",
        "a clock (at 12:30)",
        "a film in (16:9), or 4:3",
        "the verse (John 3:16)",
        "a lens (50mm 1:1.8)",
        "a page (page: 7)",
        "two things: a car, and 1.3 of a dog",
        "a car (see: a dog)",
        "I am sad :((  or :[ but 3 < 4 > 2",
        "a heart <3",
        "[ unfinished ((",
        'a #1 car, 100% red & new; it\'s "mine"!',
        "日本の猫（座る）",
    ],
)
def test_what_people_write_stays_text(prompt):
    check_prompt(prompt, "--prompt")


def test_a_prompt_has_to_be_utf_8():
    """A byte that is not UTF-8 reaches a command as half a surrogate pair."""
    argument = b"a caf\xe9".decode("utf-8", "surrogateescape")
    assert told(argument) == (
        "--prompt 'a caf\\udce9' is not UTF-8 text; write it in a terminal, or a script, of that "
        "encoding"
    )
    check_prompt("a café", "--prompt")


@pytest.mark.parametrize(
    "piece",
    ["(", "((", "(:", "[", "{", "<a:", "(a:", "(a: ", "(1", "(1.", "\\", "< ", "(: 1", "(a:1"],
)
def test_a_long_prompt_is_checked_at_once(piece):
    """128 KiB are the longest argument that Linux passes; a quadratic search takes minutes."""
    start = time.process_time()
    for prompt in (piece * (131_072 // len(piece)), piece + piece[-1] * 131_072):
        with_end = re.sub(r".$", ")", prompt)
        for text in (prompt, with_end):
            try:
                check_prompt(text, "--prompt")
            except UserError as error:
                assert len(str(error)) < 250
    assert time.process_time() - start < 10
