"""Training records: read lazily out of a list, checked, and put in order."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from imagelab.errors import UserError
from mige import lists
from mige.data import checking
from mige.data.checking import BadRecords, Limits, check_records
from mige.data.records import RecordList, parse_record, shuffled

SUBJECT = {
    "image": "x/Subjects200K/t/7.jpg", "width": 800, "height": 600, "source_path": [],
    "entity_path": ["x/Subjects200K/e/7_0.jpg", "x/Subjects200K/e/7_1.jpg"],
    "multi_prompt": "A<imagehere>beside a<imagehere>on a shelf",
}  # fmt: skip
EDIT = {
    "image": "x/instructpix2pix/t/1.jpg", "source_path": ["x/instructpix2pix/s/1.jpg"],
    "entity_path": ["x/instructpix2pix/s/1.jpg"], "multi_prompt": "make the car in<imagehere>blue",
}  # fmt: skip
REPLACE = {
    "image": "x/replace/t/2.jpg", "source_path": ["x/replace/s/2.jpg"],
    "entity_path": ["x/replace/s/2.jpg", "x/replace/e/2.jpg"],
    "multi_prompt": "replace the cup in<imagehere>with<imagehere>",
}  # fmt: skip
ADD = {
    "image": "x/add/t/3.jpg", "source_path": ["x/add/s/3.jpg"],
    "entity_path": ["x/add/e/3.jpg", "x/add/s/3.jpg"], "multi_prompt": "<imagehere>into<imagehere>",
}  # fmt: skip
ALL = [SUBJECT, EDIT, REPLACE, ADD]


PREFIXES = {"subject": "1 \n", "subject_inference": "2", "edit": "3 \n", "subject_edit": "4 \n"}


def octets(text: str, add_special_tokens: bool) -> SimpleNamespace:
    """A tokenizer: a token a byte."""
    assert not add_special_tokens and text
    return SimpleNamespace(input_ids=list(text.encode()))


#: A picture takes two positions.
LIMITS = Limits(slots=4, prefixes=PREFIXES, tokenizer=octets, queries=2, text_length=600)


def write(path: Path, content) -> Path:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_release_s_records(tmp_path):
    found = RecordList(write(tmp_path / "d.json", ALL))
    assert [each.task for each in found] == ["subject", "edit", "subject_edit", "subject_edit"]
    first, last = found[0], found[-1]
    assert (first.width, first.height, first.source) == (800, 600, None)
    assert first.entities == tuple(SUBJECT["entity_path"])
    assert last.source == "x/add/s/3.jpg" and last.entities[1] == last.source
    assert last.paths == ("x/add/t/3.jpg", "x/add/e/3.jpg", "x/add/s/3.jpg")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block", [400, 1 << 24])
def test_places_in_a_file_of_any_layout(tmp_path, monkeypatch, indent, block):
    """Texts of several bytes a letter, brackets and quotes within them, records across blocks."""
    monkeypatch.setattr(lists, "BLOCK", block)
    monkeypatch.setattr(lists, "LONGEST", 390)
    texts = ["ein <imagehere> Bär }, {", '"[\\"]', "日本 <imagehere>", "x" * 40] * 10
    wanted = [EDIT | {"multi_prompt": f"{text} {n}"} for n, text in enumerate(texts)]
    text = json.dumps(wanted, indent=indent, ensure_ascii=False)
    found = RecordList(write(tmp_path / "d.json", f" \n{text}\n"))
    assert len(found) == 40
    assert [each.prompt for each in found] == [each["multi_prompt"] for each in wanted]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("{}", "is a JSON object and not an array; put the objects into an array"),
        ('{"data": [{"image": 1}]}', "is a JSON object and not an array"),
        (f"{json.dumps(EDIT)}\n{json.dumps(EDIT)}\n", "(JSONL); put the lines into an array"),
        ('image,width\n"a.png",3\n', "looks like a table (CSV); write each row as an object"),
        (json.dumps(ALL).encode("utf-16"), "is UTF-16 text; save it as UTF-8; docs/mige_train"),
        (json.dumps(ALL).encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
        ('"Köln"'.encode("latin-1"), "is not UTF-8 text; save it as that"),
        ("image: a", "begins with 'image: a' and is no JSON; write a JSON array"),
        ("[]", "holds no records"),
        ("[1]", "record 0 is 1 and not an object; docs/mige_training.md shows a list"),
        ('[{"a": 1}, [2]]', "record 1 is a list and not an object"),
        ('[{"a": 1}\n{"b": 2}]', "see line 2"),
        ('[{"a": 1},\n\n{"b": ]', "see line 3"),
        ('[{"a": 1}', "see line 1"),
        ('[{"a": 1}]\n\n x', "see line"),
        ("[" * 50_000, "see line 1"),
        ('[{"a": ' * 50_000, "see line 1"),
    ],
)
def test_files_that_are_no_lists(tmp_path, content, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        RecordList(write(tmp_path / "d.json", content))
    assert content in ("", "[]") or "docs/mige_training.md" in str(error.value)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    found = RecordList(write(tmp_path / "d.json", json.dumps(ALL).encode("utf-8-sig")))
    assert [each.task for each in found] == ["subject", "edit", "subject_edit", "subject_edit"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"multi_prompt": 3}, "it.multi_prompt is 3 and not text"),
        ({"entity_path": "x"}, "it.entity_path is 'x' and not a list"),
        ({"image": "x/other/1.jpg"}, "tells no task; write \"task\", which is one of"),
        ({"task": "dance"}, "there is no task 'dance'"),
        ({"task": "subject"}, "a record of subject has 1 source_path"),
        ({"source_path": []}, "a record of edit has no source_path"),
        ({"entity_path": ["a"]}, "entity_path lacks the source; name all pictures there"),
        ({"entity_path": [*EDIT["entity_path"], "a"]}, "a record of edit has 2 entity_path"),
        ({"task": "subject_edit"}, "a record of subject_edit has 1 entity_path; an edit has the"),
        ({"source_path": ["a", "b"]}, "source_path is no list of one path"),
        ({"width": "a", "height": 9}, "width is 'a' and not a whole number"),
        ({"width": 9, "height": 9.5}, "height is 9.5 and not a whole number"),
        ({"width": True}, "width is True and not a whole number"),
        ({"width": -5, "height": 9}, "width is -5; give the picture's pixels, or leave it out"),
        ({"height": 0}, "height is 0; give"),
    ],
)  # fmt: skip
def test_records_that_are_none(tmp_path, changes, told):
    found = RecordList(write(tmp_path / "d.json", [SUBJECT, EDIT | changes]))
    assert found[0].task == "subject"
    with pytest.raises(UserError, match="record 1: ") as error:
        found[1]
    assert told in str(error.value)


def test_a_task_may_be_told():
    assert parse_record(EDIT | {"image": "mine/1.jpg", "task": "edit"}).task == "edit"


def test_marks_are_those_of_lists_that_are_painted():
    record = parse_record(EDIT | {"multi_prompt": "make the car in <image> blue"})
    assert record.prompt == "make the car in<imagehere>blue"
    asis = "A <imagehere> beside a <imagehere> "
    assert parse_record(SUBJECT | {"multi_prompt": asis}).prompt == asis


def test_instructions_to_edit_may_do_without_pictures():
    record = parse_record(EDIT | {"entity_path": [], "multi_prompt": "make it blue"})
    assert record.entities == () and record.source == EDIT["source_path"][0]


def test_a_path_s_first_part_decides():
    assert parse_record(SUBJECT | {"image": "add/Subjects200K/1.jpg"}).task == "subject"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with a file for each picture of the release's records."""
    for name in {path for each in ALL for path in parse_record(each).paths}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def told(folder: Path, content, limits=LIMITS) -> list[str]:
    """What is said of a list's records."""
    path = write(folder / "d.json", content)
    with pytest.raises(BadRecords) as error:
        check_records(RecordList(path), folder, limits)
    return [line.removeprefix(f"{path}: ") for line in error.value.lines]


def test_all_problems_are_told(pictures, caplog):
    (pictures / "x/replace/e/2.jpg").unlink()
    many = SUBJECT | {"entity_path": ["x/add/e/3.jpg"] * 5, "multi_prompt": "a<imagehere>" * 5}
    few = EDIT | {"multi_prompt": "make it blue"}
    path = write(pictures / "d.json", [*ALL, many, few, {"image": "x"}])
    with pytest.raises(BadRecords, match="has 4 problems, listed above") as error:
        check_records(RecordList(path), pictures, LIMITS)
    assert error.value.lines == caplog.messages
    assert caplog.messages == [
        f"{path}: record 2: there is no {pictures / 'x/replace/e/2.jpg'}",
        f"{path}: record 4 has 5 pictures, and the model takes 4",
        f"{path}: record 5 has no marks <image> and 1 picture; write <image> where each picture is "
        "meant",
        f"{path}: record 6: it has no 'multi_prompt'",
    ]


def test_of_many_problems_the_first_are_listed(pictures, caplog):
    few = EDIT | {"multi_prompt": "make it blue"}
    path = write(pictures / "d.json", [few] * 103)
    with pytest.raises(BadRecords, match="has 103 problems") as error:
        check_records(RecordList(path), pictures, LIMITS)
    assert len(error.value.lines) == 100 and len(caplog.messages) == 101
    assert "record 99 has no marks" in caplog.messages[99]
    assert caplog.messages[100] == "and 3 more"


def all_alike(path: Path, root: Path, caplog) -> str:
    """What is said of a list whose records are all wrong in one way, which is a single line."""
    with pytest.raises(UserError) as error:
        check_records(RecordList(path), root, LIMITS)
    assert not isinstance(error.value, BadRecords) and not caplog.messages
    return str(error.value)


def test_a_wrong_root_is_told_once(pictures, caplog):
    """The four records have eleven pictures."""
    path = write(pictures / "d.json", [*ALL, SUBJECT | {"width": 9000}])
    found = all_alike(path, pictures / "x", caplog)
    assert found == (
        f"{path}: none of the 11 pictures is under {pictures / 'x'}, such as "
        "x/Subjects200K/t/7.jpg: is --root right?"
    )
    for left in ("x/add/s/3.jpg", "x/Subjects200K/t/7.jpg"):  # of the last record, of the first
        for name in {name for each in ALL for name in parse_record(each).paths} - {left}:
            (pictures / name).unlink(missing_ok=True)
        (pictures / left).touch()
        assert len(told(pictures, ALL)) == 10


def test_a_wrong_root_is_found_early(pictures, caplog, monkeypatch):
    """What is wrong with the third record is not looked at."""
    monkeypatch.setattr(checking, "FIRST", 2)
    path = write(pictures / "d.json", [SUBJECT, EDIT, REPLACE, {"image": "x"}])
    told = "none of the 5 pictures of the first 2 records is under"
    assert told in all_alike(path, pictures / "x", caplog)


def test_records_that_are_all_wrong_alike(pictures, caplog):
    paths = [{"image": f"mine/{n}.jpg"} for n in range(3)]
    path = write(pictures / "d.json", [EDIT | each for each in paths])
    assert all_alike(path, pictures, caplog) == (
        f"all 3 records are wrong alike: {path}: record 0: the path 'mine/0.jpg' tells no task; "
        'write "task", which is one of subject, edit, subject_edit; docs/mige_training.md shows '
        "a list"
    )
    write(path, paths)
    assert "alike: " in (found := all_alike(path, pictures, caplog))
    assert "record 0: it has no 'multi_prompt'; docs" in found
    assert len(told(pictures, [EDIT | paths[0], paths[1]])) == 2  # for two reasons
    assert len(told(pictures, [EDIT | paths[0], EDIT | paths[1], EDIT])) == 2


@pytest.mark.parametrize("word", ["a" * 12, "ä" * 6])
def test_prompts_that_would_be_cut(pictures, word):
    """The prefix has three letters, and a picture takes two positions, the end one.

    Short texts in ASCII need not be tokenised; others may have more tokens than letters.
    """
    limits = Limits(4, PREFIXES, octets, queries=2, text_length=24)
    fits = f"make <imagehere> {word}"  # 3 + 5 + 2 + 13 + 1 = 24
    found = told(pictures, [EDIT | {"multi_prompt": text} for text in (fits, fits + "b")], limits)
    assert found == ["record 1 takes 25 tokens with its pictures, and the model reads 24"]
    blanks = replace(limits, tokenizer=lambda text, **_: octets(f" {text}", False))
    (found,) = told(pictures, [EDIT | {"multi_prompt": fits}], blanks)  # one before each text
    assert found == "record 0 takes 26 tokens with its pictures, and the model reads 24"


def test_prompts_of_too_many_words(pictures):
    """88 words are read, without the prefix, of which some may be behind the last mark."""
    texts = ["b " * count + "<imagehere> c" for count in (86, 87)]
    found = told(pictures, [EDIT | {"multi_prompt": text} for text in texts])
    assert found == ["record 1 has 89 words, and the model reads 88"]


@pytest.mark.parametrize("text", ["", " ", "<imagehere>", " <imagehere>. !", "(<ImageHere>)"])
def test_prompts_without_words(pictures, text):
    record = SUBJECT | {
        "multi_prompt": text,
        "entity_path": ["x/add/e/3.jpg"] * ("i" in text.lower()),
    }
    assert told(pictures, [record]) == ["record 0 has no words"]


def test_marks_are_counted_as_the_model_reads_them(pictures):
    """What the cleaning makes a mark is one."""
    record = EDIT | {"multi_prompt": "make it blue in <ImageHere>"}
    path = write(pictures / "d.json", [record])
    assert check_records(RecordList(path), pictures, LIMITS).tolist() == [0]


def test_text_that_no_file_can_hold(pictures):
    record = EDIT | {"multi_prompt": "blue \ud800 <imagehere>"}
    assert told(pictures, [record]) == ["record 0: it holds text that is not UTF-8"]


def test_records_to_train_on(pictures, caplog):
    """Too wide ones are left out, whatever else is wrong with them, and counted."""
    wide = SUBJECT | {"width": 2401, "multi_prompt": ""}
    path = write(pictures / "d.json", [wide, SUBJECT, EDIT, wide, ADD])
    with caplog.at_level(logging.INFO):
        found = check_records(RecordList(path), pictures, LIMITS)
    assert found.tolist() == [1, 2, 4]
    assert caplog.messages == [f"{path}: 2 records are wider than 4 : 1 and left out"]
    path = write(pictures / "d.json", [wide])
    with pytest.raises(UserError, match="no records that are not too wide"):
        check_records(RecordList(path), pictures, LIMITS)


def test_the_limits_of_a_model_folder(model):
    limits = Limits.of_folder(model)
    assert (limits.slots, limits.queries, limits.text_length) == (4, 4, 24)
    assert limits.prompt_of(parse_record(EDIT)) == "edit: \nmake the car in<imagehere>blue"
    subject = parse_record(SUBJECT | {"multi_prompt": "A dog."})  # not as it is painted
    assert limits.prompt_of(subject) == "paint: \na dog"
    # "▁a ▁red ▁dog", by the tokenizer of the folder
    assert len(limits.tokenizer("a red dog", add_special_tokens=False).input_ids) == 3


def test_what_is_too_wide():
    assert not parse_record(SUBJECT).is_wide
    assert not parse_record(SUBJECT | {"width": 2400}).is_wide  # 4 : 1
    assert parse_record(SUBJECT | {"width": 2401}).is_wide
    assert not parse_record(EDIT).is_wide
    for one_side in ({"width": 9}, {"width": 9, "height": None}, {"height": 9}):
        assert not parse_record(EDIT | one_side).is_wide


def test_an_epoch_s_order():
    first = shuffled(1000, seed=1, epoch=0)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, shuffled(1000, 1, 0))
    assert not np.array_equal(first, shuffled(1000, 1, 1))
    assert not np.array_equal(first, shuffled(1000, 2, 0))
