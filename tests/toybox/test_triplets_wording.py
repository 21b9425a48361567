"""The instructions of triplets: grammatical, with a mark for each picture, as MIGE reads them."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from mige.method.wording import clean, name_source, split
from toybox.scenes import edits, wording
from toybox.scenes.scenes import GROUNDS, Placement, Scene
from toybox.scenes.toys import HUES, KINDS, Look
from toybox.scenes.triplets import OPS, WORDS
from toybox.scenes.wording import MARK, TASKS, call, describe, vocabulary, word_subjects


def scene(*looks: Look, ground: str | None = None) -> Scene:
    return Scene(tuple(Placement(look, 0.5, 0.5, 0.3) for look in looks), ground, (0, 0, 0), 0)


@pytest.fixture(scope="module")
def worded() -> list[tuple[str, str, str | None]]:
    """Task, prompt and plain instruction of many triplets, none of which is painted."""
    found = []
    for task, ops in OPS.items():
        for op, index in product(ops, range(60)):
            rng = np.random.default_rng((TASKS.index(task), ops.index(op), index))
            if task == "subject":
                names = ["a <subject>", "a <subject>", "a red fish"]
                names = {"one": names[:1], "two": names[:2], "one_word": names[1:]}.get(op, names)
                relation = list(wording.PAIRS)[rng.integers(4)] if len(names) == 2 else None
                ground = [None, *GROUNDS][rng.integers(7)]
                found.append((task, word_subjects(names, relation, ground, rng).prompt, None))
            elif task == "edit":
                change = edits.EDITS[op](rng)
                said = wording.word_edit(change.wording, change.fields, rng)
                found.append((task, said.prompt, said.plain))
            else:
                change = edits.SUBJECT_EDITS[op](rng)
                said = wording.word_subject_edit(op, change.fields, rng)
                found.append((task, said.prompt, None))
    return found


def test_prompts_are_clean(worded):
    for _, prompt, _ in worded:
        assert clean(prompt) == prompt
        assert not re.search(rf"\s{MARK}|{MARK}\s|^\s|\s$|[{{}}]|  ", prompt), prompt
        text = prompt.replace(MARK, " ")
        assert "<" not in text
        assert set(text.split()) <= set(WORDS)


def test_articles_agree(worded):
    for _, prompt, plain in worded:
        for text in filter(None, (prompt, plain)):
            for article, word in re.findall(r"\b(an?) (\w+)", text):
                assert article == ("an" if word[0] in "aeiou" else "a"), text


def test_no_word_comes_twice_in_a_row(worded):
    for _, prompt, plain in worded:
        for text in filter(None, (prompt.replace(MARK, " X "), plain)):
            words = text.split()
            assert all(one != next_ for one, next_ in zip(words, words[1:], strict=False)), text


def test_edits_name_their_picture_once_as_the_command_does(worded):
    ends = Counter()
    for task, prompt, plain in worded:
        if task == "edit":
            assert len(split(prompt)) == 2
            at_the_end = prompt == name_source(plain)
            ends[at_the_end] += 1
            if not at_the_end:
                # the same sentence, with a preposition and the mark in it
                words = re.sub(rf" (?:in|of|from|to|into){MARK}", " ", prompt).split()
                rest = [word for word in plain.split() if word not in words]
                assert not rest, (prompt, plain)
    assert 0.35 < ends[True] / sum(ends.values()) < 0.75


def test_edits_with_a_subject_have_two_marks(worded):
    for task, prompt, _ in worded:
        if task == "subject_edit":
            assert len(split(prompt)) == 3


@pytest.mark.parametrize(
    ("op", "order", "forms"),
    [
        ("replace", ("source", "subject"), r"\w+ the [\w ]+ in<s>(with|for|into)<s>"),
        ("add", ("subject", "source"), r"\w+<s>(in)?to<s>([\w ]+)?"),
    ],
)
def test_a_bench_has_its_pictures_in_the_order_of_migebench(op, order, forms):
    fields = {"toy": "red car", "place": "on the left"}
    orders = set()
    for seed in range(60):
        said = wording.word_subject_edit(op, fields, np.random.default_rng(seed), bench=True)
        assert said.order == order
        assert re.fullmatch(forms, said.prompt.replace(MARK, "<s>"))
        said = wording.word_subject_edit(op, fields, np.random.default_rng(seed))
        orders.add(said.order)
    assert orders == {order, order[::-1]}


def test_a_toy_is_called_as_no_other():
    red, blue, fox = Look("car", 0), Look("car", 220), Look("fox", 10)
    calls = [call(scene(red, blue, fox), i, np.random.default_rng(s)) for i in range(3)
             for s in range(20)]  # fmt: skip
    assert Counter(calls) == {"red car": 20, "blue car": 20, "fox": 20}
    alone = Counter(call(scene(red, fox), 0, np.random.default_rng(seed)) for seed in range(200))
    assert set(alone) == {"car", "red car"}
    assert 50 < alone["red car"] < 110


def test_captions():
    assert describe(scene()) == "nothing"
    assert describe(scene(ground="in the sky")) == "nothing in the sky"
    looks = Look("tropical_fish", 28), Look("car", 228), Look("fox", 86)
    assert describe(scene(*looks)) == "an orange tropical fish and a blue car and a fox"
    assert describe(scene(Look("cat", 350), ground="in the snow")) == "a red cat in the snow"


def test_the_vocabulary_is_what_templates_are_made_of():
    words = vocabulary(("on the left",))
    assert words == sorted(set(words))
    assert {"tropical", "fish", "teal", "a", "an", "enlarge", "snow", "below", "instead"} - set(
        words
    ) == {"instead"}
    assert "corner" not in words
    assert "corner" in WORDS
    assert not [word for word in WORDS if not word.isalpha()]
    assert {word for kind in KINDS for word in kind.split("_")} <= set(WORDS)
    assert set(HUES) <= set(WORDS)


def test_every_ground_has_a_name_for_what_it_is_made_of():
    assert set(wording.STUFF) == set(GROUNDS)
    for ground, stuff in wording.STUFF.items():
        assert ground.split()[-1] == stuff.split()[-1]
