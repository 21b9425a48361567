"""Benches and outputs: how lists are read, and which picture is of which item."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image
from tiny_bench import ADDED, REPLACED, change, noise, save_bench

from imagelab.errors import UserError
from mige.evaluation import lists
from mige.evaluation.lists import read_bench, written_items
from mige.evaluation.measuring import read_bench_pictures
from mige.evaluation.outputs import find_outputs
from mige.items import read_items


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_bench(Path("bench"))


def read(records, form, split="any", root=None, tasks=()):
    """The items of a list, and the notes."""
    Path("list.json").write_text(json.dumps(records))
    split = split if form == "emu" else None
    return read_bench(Path("list.json"), form, root, tasks, split)


# ----------------------------------------------------------------------------------------------
# formats


def test_both_tasks_of_migebench(bench):
    items, notes = read_bench(bench, None, None, (), None)
    assert [(each.task, each.idx) for each in items] == [
        ("add", 3), ("add", 7), ("replace", 3), ("replace", 7),
    ]  # fmt: skip
    added, _, replaced, _ = items
    assert added.item.text == ADDED and replaced.item.text == REPLACED
    assert (added.item.source, replaced.item.source) == (1, 0)
    assert added.source == bench / "add/3_source.png"
    assert added.against == "target" and added.compared == (bench / "add/3_target.png",)
    assert added.entities == (bench / "add/3_entity.png",)
    assert replaced.entities == (bench / "replace/3_entity.png",)
    assert replaced.mask == bench / "replace/3_mask.png" and replaced.noun == "dog"
    assert (added.caption, added.target_caption) == ("a cup on a shelf", "a red dog on a shelf")
    assert notes == []
    alone, _ = read_bench(bench, None, None, ["replace"], None)
    assert [each.task for each in alone] == ["replace"] * 2


def test_a_written_list_is_the_same_to_those_who_paint(bench):
    items, _ = read_bench(bench, None, None, (), None)
    Path("lists").mkdir()
    path = Path("lists/items.json")
    path.write_text(json.dumps(written_items(items, path.parent)))
    painted = read_items(path, None, edits=True)
    assert [each.text for each in painted] == [each.item.text for each in items]
    assert [each.source for each in painted] == [1, 1, 0, 0]
    for mine, theirs in zip(items, painted, strict=True):
        assert [p.resolve() for p in theirs.paths] == [p.resolve() for p in mine.item.paths]


def test_dreambench(bench):
    Path("dog").mkdir()
    for number in range(3):
        noise(number).save(f"dog/{number:02d}.jpg")
    Path("dog/notes.txt").write_text("none")
    records = [
        {"entity_path": ["dog/01.jpg"], "multi_prompt": "a<imagehere>", "prompt": "a dog"},
        {"entity_path": ["dog/01.jpg"], "multi_prompt": "a<imagehere>", "references": "dog"},
        {
            "entity_path": ["dog/01.jpg"], "multi_prompt": "a<imagehere>/b",
            "references": ["dog/02.jpg"],
        },
    ]  # fmt: skip
    items, _ = read(records, "dreambench")
    assert items[0].compared == (Path("dog/01.jpg"),) and items[0].target_caption == "a dog"
    assert items[1].compared == tuple(Path(f"dog/0{n}.jpg") for n in range(3))
    assert items[2].compared == (Path("dog/02.jpg"),) and items[2].target_caption is None
    assert {each.against for each in items} == {"references"}
    assert items[2].release_name == "01_a<imagehere> or b".replace("<", "_").replace(">", "_")


def test_magicbrush(bench):
    record = {"source": "s.png", "target": "t.png", "mask": "m.png", "instruction": "make it red"}
    (item,), _ = read([record | {"target_caption": "a red cup"}], "magicbrush")
    assert (item.source, item.target, item.mask) == (Path("s.png"), Path("t.png"), Path("m.png"))
    assert item.caption is None and item.target_caption == "a red cup" and item.task == "edit"


EMU = {
    "instruction": "make it snow", "image": "in.jpg", "task": "global", "split": "test", "idx": 5,
    "hash": "ab", "input_caption": "a dog", "output_caption": "a dog in snow",
}  # fmt: skip


def test_emu_edit(bench):
    other = EMU | {"task": "add", "output_caption": "a dog", "idx": 0}
    items, notes = read([EMU, other], "emu", "test")
    first, second = items
    assert first.against == "source" and first.compared == (Path("in.jpg"),)
    assert first.item.is_global and not second.item.is_global
    assert [(each.task, each.idx) for each in items] == [("global", 5), ("add", 0)]
    assert not first.has_equal_captions and second.has_equal_captions
    assert notes == [
        "list.json has 2 items, and the test split of Emu Edit has 3589: these are the other "
        "split, or a part"
    ]
    assert written_items(items, Path())[0] == {
        "instruction": "make it snow", "image": "in.jpg", "task": "global",
    }  # fmt: skip


def test_the_swapped_splits_of_emu_edit(bench, monkeypatch):
    monkeypatch.setattr(lists, "TEST_ITEMS", 3)
    wrong = EMU | {"split": "validation"}
    told = "--split is test, and 1 of 2 items call themselves 'validation', as item 1 does"
    with pytest.raises(UserError, match=told):
        read([EMU, wrong], "emu", "test")
    with pytest.raises(UserError, match="the splits of Emu Edit swapped"):
        read([wrong] * 3, "emu", "test")
    unnamed = {key: value for key, value in EMU.items() if key != "split"}
    with pytest.raises(UserError, match="has 3 items, as many as the test split, and --split is"):
        read([unnamed] * 3, "emu", "validation")
    assert read([unnamed] * 3, "emu", "test")[1] == []
    assert read([wrong] * 2, "emu", "validation")[1] == []
    assert read([EMU, wrong], "emu", "any")[1] == []


def test_items_with_whatever_is_known(bench):
    marked = {"entity_path": ["b.png", "a.png"], "multi_prompt": "put<imagehere>in<imagehere>"}
    items, _ = read(
        [
            {"instruction": "make it red", "image": "a.png", "target": "t.png", "caption": "a"},
            marked | {"source_path": ["a.png"], "object": "dog", "mask_path": ["m.png"]},
            {"entity_path": ["a.png"], "multi_prompt": "a<imagehere>", "prompt": "a dog"},
        ],
        None,
    )
    assert [each.task for each in items] == ["edit", "subject_edit", "subject"]
    assert [each.against for each in items] == ["target", "source", "references"]
    assert items[1].entities == (Path("b.png"),) and items[1].mask == Path("m.png")
    assert items[2].target_caption == "a dog"


BROKEN = [
    ("migebench", {"image": "t.png"}, "item 0: it has no 'entity_path'"),
    ("magicbrush", {"source": 3, "target": "t", "instruction": "a"}, "source is 3 and not text"),
    ("emu", EMU | {"image": "../in.jpg"}, "the path '../in.jpg' leaves the folder"),
    ("emu", EMU | {"image": "/etc/in.jpg"}, "leaves the folder"),
    ("emu", EMU | {"image": "a/../../in.jpg"}, "leaves the folder"),
    ("emu", EMU | {"image": ""}, "leaves the folder"),
    ("emu", EMU | {"output_caption": ["a"]}, "output_caption is a list and not text"),
    ("emu", EMU | {"output_caption": "a" * 4001}, "has 4001 letters; give at most 4000"),
    ("emu", EMU | {"instruction": "\ud800"}, "is not UTF-8 text"),
    ("emu", EMU | {"idx": "5"}, "idx is '5' and not a whole number"),
    ("dreambench", {"entity_path": [], "multi_prompt": "a", "references": "no"}, "no folder no"),
    (
        "dreambench",
        {"entity_path": ["a"], "source_path": ["a"], "multi_prompt": "a"},
        "it edits a picture, and subjects do not",
    ),
    (
        "items",
        {"entity_path": ["a"], "source_path": ["b"], "multi_prompt": "a"},
        "entity_path lacks the source b",
    ),
    ("items", {"entity_path": ["a"], "source_path": ["a", "b"], "multi_prompt": ""}, "list of one"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "record", "told"), BROKEN)
def test_broken_items(form, record, told, bench):
    with pytest.raises(UserError, match="item 0: ") as error:
        read([record], form)
    assert told in str(error.value)


def test_a_root_may_lie_above(bench):
    Path("lists").mkdir()
    Path("lists/l.json").write_text(json.dumps([EMU | {"image": "bench/in.jpg"}]))
    (item,), _ = read_bench(Path("lists/l.json"), "emu", Path("."), (), "any")
    assert item.source == Path("bench/in.jpg")


def test_a_bench_behind_a_byte_order_mark(bench):
    Path("list.json").write_text(json.dumps([EMU]), encoding="utf-8-sig")
    (item,), _ = read_bench(Path("list.json"), "emu", None, (), "any")
    assert item.source == Path("in.jpg")


def test_benches_that_are_none(bench):
    Path("lines.json").write_text("{}\n{}\n")
    for path, form, told in (
        ("no", None, "there is no bench no"),
        ("bench/add", None, "bench/add has none of add_bench.json, replace_bench.json"),
        ("bench", "emu", "bench is a folder; give the JSON list that is meant"),
        ("lines.json", None, r"lines.json has a JSON object a line \(JSONL\); .*mige_measuring"),
        ("bench/add/3_mask.png", None, "3_mask.png is not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=told):
            read_bench(Path(path), form, None, (), None)
    with pytest.raises(UserError, match="MIGEBench has no task 'dance'; its tasks are add, repl"):
        read_bench(bench, None, None, ["dance"], None)
    with pytest.raises(UserError, match="list.json has 0 items"):
        read([], None)
    (bench / "replace_bench.json").unlink()
    with pytest.raises(UserError, match="no file bench/replace_bench.json"):
        read_bench(bench, None, None, ["replace"], None)


def test_a_picture_that_is_missing_is_told_with_its_item(bench):
    items, _ = read_bench(bench, None, None, (), None)
    (bench / "replace/3_target.png").unlink()
    with pytest.raises(
        UserError, match=r"item 2: .* bench/replace/3_target.png; is --root right\?$"
    ):
        read_bench_pictures(items, True, False)
    noise(1).save(bench / "replace/3_target.png")
    Image.new("L", (40, 30)).save(bench / "replace/7_mask.png")
    with pytest.raises(UserError, match="item 3: .*7_mask.png is empty .* with --no_mask"):
        read_bench_pictures(items, True, False)
    (bench / "replace/7_mask.png").unlink()
    told = (
        r"3: there is no picture .*7_mask.png; is --root right\? Or leave all masks out with --no"
    )
    with pytest.raises(UserError, match=told):
        read_bench_pictures(items, True, False)
    assert len(read_bench_pictures(items, False, False).digests) == 12


# ----------------------------------------------------------------------------------------------
# outputs of the release


def found(items, folder="out", **asked):
    """(place, index, name, whether it is there) of all outputs."""
    digests = read_bench_pictures(items, True, False).digests
    return [
        (each.place, each.index, each.path.name, each.sha256 is not None)
        for each in find_outputs(items, Path(folder), digests, **asked)
    ]


def save(*names: str) -> None:
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        noise(number + 50, 32, 32).save(name)


def test_release_names_of_one_task(bench):
    items, _ = read_bench(bench, None, None, ["add"], None)
    save("out/7.jpg", "out/3.png")
    Path("out/notes.txt").write_text("mine")
    assert found(items) == [(0, 0, "3.png", True), (1, 0, "7.jpg", True)]
    save("out/3.jpg")
    with pytest.raises(UserError, match="out holds 3.jpg and 3.png; leave one of them"):
        found(items)


def test_numbers_of_two_tasks_collide(bench):
    items, _ = read_bench(bench, None, None, (), None)
    save("out/3.jpg", "out/7.jpg")
    with pytest.raises(UserError, match="2 items of the bench have the output 3; put the outputs"):
        found(items)
    save("both/add/3.jpg", "both/replace/7.jpg", "both/replace/3.jpg")
    assert found(items, "both") == [
        (0, 0, "3.jpg", True), (1, 0, "7.jpg", False), (2, 0, "3.jpg", True), (3, 0, "7.jpg", True),
    ]  # fmt: skip
    save("half/add/3.jpg")
    with pytest.raises(UserError, match="a folder add and none for the task replace"):
        found(items, "half")


def test_one_task_of_a_list(bench):
    """Named by the release, in a folder of their own or beside others'."""
    noise(1).save("in.jpg")
    items, _ = read([EMU | {"idx": 3}, EMU | {"idx": 4, "task": "color"}], "emu")
    color = {"tasks": ["color"]}
    save("apart/color/4.jpg", "both/3.jpg", "both/4.jpg")
    assert (
        found(items, "apart", **color) == found(items, "both", **color) == [(1, 0, "4.jpg", True)]
    )
    save("both/5.jpg")
    with pytest.raises(UserError, match="5.jpg, which is the output of no item of the bench"):
        found(items, "both", **color)


def test_a_task_of_a_stranger_names_no_folder_above(bench):
    items, _ = read([EMU | {"task": ".."}], "emu")
    noise(1).save("in.jpg")
    save("out/5.jpg", "5.jpg")
    (output,) = find_outputs(items, Path("out"), read_bench_pictures(items, True, False).digests)
    assert output.path == Path("out/5.jpg")


def test_release_names_of_subjects(bench):
    noise(1).save("dog.png")
    record = {"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>on a sofa/bed?"}
    items, _ = read([record, record | {"multi_prompt": "a<imagehere>_1"}], "dreambench")
    stem = "out/dog_a_imagehere_on a sofa or bed_"
    save(f"{stem}_0.jpg", f"{stem}_12.jpg", "out/dog_a_imagehere__1_7.jpg")
    assert found(items) == [
        (0, 0, Path(f"{stem}_0.jpg").name, True), (0, 1, Path(f"{stem}_12.jpg").name, True),
        (1, 0, "dog_a_imagehere__1_7.jpg", True),
    ]  # fmt: skip


def test_an_unreadable_output_is_missing(bench):
    items, _ = read_bench(bench, None, None, ["add"], None)
    save("out/3.jpg")
    Path("out/7.jpg").write_bytes(b"no picture")
    digests = read_bench_pictures(items, True, False).digests
    first, second = find_outputs(items, Path("out"), digests)
    assert first.sha256 == sha256(Path("out/3.jpg").read_bytes()).hexdigest() and not first.reason
    assert second.sha256 is None and "cannot be read as a picture" in second.reason


def test_outputs_of_another_list_by_their_names(bench):
    items, _ = read_bench(bench, None, None, ["add"], None)
    save("out/3.jpg", "out/7.jpg", "out/8.jpg")
    with pytest.raises(UserError, match="8.jpg, which is the output of no item of the bench"):
        found(items)
    with pytest.raises(UserError, match="there is no folder nowhere"):
        found(items, "nowhere")


# ----------------------------------------------------------------------------------------------
# numbered outputs


def paint(items, count=1, folder="out", **changed) -> None:
    """What mige.edit leaves of a list, written by hand."""
    for place, item in enumerate(items):
        for index in range(count):
            number = place * count + index
            save(f"{folder}/{number:04d}.png")
            facts = {
                "item": place, "text": item.item.text, "source": item.item.source,
                "is_global": item.item.is_global, "seed": 5 + index, "first_seed": 5,
                "pictures_sha256": [sha256(p.read_bytes()).hexdigest() for p in item.item.paths],
            }  # fmt: skip
            facts |= changed if number == 0 else {}
            Path(f"{folder}/{number:04d}.json").write_text(json.dumps(facts))
    Path(folder, "run.json").write_text(json.dumps({"items": len(items)}))


def test_numbered_outputs(bench):
    items, _ = read_bench(bench, None, None, (), None)
    paint(items, 2)
    save("out/sheet_0000-0007.png")
    wanted = [(n // 2, n % 2, f"{n:04d}.png", True) for n in range(8)]
    assert found(items) == wanted
    Path("out/0005.png").unlink()
    Path("out/0006.json").unlink()
    wanted[5], wanted[6] = (2, 1, "0005.png", False), (3, 0, "0006.png", False)
    assert found(items) == wanted


def test_numbered_outputs_of_each_task(bench):
    items, _ = read_bench(bench, None, None, (), None)
    paint(items[:2], folder="out/add")
    paint(items[2:], folder="out/replace")
    assert [each[:3] for each in found(items)] == [
        (0, 0, "0000.png"), (1, 0, "0001.png"), (2, 0, "0000.png"), (3, 0, "0001.png"),
    ]  # fmt: skip


OTHERS = [
    ({"text": "make it red"}, "was painted from 'make it red', and the bench says 'put<im"),
    ({"pictures_sha256": ["0" * 64] * 2}, "was painted from other pictures than the bench has"),
    ({"source": 0}, "was painted from other pictures"),
    ({"is_global": True}, "was painted as another kind of edit"),
    ({"item": 1}, "0000.json is of picture 0 of item 1, which has another number"),
    ({"seed": "a"}, "seed is 'a' and not a whole number"),
    ({"seed": 2**62}, "pictures of an item"),
]


@pytest.mark.parametrize(("changed", "told"), OTHERS)
def test_numbered_outputs_of_another_list(changed, told, bench):
    items, _ = read_bench(bench, None, None, (), None)
    paint(items, **changed)
    with pytest.raises(UserError, match=told):
        found(items)


def test_numbered_outputs_of_a_list_of_another_length(bench):
    items, _ = read_bench(bench, None, None, (), None)
    paint(items)
    with pytest.raises(UserError, match="from a list of 4 items, and the bench has 2"):
        found(items[:2])


def test_a_bench_that_changed_is_another_list(bench):
    items, _ = read_bench(bench, None, None, (), None)
    paint(items)
    assert len(found(items)) == 4
    noise(99).save(bench / "replace/7_entity.png")
    with pytest.raises(UserError, match="0003.json was painted from other pictures"):
        found(items)
    change(bench / "add_bench.json", 1, multi_prompt="put<imagehere>on<imagehere>")
    items, _ = read_bench(bench, None, None, (), None)
    with pytest.raises(UserError, match="0001.json was painted from 'put<imagehere>in<imagehere>'"):
        found(items)
