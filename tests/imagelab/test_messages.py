"""What a message shows of a user's value, and how an error ends a command."""

import errno

import pytest

from imagelab.cli import Parser, report_errors, seed_option
from imagelab.errors import UserError, cut, sentence, shorten, shown


def test_shortened_texts():
    assert shorten("a" * 60) == "a" * 60
    assert shorten("a" * 59 + "bc") == "a" * 59 + "…"
    assert shorten("abcdef", 4) == "abc…"
    assert cut("a" * 200) == "a" * 200
    assert cut("a" * 149 + "?" * 100 + "b" * 50) == "a" * 149 + "…" + "b" * 50


def test_values_are_shown_and_huge_numbers_by_their_length():
    assert [shown(value) for value in (7, -7, 1.5, True, "x" * 61)] == [
        "7", "-7", "1.5", "True", "x" * 59 + "…",
    ]  # fmt: skip
    assert shown(10**30) == "1" + 30 * "0"
    assert shown(10**400) == shown(-(10**400)) == "a number of about 400 digits"
    assert shown(10**5000) == "a number of about 5000 digits"  # which Python does not print


def test_a_sentence_has_no_long_word():
    path = "/" + "a" * 500
    assert sentence(UserError(f"{path} is no picture; give another")) == (
        "/" + "a" * 148 + "…" + "a" * 50 + " is no picture; give another"
    )
    assert sentence(OSError(36, "File name too long", path)).startswith("/aaa")
    assert "a" * 200 not in sentence(OSError(36, "File name too long", path))
    assert sentence(UserError("x" * 200)) == "x" * 200


@pytest.mark.parametrize(
    "argv",
    [
        ["--count", "7 " * 3000],
        ["--count=" + "7 " * 3000],
        ["--word", "two  words\n'" * 900],
        ["--word=" + "two  words\n'" * 900],
        ["--word", "a", "one more " * 900],
        ["--word", "x/ " * 900],
    ],
)
def test_a_command_shows_200_characters_of_a_value(argv, capsys):
    """Whether argparse refuses it, or the command, which may write it on one line."""
    parser = Parser(prog="some.py")
    parser.add_argument("--count", type=int)
    parser.add_argument("--word", default="")
    with pytest.raises(SystemExit) as stop:
        options = parser.parse_args(argv)
        with report_errors(parser):
            raise UserError(f"--word is {options.word}; give another")
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith("some.py: error: ") and len(told.splitlines()) == 1
    assert "…" in told and len(told) < 300


def test_a_short_value_is_shown_whole(capsys):
    parser = Parser(prog="some.py")
    parser.add_argument("--count", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", "1 " * 90])
    value = repr("1 " * 90)
    assert capsys.readouterr().err == (
        f"some.py: error: argument --count: invalid int value: {value}\n"
    )


def test_two_dashes_are_no_value(capsys):
    """Of which argparse would make an empty list, whatever the option's type."""
    parser = Parser(prog="some.py")
    parser.add_argument("--word", default="")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--word=--"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "some.py: error: argument --word: '--' is no value\n"
    assert parser.parse_args(["--word=-"]).word == "-"


def test_a_seed_may_be_left_to_chance():
    assert [seed_option(text) for text in ("None", "none", "7", "-1")] == [None, None, 7, -1]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOENT, "No such file", "out/.toys.0123456789ab.new/x.safetensors"),
            "out/toys: No such file; give another path",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "out/.0001.png.0123456789ab.part/content"),
            "out/0001.png: Permission denied; give another path or change its permissions",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "out/.hidden"),
            "out/.hidden: Permission denied; give another path or change its permissions",
        ),
    ],
)
def test_what_is_written_is_told_by_its_own_name(error, told):
    assert sentence(error) == told


def test_what_takes_less_memory_is_not_promised_of_every_command():
    """Evaluation has no --width, export none of these options."""
    assert sentence(MemoryError("9 bytes")) == (
        "there is not enough memory; what takes less, where the command has it: "
        "--gradient_checkpointing for learning, --batch_size 1 and a smaller --width and --height "
        "for painting"
    )
