"""Training records: read lazily out of a list, checked, and put in order."""

import json
from pathlib import Path

import numpy as np
import pytest

from imagelab.errors import UserError
from mige.data import records
from mige.data.records import RecordList, parse_record, problems, shuffled

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
    monkeypatch.setattr(records, "BLOCK", block)
    monkeypatch.setattr(records, "LONGEST", 390)
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
        ("{}", "see line 1"),
        ("[]", "holds no records"),
        ("[1]", "see line 1"),
        ('[{"a": 1}\n{"b": 2}]', "see line 2"),
        ('[{"a": 1},\n\n{"b": ]', "see line 3"),
        ('[{"a": 1}', "see line 1"),
        ('[{"a": 1}]\n\n x', "see line"),
        ("[" * 50_000, "see line 1"),
        ('[{"a": ' * 50_000, "see line 1"),
    ],
)
def test_files_that_are_no_lists(tmp_path, content, told):
    with pytest.raises(UserError, match=told):
        RecordList(write(tmp_path / "d.json", content))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"multi_prompt": 3}, "it.multi_prompt is 3 and not text"),
        ({"entity_path": "x"}, "it.entity_path is 'x' and not a list"),
        ({"image": "x/other/1.jpg"}, "tells no task; write \"task\", which is one of"),
        ({"task": "dance"}, "there is no task 'dance'"),
        ({"task": "subject"}, "a record of subject has 1 source_path"),
        ({"source_path": []}, "a record of edit has no source_path"),
        ({"source_path": ["a", "b"]}, "source_path is no list of one path"),
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


def test_a_path_s_first_part_decides():
    assert parse_record(SUBJECT | {"image": "add/Subjects200K/1.jpg"}).task == "subject"


def test_all_problems_are_told(tmp_path):
    for name in {path for each in ALL for path in parse_record(each).paths}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x/replace/e/2.jpg").unlink()
    many = SUBJECT | {"entity_path": ["x/add/e/3.jpg"] * 5, "multi_prompt": "<imagehere>" * 5}
    few = EDIT | {"multi_prompt": "make it blue"}
    path = write(tmp_path / "d.json", [*ALL, many, few, {"image": "x"}])
    told = list(problems(RecordList(path), tmp_path, slots=4))
    assert told == [
        f"{path}: record 2: there is no {tmp_path / 'x/replace/e/2.jpg'}",
        f"{path}: record 4 has 5 pictures, and the model takes 4",
        f"{path}: record 5 has 0 marks and 1 pictures",
        f"{path}: record 6: it has no 'multi_prompt'",
    ]


def test_what_is_too_wide():
    assert not parse_record(SUBJECT).is_wide
    assert not parse_record(SUBJECT | {"width": 2400}).is_wide  # 4 : 1
    assert parse_record(SUBJECT | {"width": 2401}).is_wide
    assert not parse_record(EDIT).is_wide


def test_an_epoch_s_order():
    first = shuffled(1000, seed=1, epoch=0)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, shuffled(1000, 1, 0))
    assert not np.array_equal(first, shuffled(1000, 1, 1))
    assert not np.array_equal(first, shuffled(1000, 2, 0))
