"""Lists of triplets: MIGE reads them, they appear whole, and a stopped command goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from thin import contents

from mige.data.checking import Limits, check_records
from mige.data.records import RecordList
from mige.items import read_items, read_pictures
from mige.method.wording import PREFIXES, split
from toybox.scenes import triplet_files
from toybox.scenes.toys import Look, toy
from toybox.scenes.triplet_files import Job, write
from toybox.scenes.triplets import draw_triplet
from toybox.triplets import main

#: What MIGEBench's lists say of an item.
KEYS = {
    "image", "source_path", "entity_path", "entity_path_white", "mask_path", "caption",
    "multi_prompt", "target_caption", "object", "entity_dino", "width", "height", "aesthetic",
    "clip_t", "idx", "crop",
}  # fmt: skip
#: What the full model reads: prompts this short need no tokenizer to be known to fit.
LIMITS = Limits(4, {name: f"do {name}:\n " for name in PREFIXES}, None, 32, 256)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(triplet_files, "PART", 4)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A list of ten triplets in three parts."""
    folder = tmp_path_factory.mktemp("triplets") / "ten"
    part, triplet_files.PART = triplet_files.PART, 4
    write(Job(seed=8, count=10), folder)
    triplet_files.PART = part
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("triplets") / "bench"
    main(["--output", str(folder), "--count", "6", "--seed", "8", "--bench"])
    return folder


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file, dtype=int)


def test_mige_reads_the_list_and_finds_nothing_wrong(written):
    records = RecordList(written / "triplets.json")
    assert len(records) == 10
    assert list(check_records(records, written, LIMITS)) == list(range(10))
    tasks = [draw_triplet(8, "train", index).task for index in range(10)]
    assert [record.task for record in records] == tasks
    for record in records:
        assert (record.width, record.height) == (128, 128)
        assert not record.is_wide


def test_files_hold_what_is_drawn(written):
    for index, record in enumerate(read(written / "triplets.json")):
        triplet = draw_triplet(8, "train", index)
        assert record["multi_prompt"] == triplet.prompt
        assert record["facts"] == json.loads(json.dumps(triplet.facts()))
        np.testing.assert_array_equal(pixels(written / record["image"]), triplet.target)
        for path, picture in zip(record["entity_path"], triplet.entities, strict=True):
            np.testing.assert_array_equal(pixels(written / path), picture)
        if triplet.source is None:
            assert record["source_path"] == record["mask_path"] == []
        else:
            assert record["source_path"] == [record["entity_path"][triplet.source]]
            mask = pixels(written / record["mask_path"][0])
            np.testing.assert_array_equal(mask, 255 * triplet.mask)


def test_each_picture_has_a_name_of_its_own(written):
    records = read(written / "triplets.json")
    paths = [path for record in records for path in [record["image"], *record["entity_path"]]]
    paths += [path for record in records for path in record["mask_path"]]
    assert len(set(paths)) == len(paths)
    there = {path.relative_to(written).as_posix() for path in written.rglob("*.png")}
    assert there == set(paths)
    parts = sorted(path.name for path in (written / "pictures").iterdir())
    assert parts == ["00000", "00001", "00002"]
    assert not [path for path in written.rglob(".*")]


def test_a_shorter_list_has_the_same_triplets(written, tmp_path):
    write(Job(seed=8, count=3), tmp_path / "three")
    assert read(tmp_path / "three/triplets.json") == read(written / "triplets.json")[:3]


@pytest.mark.parametrize("stopped_at", [0, 5, 9])
def test_a_stopped_list_goes_on(written, tmp_path, monkeypatch, capsys, stopped_at):
    drawn = []

    def draw(seed, split, index, task=None, **more):
        if index == stopped_at and not drawn.count("stop"):
            drawn.append("stop")
            raise KeyboardInterrupt
        drawn.append(index)
        return draw_triplet(seed, split, index, task, **more)

    monkeypatch.setattr(triplet_files, "draw_triplet", draw)
    folder = tmp_path / "ten"
    options = ["--output", str(folder), "--count", "10", "--seed", "8"]
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 130
    assert "the very same command goes on" in capsys.readouterr().err
    assert not (folder / "triplets.json").exists()
    whole = 4 * (stopped_at // 4)
    assert len(list(folder.rglob("*_target.png"))) == whole
    killed = folder / "pictures" / f".{whole // 4:05d}.0123456789ab.new"
    killed.mkdir(parents=True)
    (killed / "000000_target.png").write_text("half")
    main(options)
    assert contents(folder) == contents(written)
    assert drawn[drawn.index("stop") + 1 :] == list(range(whole, 10))
    drawn.clear()
    drawn.append("stop")
    main(options)
    assert drawn == ["stop"]


def test_processes_write_the_same(written, tmp_path):
    folder = tmp_path / "ten"
    options = ["--output", str(folder), "--count", "10", "--seed", "8"]
    main([*options, "--workers", "2"])
    assert contents(folder) == contents(written)


def test_a_folder_of_other_things_is_refused(written, tmp_path, fails):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    options = ["--count", "10", "--seed", "8", "--output"]
    told = fails(main, [*options, str(tmp_path / "mine")])
    assert "holds other files (notes.txt); give another --output" in told.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    before = contents(written)
    for more in (["--count", "9"], ["--seed", "9"], ["--split", "test"], ["--tasks", "edit"],
                 ["--bench"]):  # fmt: skip
        told = fails(main, [*options, str(written), *more])
        assert "holds triplets of other options" in told.err
    assert contents(written) == before
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(main, [*options, str(tmp_path / "file")]).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "--count 0 makes no list; give 1 to"),
        (["--seed", "-1"], "the seed is -1"),
        (["--tasks", "edit", "edit"], "--tasks edit edit names one twice"),
        (["--tasks", "paint"], "invalid choice: 'paint'"),
        (["--bench", "--split", "train"], "--bench is of the split test"),
        (["--workers", "-1"], "--workers is -1; give a whole number from 0 to 256"),
    ],
)
def test_options_that_make_no_sense(tmp_path, fails, options, message):
    assert message in fails(main, ["--output", str(tmp_path / "new"), *options]).err
    assert not (tmp_path / "new").exists()


def test_some_tasks_take_turns(tmp_path):
    write(Job(count=5, tasks=("subject_edit", "edit")), tmp_path / "list")
    tasks = [record["task"] for record in read(tmp_path / "list/triplets.json")]
    assert tasks == ["subject_edit", "edit", "subject_edit", "edit", "subject_edit"]


# ----------------------------------------------------------------------------------------------
# the bench


def test_a_bench_has_four_lists_that_mige_reads(bench):
    for name, edits in (
        ("subjects", False), ("edits", True), ("add_bench", True), ("replace_bench", True)
    ):  # fmt: skip
        items = read_items(bench / f"{name}.json", None, edits)
        assert len(items) == 6
        assert len(read_pictures(items)) == len({path for item in items for path in item.paths})
        for item in items:
            assert len(split(item.text)) - 1 == len(item.paths)
        records = RecordList(bench / f"{name}.json")
        assert list(check_records(records, bench, LIMITS)) == list(range(6))
        assert {record.task for record in records} == {item.task for item in items}


@pytest.mark.parametrize("name", ["add", "replace"])
def test_items_have_the_keys_and_names_of_migebench(bench, name):
    order = {"add": 1, "replace": 0}[name]  # where the source stands
    for index, item in enumerate(read(bench / f"{name}_bench.json")):
        assert set(item) == KEYS | {"task", "facts"}
        assert item["idx"] == index
        assert item["image"] == f"{name}/{name}_target/{index}_target.png"
        assert item["source_path"] == [f"{name}/{name}_source/{index}_source.png"]
        entity = f"{name}/{name}_entity/{index}_entity"
        assert item["entity_path_white"] == [f"{entity}_white.png"]
        assert item["entity_path"][order] == item["source_path"][0]
        assert item["entity_path"][1 - order] == f"{entity}_black.png"
        assert item["mask_path"] == [f"{name}/{name}_mask/{index}_mask.png"]
        for key in ("caption", "multi_prompt", "target_caption", "object", "crop"):
            assert type(item[key]) is str
        assert item["object"] in item["target_caption"]
        (made,) = (toy for toy in item["facts"]["toys"] if toy["is_new"])
        assert item["object"].replace(" ", "_").endswith(made["kind"])
        assert made["reference"] == 1 - order
        black, white = (pixels(bench / f"{entity}_{ground}.png") for ground in ("black", "white"))
        assert not black[0, 0].any()
        assert (white[0, 0] == 255).all()
        look = Look(made["kind"], made["hue"], made["saturation"], made["value"])
        sprite = np.asarray(toy(look, 128).resize((96, 96)))  # three quarters of the side
        inner = sprite[..., 3] == 255
        for shown in (black, white):
            apart = np.abs(shown[16:112, 16:112][inner] - sprite[..., :3][inner].astype(int))
            assert np.median(apart) < 4


@pytest.mark.parametrize("name", ["add", "replace"])
def test_masks_of_a_bench_are_where_its_pictures_differ(bench, name):
    for item in read(bench / f"{name}_bench.json"):
        source, target, mask = (
            pixels(bench / path)
            for path in (item["source_path"][0], item["image"], item["mask_path"][0])
        )
        differs = (source != target).any(-1)
        assert set(np.unique(mask)) == {0, 255}
        assert not differs[mask == 0].any()
        assert differs[mask == 255].mean() > 0.6


def test_a_bench_is_of_the_split_test(bench):
    for index, item in enumerate(read(bench / "edits.json")):
        triplet = draw_triplet(8, "test", index, "edit")
        assert item["multi_prompt"] == triplet.prompt
        np.testing.assert_array_equal(pixels(bench / item["image"]), triplet.target)
    trained = {draw_triplet(8, "train", i, "edit").target.tobytes() for i in range(6)}
    assert not trained & {
        Image.open(bench / item["image"]).tobytes() for item in read(bench / "edits.json")
    }


def test_a_bench_of_some_tasks(tmp_path, capsys):
    main(["--output", str(tmp_path / "b"), "--count", "1", "--bench", "--tasks", "subject_edit"])
    names = ["add_bench.json", "replace_bench.json"]
    assert [Path(line).name for line in capsys.readouterr().out.split()] == names
    assert sorted(path.name for path in (tmp_path / "b").glob("*.json")) == [*names, "run.json"]
