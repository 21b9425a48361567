"""The file of an evaluation's records, where the disk is full, and under several processes."""

import errno
import json
import sys

import pytest
from PIL import Image

from imagelab.evaluation import report
from imagelab.evaluation.runner import Records

resource = pytest.importorskip("resource", reason="needs limits of files' sizes")
fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def room():
    """Sets how large this process may make files, in bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of files' sizes")
def test_a_record_that_there_is_no_room_for_is_an_error_and_spoils_no_other(tmp_path, room):
    path = tmp_path / "records.jsonl"
    records, other = Records(path), Records(path)
    first, second, third = ({"key": name, "iou": [0.5]} for name in "abc")
    records.add(first)
    size = path.stat().st_size
    room(size + 10)  # the beginning of a record, which the system writes without an error
    with pytest.raises(OSError, match="File too large"):
        records.add(second)
    room(resource.RLIM_INFINITY)
    assert list(records.found) == ["a"]
    other.add(third)
    records.add(second)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [first, third, second]
    assert Records(path).found == {"a": first, "b": second, "c": third}


def test_records_that_somebody_removes_are_begun_anew(tmp_path):
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records.add({"key": "a" * 20})
    path.unlink()
    records.add({"key": "b"})
    other = Records(path)
    for name in "cd":
        other.add({"key": name})
    records.add({"key": "e"})
    assert path.read_text() == "".join(f'{{"key": "{name}"}}\n' for name in "bcde")
    assert list(records.found) == ["a" * 20, "b", "c", "d", "e"]


def test_records_of_another_command_are_passed_over(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    for record in (
        {"key": "a", "picture": "a.png"},
        {"key": "b", "picture": "b.png"},
        {"key": "c"},
    ):
        records.add(record)
    (tmp_path / "a.png").touch()
    records.forget_without(tmp_path)
    assert list(records.found) == ["a", "c"]


def test_a_report_is_written_while_no_other_process_writes_one(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    free = []

    def write(*_) -> Image.Image:
        with path.open("ab") as file:  # as another process would open it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)
        return Image.new("L", (1, 1))

    for name in ("total_confusion", "markdown", "as_facts"):
        monkeypatch.setattr(report, name, lambda *_: "")
    monkeypatch.setattr(report, "sheet", write)
    monkeypatch.setattr(report, "confusion_figure", lambda path, *_: write().save(path, "PNG"))
    case = type("Case", (), {"labels": ()})
    monkeypatch.setattr(report, "summarise", lambda _: {})
    report.write_report([case], [[{"spaces": {}}]], tmp_path)
    assert free == [False, False]
    write()
    assert free[-1]


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_records_are_kept_on_a_disk_without_locks(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(getattr(errno, code), "as of a network disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    records = Records(tmp_path / "records.jsonl")
    for name in "ab":
        records.add({"key": name})
    assert list(Records(tmp_path / "records.jsonl").found) == ["a", "b"]
    assert caplog.messages == [
        f"{tmp_path} is on a disk that knows no locks: let no other process write there until this "
        "one ends"
    ]


def test_another_failure_to_lock_is_told(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        Records(tmp_path / "records.jsonl")
