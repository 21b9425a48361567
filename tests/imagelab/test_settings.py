"""Settings by name: their types, those that may be None, and options that are made of them."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagelab.cli import add_setting
from imagelab.errors import UserError
from imagelab.settings import Config


@dataclass(frozen=True)
class Part:
    rate: float | None = None
    steps: int = 3
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole(Config):
    place: str | None = None
    count: int | None = 4
    scale: float = 2.0
    part: Part = Part()


def test_settings_that_may_be_none_have_types_whatever_their_default_is():
    assert Whole.open_kinds() == {"place": str, "count": int, "rate": float}


def test_a_value_is_taken_in_the_type_of_its_setting():
    config = Whole.from_settings(rate=2, scale=3, place=Path("a/b"), words="one")
    assert config == Whole("a/b", 4, 3.0, Part(2.0, 3, ("one",)))
    assert type(config.part.rate) is float and type(config.scale) is float
    assert type(config.place) is str
    assert Whole.from_settings(count=None, rate=None) == Whole(None, None, 2.0, Part(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": "2"}, "rate is '2'; give a number"),
        ({"rate": True}, "rate is True; give a number"),
        ({"count": 2.5}, "count is 2.5; give a whole number"),
        ({"count": False}, "count is False; give a whole number"),
        ({"place": 7}, "place is 7; give a text"),
        ({"place": ["a"]}, "place is ['a']; give a text"),
        ({"scale": None}, "scale is None; give a number"),
        ({"steps": None}, "steps is None; give a whole number"),
        ({"words": None}, "words is None; give a list of texts"),
        ({"pace": 1}, "no setting 'pace'; the settings are count, place, rate, scale, steps"),
    ],
)
def test_a_value_of_another_type_is_refused(settings, message):
    for make in (Whole.from_settings, Whole().with_settings):
        with pytest.raises(UserError, match=re.escape(message)):
            make(**settings)


def test_other_values_of_some_settings():
    config = Whole("here", 5, 1.5, Part(0.25, 7, ("a", "b")))
    assert config.with_settings(steps=8, count=None) == Whole(
        "here", None, 1.5, Part(0.25, 8, ("a", "b"))
    )
    assert config.with_settings(rate=None).part == Part(None, 7, ("a", "b"))
    assert config == Whole("here", 5, 1.5, Part(0.25, 7, ("a", "b")))  # is as it was
    assert config.with_settings() == config


def test_an_option_has_the_type_and_the_default_of_its_setting(capsys):
    config, parser = Whole(part=Part(steps=9)), argparse.ArgumentParser()
    for name in ("place", "count", "scale", "rate"):
        add_setting(parser, config, name, "some")
    add_setting(parser, config, "steps", "some", choices=(9, 10))
    assert vars(parser.parse_args([])) == {
        "place": None, "count": 4, "scale": 2.0, "rate": None, "steps": 9,
    }  # fmt: skip
    options = [word for name in ("place", "count", "scale", "rate") for word in (f"--{name}", "7")]
    given = vars(parser.parse_args([*options, "--steps", "10"]))
    assert given == {"place": "7", "count": 7, "scale": 7.0, "rate": 7.0, "steps": 10}
    assert type(given["count"]) is int and type(given["rate"]) is float
    none = vars(parser.parse_args(["--count", "None", "--rate", "none"]))  # as help writes it
    assert (none["count"], none["rate"]) == (None, None)
    for wrong, kind in (
        ("--count 7.5", "int"),
        ("--rate fast", "float"),
        ("--scale None", "float"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong.split())
        assert f"invalid {kind} value" in capsys.readouterr().err
