"""The short form of crashes.py; what a loss of power leaves, by hand; what imagelab.io keeps."""

import ast
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from power_loss import ROOT, Call, Recorder, lay_out, states
from thin import contents

from imagelab.io.atomic import (
    folder_lock,
    readable,
    replacing,
    write_json,
    write_new,
    written_aside,
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_crashes_loses_nothing(tmp_path):
    script = Path(__file__).with_name("crashes.py")
    options = "--count 3 --resumed 1 --commands learning"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *options.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kills, power = (
        ast.literal_eval(line.strip()) for line in done.stdout.splitlines() if line[:3] == "  {"
    )
    assert sum(kills.values()) == 3 and any(end.startswith("killed at") for end in kills)
    assert power["disks"] >= 50 and power["gone on with"] == 1 and power["new result"] >= 2
    for stage, step in [*itertools.product((1, 2), (1, 2, 3, 4)), (2, 10)]:
        assert power[f"checkpoint of stage {stage}, step {step}"] >= 1


# ----------------------------------------------------------------------------------------------
# what a loss of power leaves, by hand


def trees(calls: list[Call]) -> list:
    """The trees that may be there after all of the calls."""
    return list(states(calls))[-1][1]


NEW = [Call("create", 1, (ROOT, "a")), Call("flush", 1, content=b"1")]
LATER = [Call("create", 2, (ROOT, ".b")), Call("flush", 2, content=b"2")]
MOVE = Call("move", 2, (ROOT, "a"), (ROOT, ".b"))
FLUSH = Call("flush", ROOT, is_folder=True)


def test_what_was_not_flushed_is_lost():
    assert trees(NEW[:1]) == [{"a": b""}] and trees(NEW) == [{"a": b"1"}]
    assert trees([*NEW, *LATER[:1], MOVE, FLUSH]) == [{"a": b""}]


def test_a_rename_is_done_or_not_until_its_folder_is_flushed():
    calls = [*NEW, *LATER, MOVE]
    assert trees(calls) == [{"a": b"2"}, {"a": b"1", ".b": b"2"}]
    assert trees([*calls, FLUSH]) == [{"a": b"2"}]


def test_a_removal_may_reach_the_disk_before_a_rename():
    log = ROOT, "log"
    calls = [*NEW, *LATER, Call("create", 3, log), MOVE, Call("remove", 3, former=log)]
    assert {"a": b"1", ".b": b"2"} in trees(calls)


def test_changes_of_one_name_keep_their_order():
    folders = [Call("create", node, (ROOT, "_xy"[node]), is_folder=True) for node in (1, 2)]
    away = Call("move", 1, (ROOT, "x.old"), (ROOT, "x"), is_folder=True)
    instead = Call("move", 2, (ROOT, "x"), (ROOT, "y"), is_folder=True)
    found = [sorted(tree) for tree in trees([*folders, away, instead])]
    assert sorted(found) == [["x", "x.old"], ["x", "y"], ["x.old", "y"]]  # never y as x alone


def test_a_recorder_sees_what_is_done(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    recorder = Recorder(tmp_path)
    with recorder.watching():
        (tmp_path / "new").write_bytes(b"new")
        with (tmp_path / "new").open("rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp_path / "new", tmp_path / "old")
        (tmp_path / "folder").mkdir()
        os.link(tmp_path / "old", tmp_path / "folder" / "more")
        (tmp_path / "old").unlink()
    given, done = recorder.calls[: recorder.given], recorder.calls[recorder.given :]
    assert given == [Call("create", 1, (ROOT, "old")), Call("flush", 1, content=b"old")]
    assert done == [
        Call("create", 2, (ROOT, "new")),
        Call("flush", 2, content=b"new"),
        Call("move", 2, (ROOT, "old"), (ROOT, "new")),
        Call("create", 3, (ROOT, "folder"), is_folder=True),
        Call("link", 2, (3, "more")),
        Call("remove", 2, former=(ROOT, "old")),
    ]


# ----------------------------------------------------------------------------------------------
# what imagelab.io keeps


def disks(tmp_path, before, act) -> list[Path]:
    """Folders as they may be after a loss of power at some moment of an act."""
    (tmp_path / "out").mkdir()
    before(tmp_path / "out")
    recorder = Recorder(tmp_path / "out")
    with recorder.watching():
        act(tmp_path / "out")
    found = []
    for count, left in states(recorder.calls):
        for tree in left if count >= recorder.given else []:
            found.append(tmp_path / f"disk{len(found)}")
            lay_out(tree, found[-1])
    assert len(found) >= 8
    return found


def fill(folder: Path, text: str) -> None:
    with folder_lock(folder / "toys"), replacing(folder / "toys") as new:
        (new / "draft").write_text(text)
        (new / "draft").rename(new / "text")  # as libraries do
        (new / "part").mkdir()
        write_json(new / "part" / "facts.json", {"text": text})


def test_a_folder_that_is_replaced_outlives_a_loss_of_power(tmp_path):
    found = set()
    for disk in disks(tmp_path, lambda out: fill(out, "first"), lambda out: fill(out, "later")):
        files = contents(readable(disk / "toys"))
        assert sorted(files) == ["part/facts.json", "text"]
        text = files["text"].decode()
        assert json.loads(files["part/facts.json"]) == {"text": text}
        found.add(text)
        with folder_lock(disk / "toys"):
            assert contents(disk / "toys") == files
        assert os.listdir(disk) == ["toys"]
    assert found == {"first", "later"}


def test_what_a_killed_writer_left_outlives_a_loss_of_power(tmp_path):
    """Killed after its renames, and before they were on the disk."""

    def begin(out: Path) -> None:
        for name in ("toys", ".toys.0123456789ab.new"):
            (out / name).mkdir()
            (out / name / "text").write_text(name)

    def act(out: Path) -> None:
        os.replace(out / "toys", out / ".toys.old")
        os.replace(out / ".toys.0123456789ab.new", out / "toys")
        with folder_lock(out / "toys"):
            pass

    for disk in disks(tmp_path, begin, act):
        text = (readable(disk / "toys") / "text").read_text()
        assert text in ("toys", ".toys.0123456789ab.new")


def test_what_a_result_makes_needless_goes_after_it(tmp_path):
    """As a learning run removes its checkpoint."""

    def begin(out: Path) -> None:
        (out / "checkpoint").write_text("")

    def act(out: Path) -> None:
        fill(out, "result")
        (out / "checkpoint").unlink()

    for disk in disks(tmp_path, begin, act):
        assert (disk / "checkpoint").exists() or (disk / "toys" / "text").read_text() == "result"


def test_files_come_to_the_disk_in_the_order_of_their_writing(tmp_path):
    """Facts are there only with their picture."""

    def act(out: Path) -> None:
        write_new(out, "{}.png".format, b"picture")
        write_new(out, "{}.json".format, b"facts")
        write_json(out / "report", {})
        (out / "last").mkdir()

    for disk in disks(tmp_path, lambda out: None, act):
        there = [(disk / name).exists() for name in ("0.png", "0.json", "report", "last")]
        assert there == sorted(there, reverse=True)
        for path in filter(Path.exists, (disk / "0.png", disk / "0.json", disk / "report")):
            assert path.read_bytes() in (b"picture", b"facts", b"{}\n")


def test_what_killed_writers_left_goes_a_day_later(tmp_path):
    names = {
        ".a.json.0123456789ab.part": True, ".b.json.0123456789ab.part": False,
        ".mine.part": True, "a.json.0123456789ab.part": True,
    }  # fmt: skip
    for name, is_old in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").touch()
        then = time.time() - is_old * 90_000
        os.utime(tmp_path / name, (then, then))
    write_json(tmp_path / "other.json", {})
    assert sorted(os.listdir(tmp_path)) == sorted([*list(names)[1:], "other.json"])


def test_what_a_library_puts_beside_a_file_goes_with_the_aside(tmp_path):
    with written_aside(tmp_path / "file") as aside:
        aside.write_text("whole")
        aside.with_name(".tmpAbCdEf").touch()  # as safetensors does, and renames it
        assert len(os.listdir(tmp_path)) == 1
    assert contents(tmp_path) == {"file": b"whole"}
