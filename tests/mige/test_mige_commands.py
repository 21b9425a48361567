"""The commands, from the command line to the files that they write; and bad input."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from imagelab.io.images import read_image
from mige import edit, generate, painting
from mige.config import Guidance, PaintingConfig
from mige.painting import Job
from mige.pipeline import MigePipeline

QUICK = ["--steps", "2", "--seed", "3", "--device", "cpu", "--mixed_precision", "no"]
SUBJECT = ["--prompt", "a <image> on the beach", "--images", "dog.png"]
EDIT = ["--instruction", "make it snow", "--source", "in.png"]


@pytest.fixture
def paint(model, place, capsys):
    """Run a command in ``place``; the paths that it printed."""

    def run(command, *options) -> list[Path]:
        capsys.readouterr()
        command.main(["--model", str(model), *map(str, options), *QUICK])
        told = capsys.readouterr().out.splitlines()
        assert told[0] == f"seed 3, {model} on cpu in float32"
        return [Path(line) for line in told[1:]]

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def facts_in(path: Path) -> dict:
    return json.loads(Image.open(path).text["mige"])


# ----------------------------------------------------------------------------------------------
# one request


def test_a_subject(paint, model, place):
    first, second, sheet = paint(generate, *SUBJECT, "--num_images", 2)
    assert (first, second) == (Path("output/mige/0000.png"), Path("output/mige/0001.png"))
    assert sheet == Path("output/mige/sheet_0000-0001.png")
    pipeline = MigePipeline.from_pretrained(model)
    wanted = pipeline(
        "a<imagehere>on the beach", [read_image(Path("dog.png"))], steps=2, seed=3, num_images=2
    ).images
    assert np.array_equal(pixels(first), wanted[0])
    assert np.array_equal(pixels(second), wanted[1])
    facts = json.loads(second.with_suffix(".json").read_text())
    assert facts.pop("pictures_sha256") == [sha256(Path("dog.png").read_bytes()).hexdigest()]
    assert facts | {"model": None, "pictures": None} == {
        "task": "subject", "text": "a<imagehere>on the beach", "pictures": None, "source": None,
        "is_global": False, "item": 0, "seed": 4, "first_seed": 3, "steps": 2, "text_scale": 7.0,
        "image_scale": 1.0, "width": 32, "height": 32, "model": None, "precision": "float32",
    }  # fmt: skip
    shown = facts_in(second)
    del shown["pictures_sha256"]
    assert shown == facts | {"model": facts["model"] | {"folder": model.name}}
    assert Image.open(sheet).width > 3 * 256  # the subject, then both pictures
    again = paint(generate, *SUBJECT)
    assert again[0] == Path("output/mige/0002.png")
    assert np.array_equal(pixels(again[0]), wanted[0])


def test_a_model_brings_its_numbers(paint, model, place, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    index = copy / "model_index.json"
    own = {"subject": {"steps": 1, "text_scale": 3.5}}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"guidance": own}))
    job = Job(MigePipeline.from_pretrained(copy), "m", "d", [], PaintingConfig(text_scale=2.0), {})
    assert job.guidance("subject") == Guidance(1, 2.0, 1.0)
    argv = ["--prompt", "a <image>", "--images", "dog.png", "--output_path", "own", "--seed", "3"]
    generate.main([*argv, "--model", str(copy), "--device", "cpu"])
    facts = facts_in(Path("own/0000.png"))
    wanted = MigePipeline.from_pretrained(model)(
        "a<imagehere>", [read_image(Path("dog.png"))], seed=3, steps=1, text_scale=3.5
    )
    assert np.array_equal(pixels(Path("own/0000.png")), wanted.images[0])
    assert (facts["steps"], facts["text_scale"], facts["image_scale"]) == (1, 3.5, 1.0)


def test_an_edit(paint, model):
    painted, _ = paint(edit, *EDIT, "--image_scale", 1.5, "--whole", "--output_path", "edits")
    source = read_image(Path("in.png"))
    wanted = MigePipeline.from_pretrained(model)(
        "make it snow of<imagehere>", source=source, steps=2, seed=3, image_scale=1.5
    )
    assert np.array_equal(pixels(painted), wanted.images[0])
    assert facts_in(painted)["task"] == "edit"


def test_an_edit_with_a_subject_in_both_orders(paint, model):
    options = ["--source", "in.png", "--images", "cat.png", "--instruction"]
    first, _ = paint(edit, *options, "replace <image> with <image>")
    second, _ = paint(edit, *options, "put <image> into <image>", "--order", 2)
    pictures = [Path(name).name for name in facts_in(second)["pictures"]]
    assert pictures == ["cat.png", "in.png"] and facts_in(second)["source"] == 1
    assert facts_in(first)["source"] == 0
    source, cat = (read_image(Path(name)) for name in ("in.png", "cat.png"))
    wanted = MigePipeline.from_pretrained(model)(
        "put <image> into <image>", [cat], source, 1, steps=2, seed=3
    )
    assert np.array_equal(pixels(second), wanted.images[0])


def test_a_subject_without_any_picture(paint):
    assert len(paint(generate, "--prompt", "a dog on the beach")) == 2


def test_other_sizes_and_batches(paint):
    size = ["--width", 48, "--height", 24]
    one = paint(generate, *SUBJECT, *size, "--num_images", 3, "--output_path", "one")
    all_ = paint(generate, *SUBJECT, *size, "--num_images", 3, "--batch_size", 3)
    assert Image.open(one[0]).size == (48, 24)
    for alone, together in zip(one[:3], all_[:3], strict=True):
        apart = abs(pixels(alone).astype(int) - pixels(together))
        assert apart.max() <= 1


# ----------------------------------------------------------------------------------------------
# lists

SUBJECTS = [
    {"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>on the beach", "prompt": "a dog"},
    {"entity_path": ["dog.png", "cat.png"], "multi_prompt": "a<imagehere>beside<imagehere>"},
    {"entity_path": [], "multi_prompt": "a red dog", "width": 9},
]
EDITS = [
    {"instruction": "Make the image red", "image": "in.png", "task": "global", "idx": 7},
    {"source_path": ["in.png"], "entity_path": ["in.png"], "multi_prompt": "make<imagehere>red"},
    {
        "source_path": ["in.png"],
        "entity_path": ["cat.png", "in.png"],
        "multi_prompt": "put<imagehere>in<imagehere>",
    },
]


def write_list(records, name="list.json") -> str:
    Path(name).write_text(json.dumps(records))
    return name


def test_a_list_of_subjects(paint):
    paths = paint(generate, "--items", write_list(SUBJECTS), "--num_images", 2)
    assert [path.name for path in paths[:6]] == [f"000{number}.png" for number in range(6)]
    assert paths[6].name == "sheet_0000-0005.png"
    found = [facts_in(path) for path in paths[:6]]
    assert [each["item"] for each in found] == [0, 0, 1, 1, 2, 2]
    assert [each["seed"] for each in found] == [3, 4] * 3
    # the first item is what the command alone paints
    alone, _ = paint(generate, *SUBJECT, "--output_path", "alone")
    assert np.array_equal(pixels(alone), pixels(paths[0]))
    assert not np.array_equal(pixels(paths[0]), pixels(paths[4]))


def test_a_list_of_edits(paint):
    paths = paint(edit, "--items", write_list(EDITS), "--batch_size", 2)
    found = [facts_in(path) for path in paths[:3]]
    assert [each["task"] for each in found] == ["edit", "edit", "subject_edit"]
    assert [each["source"] for each in found] == [0, 0, 1]
    assert [each["is_global"] for each in found] == [True, False, False]


def test_neither_order_nor_batches_change_a_list_s_pictures(paint, model):
    one = paint(generate, "--items", write_list(SUBJECTS), "--output_path", "one")
    two = paint(
        generate, "--items", write_list(SUBJECTS), "--output_path", "two", "--batch_size", 3
    )
    for alone, together in zip(one[:3], two[:3], strict=True):
        assert abs(pixels(alone).astype(int) - pixels(together)).max() <= 1


def test_a_stopped_list_goes_on(paint, monkeypatch, capsys):
    whole = paint(generate, "--items", write_list(SUBJECTS), "--output_path", "whole")
    painted = []
    original = MigePipeline.paint

    def stop_after_one(self, asked, *args):
        if painted and len(painted) == 1:
            painted.append(None)
            raise KeyboardInterrupt
        painted.append(asked)
        return original(self, asked, *args)

    monkeypatch.setattr(MigePipeline, "paint", stop_after_one)
    with pytest.raises(SystemExit) as stop:
        paint(generate, "--items", "list.json")
    assert stop.value.code == 130
    assert "stopped; the very same command goes on from here" in capsys.readouterr().err
    assert sorted(p.name for p in Path("output/mige").glob("*.png")) == ["0000.png"]
    before = Path("output/mige/0000.png").stat().st_mtime_ns
    again = paint(generate, "--items", "list.json")
    assert len(painted) == 2 + 2  # the two that were missing
    assert Path("output/mige/0000.png").stat().st_mtime_ns == before
    for first, second in zip(whole[:3], again[:3], strict=True):
        assert np.array_equal(pixels(first), pixels(second))
        assert facts_in(first) == facts_in(second)


def test_a_list_without_a_seed_goes_on_with_its_own(model, place, capsys):
    command = ["--model", str(model), "--items", write_list(SUBJECTS[:2]), "--steps", "1"]
    command += ["--device", "cpu", "--mixed_precision", "no"]
    generate.main(command)
    first = pixels(Path("output/mige/0001.png"))
    Path("output/mige/0001.png").unlink()
    generate.main(command)
    assert np.array_equal(pixels(Path("output/mige/0001.png")), first)
    seeds = {facts_in(Path(f"output/mige/000{n}.png"))["seed"] for n in range(2)}
    assert len(seeds) == 1


def test_a_list_s_folder_takes_no_other_work(paint, fails, model):
    paint(generate, "--items", write_list(SUBJECTS[:1]))
    before = {p: p.read_bytes() for p in Path("output/mige").iterdir()}
    command = ["--model", str(model), "--items", "list.json", *QUICK]
    write_list(SUBJECTS[:2])
    told = fails(generate.main, command)
    assert "holds pictures of another list" in told.err
    write_list(SUBJECTS[:1])
    assert "of other settings" in fails(generate.main, [*command, "--seed", "4"]).err
    picture(9).save("dog.png")
    assert "holds pictures of another list" in fails(generate.main, command).err
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("my own")
    told = fails(generate.main, [*command, "--output_path", "mine"])
    assert "mine holds other files (notes.txt); give another --output_path" in told.err
    assert {p: p.read_bytes() for p in Path("output/mige").iterdir()} == before


def test_a_list_s_folder_takes_no_single_picture(paint, fails, model):
    """It would have a number of the list's."""
    paint(generate, "--items", write_list(SUBJECTS[:1]))
    told = fails(generate.main, ["--model", str(model), *SUBJECT, *QUICK])
    assert "output/mige holds the pictures of a list; give another --output_path" in told.err


def test_a_list_goes_on_from_its_first_moment_and_past_damaged_pictures(paint):
    aside = Path("output/mige/.run.json.0123456789ab.part")
    aside.mkdir(parents=True)
    first, *_ = paint(generate, "--items", write_list(SUBJECTS[:2]))
    whole = pixels(first)
    first.write_bytes(first.read_bytes()[:100])
    Path("output/mige/0001.png").write_bytes(b"")
    again = paint(generate, "--items", "list.json")
    assert np.array_equal(pixels(again[0]), whole)
    assert Image.open(again[1]).size == (32, 32)


def test_a_list_is_the_same_by_any_path(paint, model, place):
    first, *_ = paint(generate, "--items", write_list(SUBJECTS[:1]))
    before = first.stat().st_mtime_ns
    shutil.copytree(model, place / "moved")
    argv = ["--model", str(place / "moved"), "--items", str(place / "list.json"), *QUICK]
    generate.main(argv)
    assert first.stat().st_mtime_ns == before


def test_a_picture_that_changes_during_the_work_is_told(paint, fails, model, monkeypatch):
    original = MigePipeline.paint

    def change(self, *args):
        picture(9).save("cat.png")
        return original(self, *args)

    monkeypatch.setattr(MigePipeline, "paint", change)
    write_list(SUBJECTS[:2])
    told = fails(generate.main, ["--model", str(model), "--items", "list.json", *QUICK])
    assert "item 1: cat.png has changed since the work began; run the command again" in told.err
    assert Path("output/mige/0000.png").is_file()


def test_sheets_of_long_lists(paint, monkeypatch):
    monkeypatch.setattr(painting, "SHEET_ITEMS", 2)
    paths = paint(generate, "--items", write_list(SUBJECTS))
    assert [path.name for path in paths[3:]] == ["sheet_0000-0001.png", "sheet_0002-0002.png"]


# ----------------------------------------------------------------------------------------------
# bad input


def broken():
    """Files that are no pictures, and an animated one."""
    Path("text.png").write_text("no picture")
    frames = [picture(seed) for seed in range(2)]
    frames[0].save("moving.webp", save_all=True, append_images=frames[1:])
    Path("half.png").write_bytes(Path("dog.png").read_bytes()[:200])
    Path("bad.json").write_text('[{"entity_path": [],\n "multi_prompt": }]')
    Path("object.json").write_text("{}")
    Path("lines.json").write_text('{"entity_path": []}\n{"entity_path": []}\n')
    Path("empty.json").write_text("[]")
    write_list([SUBJECTS[0], {"entity_path": ["dog.png"]}], "keys.json")
    write_list(
        [SUBJECTS[0], {"entity_path": ["no.png"], "multi_prompt": "a<imagehere>"}], "gone.json"
    )
    write_list([{"instruction": "red", "image": "no.png"}], "edit.json")
    write_list([{"entity_path": ["no.png"], "multi_prompt": "a<imagehere>"}], "alone.json")
    write_list([SUBJECTS[0] | {"task": "dance"}], "task.json")
    write_list([SUBJECTS[0], EDITS[0]], "mixed.json")
    write_list([{"source_path": ["in.png"], "entity_path": [], "multi_prompt": "a"}], "lost.json")
    write_list([SUBJECTS[0], SUBJECTS[0] | {"multi_prompt": "a dog"}], "marks.json")


GENERATE = [
    (["--prompt", "a <image>"], "has 1 mark <image> and there are no pictures; give a picture"),
    (["--prompt", "a dog", "--images", "dog.png"], "there is 1 picture and the instruction"),
    (["--prompt", "<image>", "--images", "dog.png"], "has no words; say what is to be painted"),
    (["--prompt", " "], "has no words"),
    (["--prompt", "..!"], "has no words"),
    (["--prompt", "a" + " " * 5000], "has 5001 letters; give at most 4000"),
    (["--prompt", "a", "--root", "here"], "--root is for the paths of a list; give --items"),
    (["--prompt", "red " * 30], "and the model reads 24; shorten it"),
    (["--prompt", "red " * 100], "has 101 words with those that the model puts before it"),
    (["--prompt", "a " + "<image>" * 5, "--images", *["dog.png"] * 5], "this model takes 4"),
    ([], "there is nothing to paint; give --prompt, or a list with --items"),
    (["--prompt", "a", "--items", "list.json"], "--items and --prompt are both given"),
    (
        ["--prompt", "a <image>", "--images", "no.png"],
        "there is no picture no.png; give a JPEG, PNG or WebP file that is there",
    ),
    (["--prompt", "a <image>", "--images", "text.png"], "text.png cannot be read as a picture"),
    (["--prompt", "a <image>", "--images", "half.png"], "half.png cannot be read as a picture"),
    (["--prompt", "a <image>", "--images", "moving.webp"], "moving.webp is animated"),
    (["--items", "no.json"], "there is no list no.json"),
    (["--items", "bad.json"], "bad.json is not valid JSON: Expecting value, line 2, column 18"),
    (["--items", "object.json"], "object.json is a JSON object and not an array; put"),
    (["--items", "lines.json"], "lines.json has a JSON object a line (JSONL); put the lines into"),
    (["--items", "empty.json"], "empty.json has 0 items"),
    (["--items", "keys.json"], "keys.json: item 1: it has no 'multi_prompt'"),
    (["--items", "gone.json"], "item 1: there is no picture no.png; is --root right?"),
    (["--items", "alone.json"], "there is no picture no.png; is --root right?"),
    (["--items", "task.json"], "task.json: item 0 says the task 'dance', and there is no such"),
    (["--items", "mixed.json"], "mixed.json: item 1 edits a picture: use mige.edit"),
    (["--items", "lost.json"], "item 0: entity_path lacks the source in.png"),
    (["--items", "marks.json"], "item 1: there is 1 picture and the instruction 'a dog' has"),
    (["--prompt", "a", "--steps", "0"], "--steps is 0; give a whole number from 1 to 1000"),
    (["--prompt", "a", "--width", "33"], "--width is 33, and this model paints multiples of 8"),
    (["--prompt", "a", "--text_scale", "nan"], "--text_scale is nan; give a number from 0"),
    (["--prompt", "a", "--num_images", "0"], "--num_images is 0"),
    (["--prompt", "a", "--seed", "-1"], "the seed is -1"),
    (["--prompt", "a", "--mixed_precision", "fp16"], "fp16 overflows in T5"),
    (["--prompt", "a", "--offload"], "--offload saves a GPU's memory; leave it out on the CPU"),
    (["--prompt", "a", "--device", "cuda:99"], "--device cuda:99 is not available here"),
    (["--prompt", "a", "--output_path", "dog.png/x"], "dog.png is a file, not a folder"),
    (["--prompt", "a", "--model", "nowhere"], "folder nowhere; toybox is one that comes along, `"),
    (["--prompt", "a", "--model", "."], "is no model folder: it has no model_index.json"),
]  # fmt: skip
EDITING = [
    (["--instruction", "make it snow"], "give --source and --instruction, or a list"),
    (["--source", "in.png"], "give --source and --instruction, or a list with --items"),
    ([*EDIT, "--items", "list.json"], "--items and --source are both given"),
    (
        [*EDIT, "--order", "2"],
        "--order is 2, and with the source there are 1; give a number from 1 to 1",
    ),
    ([*EDIT, "--images", "cat.png"], "there are 2 pictures and the instruction 'make it snow'"),
    (["--instruction", "", "--source", "in.png"], "has no words"),
    (["--instruction", "the image", "--source", "in.png"], "has no words"),
    (["--items", "list.json", "--instruction", "a"], "--items and --instruction are both given"),
    (["--items", "list.json", "--whole"], "--order and --whole are for a single edit"),
    (
        [*EDIT, "--images", "cat.png", "--whole"],
        "--whole is for edits without --images; leave it out",
    ),
    (
        ["--instruction", "make <image> like <image>", "--source", "in.png"],
        "the instruction 'make<imagehere>like<imagehere>' has 2 marks <image> and there is 1 pic",
    ),
    (["--items", "list.json"], "list.json: item 0 edits none: use mige.generate"),
    (["--items", "edit.json"], "there is no picture no.png; is --root right?"),
    (
        ["--instruction", "make it snow", "--source", "nope.png"],
        "there is no picture nope.png; give a JPEG",
    ),
]


def fails_before_work(command, options, told, model, fails, monkeypatch):
    """Exit code 2 and one sentence, and nothing has been encoded or written."""
    broken()
    write_list(SUBJECTS)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    monkeypatch.setattr(MigePipeline, "encode", lambda *_: pytest.fail("work began"))
    argv = ["--model", str(model), *QUICK, *options]
    found = fails(command.main, argv)
    assert told in found.err
    assert len(found.err.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("options", "told"), GENERATE)
def test_generate_refuses(options, told, model, place, fails, monkeypatch):
    fails_before_work(generate, options, told, model, fails, monkeypatch)


@pytest.mark.parametrize(("options", "told"), EDITING)
def test_edit_refuses(options, told, model, place, fails, monkeypatch):
    fails_before_work(edit, options, told, model, fails, monkeypatch)


def test_a_model_with_a_part_missing(model, place, fails):
    copy = shutil.copytree(model, place / "copy")
    shutil.rmtree(copy / "vae")
    told = fails(generate.main, ["--model", "copy", *SUBJECT, *QUICK])
    assert "the model copy has no folder 'vae'; make or fetch it again" in told.err
