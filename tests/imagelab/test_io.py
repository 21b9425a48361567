"""Files that appear whole, locks, checked readers, numbered pictures and contact sheets."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from imagelab.boxes import Box, color_of
from imagelab.errors import UserError
from imagelab.io import atomic, pictures
from imagelab.io.atomic import (
    folder_lock,
    folder_names,
    lock_file,
    readable,
    replacing,
    sweep,
    write_json,
    write_new,
    written_aside,
)
from imagelab.io.folders import check_name, check_only, foreign
from imagelab.io.pictures import (
    Tile,
    contact_sheet,
    next_number,
    save_picture,
    save_sheet,
    sheet_of_lines,
)
from imagelab.io.tensors import (
    disk_errors,
    misfit,
    parse_json,
    read_json,
    read_metadata,
    read_tensors,
    tensors_digest,
    write_tensors,
)

# ----------------------------------------------------------------------------------------------
# files


def test_two_writers_of_one_process_number_do_not_meet(tmp_path):
    """Containers on one volume all have process 1."""
    path = tmp_path / "facts.json"
    with written_aside(path) as first, written_aside(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["facts.json"]


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["facts.json"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_replaces_nothing(tmp_path, monkeypatch, has_links):
    if not has_links:

        def refuse(*paths):
            raise OSError(errno.EPERM, "no hard links on this disk")

        monkeypatch.setattr(os, "link", refuse)
    found = [write_new(tmp_path, "{}.txt".format, bytes([65 + i])) for i in range(3)]
    assert [(path.name, path.read_text()) for path in found] == [
        ("0.txt", "A"),
        ("1.txt", "B"),
        ("2.txt", "C"),
    ]
    assert len(os.listdir(tmp_path)) == 3


# ----------------------------------------------------------------------------------------------
# folders


def fill(target: Path, text: str) -> None:
    with folder_lock(target), replacing(target) as folder:
        (folder / "text").write_text(text)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "toys"
    fill(target, "first")
    with pytest.raises(RuntimeError), folder_lock(target), replacing(target) as folder:
        (folder / "text").write_text("half")
        raise RuntimeError
    assert (target / "text").read_text() == "first"
    fill(target, "second")
    assert (target / "text").read_text() == "second"
    assert os.listdir(tmp_path) == ["toys"]


def test_a_failed_rename_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    target, replace = tmp_path / "toys", os.replace
    fill(target, "first")

    def fail(source, goal):
        if Path(source).name.endswith(".new"):
            raise OSError(errno.EIO, "broken")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        fill(target, "second")
    assert (target / "text").read_text() == "first" and os.listdir(tmp_path) == ["toys"]


def test_what_was_put_into_a_folder_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "toys"
    fill(target, "first")

    def replace(notes: bool) -> None:
        with folder_lock(target), replacing(target, partial(check_only, own=["te?t"])) as folder:
            (folder / "text").write_text("second")
            if notes:
                (target / "notes.txt").write_text("years")

    with pytest.raises(UserError, match="toys holds notes.txt, which would be removed with the fo"):
        replace(notes=True)
    assert (target / "text").read_text() == "first" and os.listdir(tmp_path) == ["toys"]
    (target / "notes.txt").unlink()
    replace(notes=False)
    assert (target / "text").read_text() == "second"


@pytest.mark.parametrize("there", ["a file", "a link", "a dangling link"])
def test_what_is_no_folder_makes_room_for_one(tmp_path, there):
    target, other = tmp_path / "toys", tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    if there == "a file":
        target.touch()
    else:
        target.symlink_to(other if there == "a link" else tmp_path / "nowhere")
    fill(target, "new")
    assert (target / "text").read_text() == "new" and not target.is_symlink()
    assert os.listdir(other) == ["mine"] and sorted(os.listdir(tmp_path)) == ["other", "toys"]


def killed_between_the_renames(tmp_path) -> Path:
    target = tmp_path / "toys"
    fill(target, "earlier")
    target.rename(tmp_path / ".toys.old")
    (tmp_path / ".toys.0123456789ab.new").mkdir()
    (tmp_path / ".toys.car.0123456789ab.new").mkdir()  # of another folder, toys.car
    return target


def test_readers_find_what_a_killed_writer_moved_away_and_rename_nothing(tmp_path):
    target = killed_between_the_renames(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert (readable(target) / "text").read_text() == "earlier"
    assert folder_names(tmp_path, "text") == ["toys"]
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_called_old_is_a_hidden_one(tmp_path):
    for name in (".old", "toys"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").touch()
    assert folder_names(tmp_path, "text") == ["toys"]


def test_hidden_files_go_with_a_folder_and_hidden_folders_do_not(tmp_path):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".y.0123456789ab.part", "asset0.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".x.0123456789ab.part").mkdir()  # of a writer that was killed
    assert [path.name for path in foreign(tmp_path)] == ["asset0.txt"]
    check_only(tmp_path, ["asset*.txt"])
    (tmp_path / ".git").mkdir()
    assert [path.name for path in foreign(tmp_path)] == [".git", "asset0.txt"]
    with pytest.raises(UserError, match=r" holds \.git, which would be removed with the folder"):
        check_only(tmp_path, ["asset*.txt"])


def test_a_name_leaves_room_for_what_is_written_beside_it(tmp_path):
    """Disks take 255 bytes: 85 Chinese characters, of which a hidden name takes some."""
    with pytest.raises(UserError) as error:
        check_name("字" * 70, "instance")
    assert str(error.value) == (f"--instance '{'字' * 59}…' is too long; give at most 200 bytes")
    with pytest.raises(UserError, match="is too long"):
        check_name("a" * 201, "instance")
    name = "字" * 66 + "aa"
    check_name(name, "instance")
    fill(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]


def test_who_gets_the_lock_finds_what_a_killed_holder_left_cleared_away(tmp_path):
    target = killed_between_the_renames(tmp_path)
    with folder_lock(target):
        assert (target / "text").read_text() == "earlier"
    assert sorted(os.listdir(tmp_path)) == [".toys.car.0123456789ab.new", "toys"]


def test_a_result_is_newer_than_what_was_moved_away_for_it(tmp_path):
    target = tmp_path / "toys"
    fill(target, "later")
    (tmp_path / ".toys.old").mkdir()
    assert readable(target) == target
    with folder_lock(target):
        assert (target / "text").read_text() == "later"
    assert os.listdir(tmp_path) == ["toys"]


def test_one_at_a_time_holds_a_lock(tmp_path):
    target = tmp_path / "new" / "toys"
    code = (
        "from pathlib import Path; from imagelab.io.atomic import folder_lock\n"
        f"with folder_lock(Path({str(target)!r})): print('held', flush=True); input()"
    )
    sentence = "toys is being written by another process; wait for it or give another --output_dir"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=sentence), folder_lock(target, "--output_dir"):
            pass
        other.kill()
        other.wait()
    with folder_lock(target):  # it ended with its holder
        with pytest.raises(UserError, match="is being written"), folder_lock(target):
            pass
        with folder_lock(target.with_name("cars")):
            pass
    assert os.listdir(target.parent) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows locks otherwise")
@pytest.mark.parametrize("code", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK"])
def test_a_disk_without_locks_is_written_with_one_warning(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(getattr(errno, code), "as of a network disk")

    monkeypatch.setattr("fcntl.flock", flock)
    for text in ("earlier", "later"):
        fill(tmp_path / "toys", text)
    assert (tmp_path / "toys/text").read_text() == "later" and os.listdir(tmp_path) == ["toys"]
    assert caplog.messages == [
        f"{tmp_path / 'toys'} is on a disk that knows no locks: let no other process write there "
        "until this one ends"
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows locks otherwise")
@pytest.mark.parametrize(
    ("code", "told"),
    [("EIO", "Input/output error"), ("EAGAIN", "toys is being written by another process")],
)
def test_another_failure_to_lock_stops_the_writer(tmp_path, monkeypatch, caplog, code, told):
    def flock(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises((OSError, UserError), match=told):
        fill(tmp_path / "toys", "text")
    assert not (tmp_path / "toys").exists() and caplog.messages == []


class Msvcrt:
    """Windows' locks, of a file that is free at the ``free``-th look."""

    LK_LOCK, LK_NBLCK = 1, 2

    def __init__(self, free: int):
        self.free, self.looks = free, 0

    def locking(self, file: int, mode: int, count: int) -> None:
        for _ in range(10 if mode == self.LK_LOCK else 1):
            self.looks += 1
            if self.looks >= self.free:
                return
        raise OSError(errno.EDEADLK if mode == self.LK_LOCK else errno.EACCES, "it is locked")


@pytest.mark.parametrize(
    ("wait", "free", "is_held", "looks"),
    [(True, 1, True, 1), (True, 25, True, 25), (False, 1, True, 1), (False, 25, False, 1)],
)
def test_windows_is_waited_for_as_long_as_it_takes(
    tmp_path, monkeypatch, wait, free, is_held, looks
):
    windows, pauses = Msvcrt(free), []
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    nt = SimpleNamespace(name="nt", lseek=os.lseek, SEEK_SET=os.SEEK_SET)
    monkeypatch.setattr(atomic, "os", nt)
    monkeypatch.setattr(atomic, "time", SimpleNamespace(sleep=pauses.append))
    with (tmp_path / "lock").open("wb") as file:
        assert lock_file(file.fileno(), tmp_path, wait) is is_held
    assert windows.looks == looks and len(pauses) == looks - 1


def test_unfinished_files_are_swept(tmp_path):
    for name in (".a.0123456789ab.part", "a", ".hidden"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a"]


# ----------------------------------------------------------------------------------------------
# tensors and facts


def test_tensors_come_back_as_they_were(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": table, "b": table.T, "c": table[1:], "d": torch.tensor(3, dtype=torch.uint8)}
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"made by": "hand"})
    found, metadata = read_tensors(path, "delete it")
    assert metadata == read_metadata(path, "delete it") == {"made by": "hand"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_digest_is_of_names_kinds_shapes_and_values():
    """In bfloat16 1 is 0x3f80 and −2 is 0xc000."""
    a = torch.tensor([[1.0, 9.0], [-2.0, 9.0]], dtype=torch.bfloat16)[:, 0]
    b = torch.tensor(7, dtype=torch.uint8)
    text = b"a torch.bfloat16 [2]" + bytes.fromhex("803f 00c0") + b"b torch.uint8 []" + b"\7"
    assert tensors_digest({"b": b, "a": a}) == hashlib.sha256(text).hexdigest()
    others = [
        {"a": a, "c": b},
        {"a": a[:, None], "b": b},
        {"a": a.contiguous().view(torch.int16), "b": b},
        {"a": -a, "b": b},
        {"a": a},
    ]
    assert len({tensors_digest(each) for each in [{"a": a, "b": b}, *others]}) == 6


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no file {path}; delete it"),
        (b"abc", r"{path} cannot be read as safetensors \(.*header too small.*\); delete it"),
        (b"\xff" * 64, r"{path} cannot be read as safetensors \(.*\); delete it"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "{path} holds 'a' in float8_e4m3fn, which is not"),
        (torch.zeros(2, dtype=torch.complex64), "{path} holds 'a' in complex64, which is not sup"),
        (torch.tensor([1, float("nan")]), "{path} holds NaN or infinity in 'a'; delete it"),
        (torch.tensor([1, -float("inf")]), "{path} holds NaN or infinity in 'a'; delete it"),
    ],
)
def test_tensors_that_cannot_be_used(tmp_path, content, sentence):
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"a": content}, path)
    with pytest.raises(UserError, match=sentence.format(path=re.escape(str(path)))) as error:
        read_tensors(path, "delete it")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one(tmp_path):
    with pytest.raises(OSError) as error, disk_errors(tmp_path):
        raise SafetensorError("Error: IoError(Os { code: 28 }), os error 28")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(SafetensorError), disk_errors(tmp_path):
        raise SafetensorError("of another kind")


@pytest.mark.parametrize(
    ("value", "form", "wrong"),
    [
        ({"a": 1, "more": 2}, {"a": int}, None),
        ({"a": 1}, {"a": str}, "a is 1 and not text"),
        ({}, {"a": int}, "it has no 'a'"),
        ({"a": True}, {"a": int}, "a is True and not a whole number"),
        (3, float, None),
        (3.5, int, "it is 3.5 and not a whole number"),
        ({"a": None}, {"a": (str, None)}, None),
        ({"a": 2}, {"a": (str, None)}, "a is 2 and not text"),
        ({"a": {"b": []}}, {"a": {"b": {}}}, "a.b is a list and not an object"),
        ({"a": [1, "x"]}, {"a": [int]}, "a[1] is 'x' and not a whole number"),
        ([], {}, "it is a list and not an object"),
    ],
)
def test_forms(value, form, wrong):
    assert misfit(value, form) == wrong


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no file {path}; delete it"),
        (b'{"a"', r"{path} is not valid JSON \(Expecting ':' .*\); delete it"),
        (b'{"a": "\xff"}', "{path} is not UTF-8 text; delete it"),
        (b"[" * 100_000, "{path} is nested too deeply; delete it"),
        (b'{"a": NaN}', r"{path} is not valid JSON \(it holds NaN\); delete it"),
        (b'{"a": 1e999}', r"{path} is not valid JSON \(it holds 1e999\); delete it"),
        (b'{"a": 1%s}' % (b"0" * 400), r"\(it holds a number of 401 digits\)"),
        (b'{"a": 9223372036854775808}', r"\(it holds a number of 19 digits\)"),
        (b'{"a": "1"}', "{path}: a is '1' and not a whole number; delete it"),
        (b"3", "{path}: it is 3 and not an object; delete it"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, content, sentence):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence.format(path=re.escape(str(path)))):
        read_json(path, {"a": int}, "delete it")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    """Editors on Windows write one."""
    path = tmp_path / "facts.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, {"a": int}, "delete it") == {"a": 1}


def test_json_is_read():
    assert parse_json('{"a": [1, 2.5, null]}', {}, "it", "") == {"a": [1, 2.5, None]}


# ----------------------------------------------------------------------------------------------
# pictures


def test_numbered_pictures(tmp_path):
    (tmp_path / "7.png").touch()
    (tmp_path / "sheet_9.png").touch()
    assert next_number(tmp_path) == 8
    red = Image.new("RGB", (8, 8), "red")
    paths = [save_picture(tmp_path, 8, red, {"seed": i}, {"prompt": "a ☃"}) for i in range(2)]
    assert [path.name for path in paths] == ["0008.png", "0009.png"]
    assert json.loads((tmp_path / "0009.json").read_text()) == {"seed": 1}
    with Image.open(paths[1]) as picture:
        assert picture.text == {"prompt": "a ☃"} and picture.getpixel((0, 0)) == (255, 0, 0)


@settings(max_examples=25, deadline=None)
@given(words=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=99))
def test_what_a_picture_says_is_read_back(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("pictures")
    path = save_picture(folder, 3, Image.new("RGB", (2, 2)), {"a": words}, {"prompt": words})
    with Image.open(path) as picture:
        assert picture.text["prompt"] == words
    assert json.loads(path.with_suffix(".json").read_text()) == {"a": words}


def squares(*colours, side=16):
    return [Image.new("RGB", (side, side), colour) for colour in colours]


def test_a_contact_sheet_is_a_grid_in_reading_order():
    sheet = contact_sheet([Tile(each) for each in squares("red", "lime", "blue", "black", "red")])
    assert sheet.size == (3 * 16 + 2 * 4, 2 * 16 + 4)
    at = [(0, 0), (20, 0), (40, 0), (0, 20), (20, 20), (40, 20), (17, 0), (0, 17)]
    white = (255,) * 3
    assert [sheet.getpixel(xy) for xy in at] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (0, 0, 0),
        (255, 0, 0),
        white,
        white,
        white,
    ]


def test_a_sheet_of_lines():
    red, blue, lime = (Image.new("RGB", (10, 10), name) for name in ("red", "blue", "lime"))
    lines = [[Tile(red)], [Tile(blue), Tile(lime), Tile(red)]]
    drawn = np.asarray(sheet_of_lines(lines, 20))
    step = 20 + 4  # a gap between two
    assert drawn.shape == (2 * step - 4, 3 * step - 4, 3)
    middle = [[drawn[10 + step * r, 10 + step * c].tolist() for c in range(3)] for r in range(2)]
    white = [255, 255, 255]
    assert middle == [[[255, 0, 0], white, white], [[0, 0, 255], [0, 255, 0], [255, 0, 0]]]


def test_captions_stand_under_their_pictures_in_their_colours():
    red, lime = squares("black", "black", side=64)
    long = "a purple lizard and a yellow balloon on the road"
    sheet = contact_sheet([Tile(red, long, "red"), Tile(lime)], columns=2, gap=0)
    assert sheet.width == 128 and sheet.height > 64 + 3 * 11
    below = np.asarray(sheet)[64:].astype(int)
    assert (below[:, 64:] == 255).all()  # this one has none
    is_ink = below[:, :64].sum(-1) < 3 * 255
    assert is_ink.any() and (below[:, :64, 0] > 250).all()  # red upon white


def test_tiles_are_scaled_centred_and_boxed(tmp_path):
    Image.new("RGB", (40, 20), "white").save(tmp_path / "wide.png")
    tiles = [
        Tile(tmp_path / "wide.png", boxes=[Box(0, 0, 0.5, 1)], labels=[""]),
        Tile(Image.new("RGB", (20, 40), "black")),
    ]
    sheet = contact_sheet(tiles, columns=2, side=100)
    assert sheet.size == (204, 100)
    assert sheet.getpixel((0, 25)) == sheet.getpixel((49, 74)) == color_of(0)
    assert sheet.getpixel((0, 24)) == sheet.getpixel((51, 50)) == (255, 255, 255)
    assert [sheet.getpixel((x, 50))[0] for x in (128, 129, 178, 179)] == [255, 0, 0, 255]


def test_a_saved_sheet_enlarges_small_pictures_and_shrinks_many(tmp_path, monkeypatch):
    paths = [tmp_path / f"000{i}.png" for i in range(5)]
    for path, picture in zip(paths, squares(*["teal"] * 5, side=128), strict=True):
        picture.save(path)
    for name in ("sheet_0000-0004.png", "sheet_0000-0004_1.png"):
        path = save_sheet(paths, [Box(0, 0, 1, 1)], ["<asset0>"])
        assert path.name == name
    with Image.open(path) as sheet:
        assert sheet.size == (3 * 384 + 8, 2 * 384 + 4)
    monkeypatch.setattr(pictures, "MAX_SHEET_SIDE", 300)
    with Image.open(save_sheet(paths, [], [])) as sheet:
        assert sheet.size == (308, 204)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_tensors_have_the_mode_of_other_files(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "b").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "b")]
    assert modes[0] == modes[1]
