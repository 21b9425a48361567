"""The command, from the bench to the report; numbers by hand."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_bench import change, noise, save_bench, save_mask
from tiny_judges import save_judges

from imagelab.io.images import read_image
from mige import benchmark, edit, generate
from mige.evaluation import extraction, report
from mige.evaluation.item import BenchItem
from mige.evaluation.measuring import Bench, Judges, Wanted, record_key
from mige.evaluation.models import Clip, Dino, Weights, find
from mige.evaluation.outputs import Output
from mige.items import Item

PAINTING = ["--steps", "2", "--seed", "3", "--device", "cpu", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, str]:
    folders = save_judges(tmp_path_factory.mktemp("judges"))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_bench(Path("bench"))


def arguments(*options, out="out") -> list[str]:
    given = ["--outputs", out, "--report", "report", "--device", "cpu", "--offline"]
    return [*given, *map(str, options)]


def run(*options, out="out") -> dict:
    benchmark.main(arguments(*options, out=out))
    return json.loads(Path("report/report.json").read_text())


def flat(path: str, *levels: int, size=(4, 2)) -> None:
    """A picture of one colour, or of one colour a column."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = np.array(levels * (size[0] // len(levels)), np.uint8)
    pixels = np.broadcast_to(columns[None, :, None], (size[1], size[0], 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def write(records, name="list.json") -> str:
    Path(name).write_text(json.dumps(records))
    return name


# ----------------------------------------------------------------------------------------------
# numbers by hand


@pytest.fixture
def brush(tmp_path, monkeypatch) -> list[str]:
    """Three edits whose outputs are 0.2, 0.4 and 0.6 from their black targets, on the left."""
    monkeypatch.chdir(tmp_path)
    flat("black.png", 0)
    save_mask(Path("mask.png"), 4, 2, (0, 0, 2, 2))
    for idx, level in enumerate((51, 102, 153)):
        flat(f"out/{idx}.png", level, level, 0, 0)
    record = {"source": "black.png", "target": "black.png", "mask": "mask.png", "instruction": "a"}
    return ["--bench", write([record] * 3), "--format", "magicbrush"]


def test_l1_and_l2_with_intervals_by_hand(brush):
    """Student's t for 2 degrees of freedom is 4.302653; the deviations of 0.2, 0.4, 0.6 are 0.2."""
    found = run(*brush)
    means = found["tasks"]["edit"]["means"]
    assert list(means) == ["L1", "L2", "L1 inside", "L2 inside", "L1 outside", "L2 outside"]
    assert means["L1 inside"]["mean"] == pytest.approx(0.4)
    assert means["L1 inside"]["half"] == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert means["L1"]["mean"] == pytest.approx(0.2)
    assert means["L1"]["half"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert means["L2 inside"]["mean"] == pytest.approx((0.04 + 0.16 + 0.36) / 3)
    assert means["L2"]["mean"] == pytest.approx((0.04 + 0.16 + 0.36) / 6)
    assert means["L1 outside"]["mean"] == means["L2 outside"]["half"] == 0
    assert {row["n"] for row in means.values()} == {3}
    assert [row["values"]["L1"] for row in found["rows"]] == pytest.approx([0.1, 0.2, 0.3])
    text = Path("report/report.md").read_text()
    assert "| L1 inside | 0.4000 ± 0.4968 | 3 |" in text
    assert "* 3 of 3 outputs measured" in text
    assert "No CLIP: it was not given (--clip, such as openai/clip-vit-base-patch32)" in text


def test_what_was_erased_is_inside_a_mask_of_magicbrush(brush):
    pixels = np.full((2, 4, 4), 255, np.uint8)
    pixels[:, :2, 3] = 0  # transparent on the left
    Image.fromarray(pixels).save("mask.png")
    means = run(*brush)["tasks"]["edit"]["means"]
    assert means["L1 inside"]["mean"] == pytest.approx(0.4)
    pixels[:, :, 3], pixels[:, 2:, :3] = 255, 0  # nothing was erased: white on the left
    Image.fromarray(pixels).save("mask.png")
    means = run(*brush)["tasks"]["edit"]["means"]
    assert means["L1 inside"]["mean"] == pytest.approx(0.4)


def test_without_masks(brush):
    assert list(run(*brush, "--no_mask")["all"]["means"]) == ["L1", "L2"]


def test_a_mask_of_all_has_no_outside(brush):
    save_mask(Path("mask.png"), 4, 2, (0, 0, 4, 2))
    means = run(*brush)["all"]["means"]
    assert list(means) == ["L1", "L2", "L1 inside", "L2 inside"]
    assert means["L1 inside"]["mean"] == means["L1"]["mean"] == pytest.approx(0.2)


def test_masks_and_outputs_of_another_size(brush):
    """The output and the mask get the target's size."""
    save_mask(Path("mask.png"), 8, 4, (0, 0, 4, 4))
    for idx, level in enumerate((51, 102, 153)):
        flat(f"out/{idx}.png", level, size=(9, 7))
    means = run(*brush)["all"]["means"]
    for name in ("L1", "L1 inside", "L1 outside"):
        assert means[name]["mean"] == pytest.approx(0.4)


def test_several_pictures_of_an_item_count_as_one(tmp_path, monkeypatch, judges):
    """Two pictures of the first subject, one of the second: two items, three pictures."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("dog.png", "cat.png", "dog2.png")):
        noise(number).save(name)
    Path("out").mkdir()
    for number, name in enumerate(
        ("dog_a_imagehere__0", "dog_a_imagehere__4", "cat_a_imagehere__0")
    ):
        noise(10 + number).save(f"out/{name}.png")
    records = [
        {"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>", "prompt": "a dog",
         "references": ["dog.png", "dog2.png"]},
        {"entity_path": ["cat.png"], "multi_prompt": "a<imagehere>", "prompt": "a cat"},
    ]  # fmt: skip
    found = run(
        "--bench", write(records), "--format", "dreambench", "--clip", judges["clip"], "--dino",
        judges["dino"],
    )  # fmt: skip
    part = found["tasks"]["subject"]
    assert (part["items"], part["pictures"]) == (2, 3)
    assert list(part["means"]) == ["CLIP-I", "CLIP-T", "DINO"]
    pictures = [noise(10), noise(11), noise(12)]
    for name, space in (
        ("CLIP-I", Clip(find("clip", judges["clip"], True), "cpu")),
        ("DINO", Dino(find("dino", judges["dino"], True), "cpu")),
    ):
        first, second, third = space.images(pictures)
        dog, cat, other = space.images([noise(0), noise(1), noise(2)])
        each = [float(first @ dog + first @ other) / 2, float(second @ dog + second @ other) / 2]
        wanted = (np.mean(each) + float(third @ cat)) / 2
        assert part["means"][name]["mean"] == pytest.approx(wanted, abs=1e-5)
        assert part["means"][name]["n"] == 2
        assert "against the references (mean over them)" in part["means"][name]["protocol"]
    assert [row["values"]["CLIP-I"] != row["values"]["DINO"] for row in found["rows"]] == [True] * 3


# ----------------------------------------------------------------------------------------------
# Emu Edit


def emu(*changes) -> str:
    """Edits of noise; the first numbers of the outputs are their idx."""
    records = []
    Path("out").mkdir(exist_ok=True)
    for number, changed in enumerate(changes):
        noise(number).save(f"in{number}.png")
        noise(20 + number).save(f"out/{number + 5}.jpg")
        records.append({
            "instruction": "make it red", "image": f"in{number}.png", "task": "color",
            "split": "test", "idx": number + 5, "input_caption": "a dog",
            "output_caption": "a red dog",
        } | changed)  # fmt: skip
    return write(records)


def test_emu_edit_against_its_sources(tmp_path, monkeypatch, judges):
    monkeypatch.chdir(tmp_path)
    bench = emu({}, {"output_caption": "a dog"}, {"task": "global"})
    found = run("--bench", bench, "--format", "emu", "--clip", judges["clip"])
    assert found["notes"][0].startswith("list.json has 3 items, and the test split of Emu Edit")
    means = found["all"]["means"]
    assert (means["CLIP-T"]["n"], means["CLIP-dir"]["n"], means["L1"]["n"]) == (3, 2, 3)
    assert "against the source" in means["L1"]["protocol"]
    assert found["tasks"]["color"]["notes"] == [
        "1 of 2 items have equal captions, and no CLIP-dir (idx 6)."
    ]
    assert found["tasks"]["global"]["notes"] == []
    clip = Clip(find("clip", judges["clip"], True), "cpu")
    outputs = clip.images([read_image(Path(f"out/{number + 5}.jpg")) for number in range(3)])
    sources = clip.images([noise(number) for number in range(3)])
    asked = clip.text("a red dog") - clip.text("a dog")
    change = outputs[0] - sources[0]
    wanted = float(change @ asked / change.norm() / asked.norm())
    assert found["rows"][0]["values"]["CLIP-dir"] == pytest.approx(wanted, abs=1e-5)
    wanted = float(outputs[1] @ clip.text("a dog"))
    assert found["rows"][1]["values"]["CLIP-T"] == pytest.approx(wanted, abs=1e-5)
    assert found["rows"][2]["values"]["CLIP-I"] == pytest.approx(
        float(outputs[2] @ sources[2]), abs=1e-5
    )
    pixels = [np.asarray(p, float) / 255 for p in (noise(0), read_image(Path("out/5.jpg")))]
    wanted = np.abs(pixels[0] - pixels[1]).mean()
    assert found["rows"][0]["values"]["L1"] == pytest.approx(wanted)
    one = run("--bench", bench, "--format", "emu", "--task", "global")
    assert list(one["tasks"]) == ["global"] and one["outputs"] == {"measured": 1, "of": 1}


def test_why_items_lack_measures(tmp_path, monkeypatch, judges):
    monkeypatch.chdir(tmp_path)
    save_mask(Path("mask.png"), 40, 30, (5, 6, 25, 20))
    bench = emu({"mask": "mask.png"}, {"output_caption": None}, {"input_caption": ""}, {})
    found = run("--bench", bench, "--clip", judges["clip"])
    assert found["tasks"]["edit"]["notes"] == [
        "1 of 4 items have no caption of what is wanted, and neither CLIP-T nor CLIP-dir (idx 6).",
        "1 of 4 items have no caption of the source, and no CLIP-dir (idx 7).",
        "3 of 4 items have no mask, and no measures inside and outside (idx 6, 7, 8).",
    ]
    means = found["all"]["means"]
    counts = [means[name]["n"] for name in ("CLIP-I", "CLIP-T", "CLIP-dir", "L1 inside")]
    assert counts == [4, 3, 2, 1]
    assert "items have no caption of the source" in Path("report/report.md").read_text()
    found = run("--bench", bench, "--no_mask")
    assert found["all"]["notes"] == []


def test_a_note_names_the_first_items():
    """Eleven are of one task; the tenth is the last that is named."""
    tasks = ["edit"] * 11 + ["a|b"]
    items = [BenchItem(Item(n, "a", (Path("in"),), 0), task, n) for n, task in enumerate(tasks)]
    measured = [(Output(n, 0, Path("o")), {"values": {}}) for n in range(12)]
    found = report.Findings({}, Bench(items, {}), measured, [], {"clip": ""})
    (told,) = report.notes(found, "edit")
    assert told.startswith("11 of 11 items have no caption of what is wanted, and neither CLIP-T")
    assert told.endswith("(idx 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …).")
    (told,) = report.notes(replace(found, measured=measured[9:]), None)
    assert told.endswith("(idx edit 9, edit 10, a\\|b 11).")


def test_the_swapped_split_ends_the_command(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    bench = emu({"split": "validation"})
    command = arguments("--bench", bench, "--format", "emu")
    assert "call themselves 'validation'" in fails(benchmark.main, command).err
    benchmark.main([*command, "--split", "validation"])
    assert "call themselves 'validation'" in fails(benchmark.main, arguments("--bench", bench)).err
    bench = emu({"target": "in0.png"})  # so it is not one of Emu Edit's
    told = fails(benchmark.main, arguments("--bench", bench, "--split", "test")).err
    assert "--split is of Emu Edit, and list.json is read as items; leave it out" in told


# ----------------------------------------------------------------------------------------------
# masks and entities of MIGEBench


def outputs_of_both() -> None:
    for task in ("add", "replace"):
        Path("out", task).mkdir(parents=True)
        for idx in (3, 7):
            noise(idx + 30 + len(task), 32, 32).save(f"out/{task}/{idx}.jpg")


def test_inside_and_outside_of_encoders_by_hand(bench, judges):
    """The mask's box is (5, 6, 25, 20); the source is looked at in the same way."""
    outputs_of_both()
    found = run("--bench", bench, "--clip", judges["clip"], "--dino", judges["dino"])
    row = found["rows"][0]
    assert (row["task"], row["idx"], row["output"]) == ("add", 3, "out/add/3.jpg")
    raw = read_image(Path("out/add/3.jpg"))
    output = raw.resize((40, 30), Image.Resampling.BICUBIC)
    target, source = (read_image(bench / f"add/3_{kind}.png") for kind in ("target", "source"))

    def outside(picture):
        picture = picture.copy()
        picture.paste((0, 0, 0), (5, 6, 25, 20))
        return picture

    views = {
        " inside": [picture.crop((5, 6, 25, 20)) for picture in (output, target, source)],
        " outside": [outside(picture) for picture in (output, target, source)],
        "": [raw, target, source],
    }
    clip = Clip(find("clip", judges["clip"], True), "cpu")
    dino = Dino(find("dino", judges["dino"], True), "cpu")
    asked = clip.text("a red dog on a shelf")
    way = asked - clip.text("a cup on a shelf")
    for place, pictures in views.items():
        one, wanted, before = clip.images(pictures)
        assert row["values"]["CLIP-I" + place] == pytest.approx(float(one @ wanted), abs=1e-5)
        assert row["values"]["CLIP-T" + place] == pytest.approx(float(one @ asked), abs=1e-5)
        cosine = torch.cosine_similarity(one - before, way, dim=0).item()
        assert row["values"]["CLIP-dir" + place] == pytest.approx(cosine, abs=1e-4)
        one, wanted, _ = dino.images(pictures)
        assert row["values"]["DINO" + place] == pytest.approx(float(one @ wanted), abs=1e-5)
    text = Path("report/report.md").read_text()
    assert "No measures of entities: no detector was given (--detector and --sam" in text
    for title in ("## add", "## replace", "## all tasks", "4 items, 4 pictures."):
        assert title in text
    line = next(line for line in text.splitlines() if line.startswith("| DINO inside |"))
    assert "ViTModel" in line and "shorter side 16 bicubic, middle 14×14" in line
    assert "black outside the mask, cropped to its box" in line


def test_entities(bench, judges, monkeypatch):
    """The detector finds the left half in the first picture alone; SAM takes all of it."""
    outputs_of_both()
    asked = []

    def detect(self, picture, noun):
        asked.append((picture.size, noun))
        return None if len(asked) > 1 else ((0.0, 0.0, 16.4, 32.0), 0.75, "a dog")

    monkeypatch.setattr(extraction.Extractor, "detect", detect)
    everything = lambda self, picture, box: np.ones(picture.size[::-1], bool)  # noqa: E731
    monkeypatch.setattr(extraction.Extractor, "segment", everything)
    options = [f"--{name}={judges[name]}" for name in ("clip", "dino", "detector", "sam")]
    found = run("--bench", bench, *options)
    assert asked == [((32, 32), "dog")] * 4
    first, second, *_ = found["rows"]
    assert first["entity"] == {"box": [0, 0, 16, 32], "score": 0.75, "phrase": "a dog"}
    assert second["entity"] == {"box": None, "score": None, "phrase": ""}
    clip = Clip(find("clip", judges["clip"], True), "cpu")
    pictures = [read_image(Path(f"out/add/{idx}.jpg")) for idx in (3, 7)]
    crops = clip.images([pictures[0].crop((0, 0, 16, 32)), pictures[1]])
    entities = clip.images([read_image(bench / f"add/{idx}_entity.png") for idx in (3, 7)])
    for row, crop, entity in zip((first, second), crops, entities, strict=True):
        assert row["values"]["CLIP-I of the entity"] == pytest.approx(
            float(crop @ entity), abs=1e-5
        )
    told = "Entity not found in {} of {} outputs; there the whole output counts."
    assert found["tasks"]["add"]["notes"] == [told.format(1, 2)]
    assert found["all"]["notes"] == [told.format(3, 4)]
    assert told.format(2, 2) in Path("report/report.md").read_text()
    protocol = found["all"]["means"]["DINO of the entity"]["protocol"]
    assert "GroundingDino" in protocol and "SamModel" in protocol and "ViTModel" in protocol


# ----------------------------------------------------------------------------------------------
# the chain of commands


def test_bench_to_items_to_edit_to_report(bench, model, judges, capsys):
    benchmark.main(["--bench", str(bench), "--write_items", "lists/items.json"])
    assert capsys.readouterr().out == "lists/items.json\n"
    edit.main([
        "--model", str(model), "--items", "lists/items.json", "--output_path", "out",
        "--num_images", "2", *PAINTING,
    ])  # fmt: skip
    options = [f"--{name}={folder}" for name, folder in judges.items()]
    found = run("--bench", bench, *options)
    assert found["outputs"] == {"measured": 8, "of": 8}
    assert [(row["item"], row["picture"]) for row in found["rows"]] == [
        (place, index) for place in range(4) for index in range(2)
    ]
    assert [found["tasks"][task]["items"] for task in ("add", "replace")] == [2, 2]
    assert set(found["all"]["means"]) == set(report.NAMES)
    part = run("--bench", bench, "--task", "replace")
    assert list(part["tasks"]) == ["replace"] and part["outputs"] == {"measured": 4, "of": 4}
    assert [row["values"]["L1"] for row in part["rows"]] == [
        row["values"]["L1"] for row in found["rows"] if row["task"] == "replace"
    ]
    output = read_image(Path("out/0005.png")).resize((40, 30), Image.Resampling.BICUBIC)
    target = read_image(bench / "replace/3_target.png")
    wanted = np.abs(np.asarray(output, float) - np.asarray(target)).mean() / 255
    assert found["rows"][5]["values"]["L1"] == pytest.approx(wanted)
    for name in ("sheet_0_add.png", "sheet_1_replace.png"):
        width, height = Image.open(Path("report", name)).size
        assert width == 6 * 196 - 4 and height > 2 * 144  # source, entity, mask, target, 2 outputs
    edit.main([
        "--model", str(model), "--items", "lists/items.json", "--output_path", "out",
        "--num_images", "2", *PAINTING,
    ])  # fmt: skip
    change(bench / "add_bench.json", 0, multi_prompt="put<imagehere>on<imagehere>")
    with pytest.raises(SystemExit) as stop:
        run("--bench", bench)
    assert stop.value.code == 2
    assert "0000.json was painted from" in capsys.readouterr().err


def test_subjects_to_items_to_generate_to_report(tmp_path, monkeypatch, model, judges):
    monkeypatch.chdir(tmp_path)
    noise(1).save("dog.png")
    records = [{"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>", "prompt": "a dog"}]
    options = ["--bench", write(records), "--format", "dreambench"]
    benchmark.main([*options, "--write_items", "items.json"])
    generate.main(
        ["--model", str(model), "--items", "items.json", "--output_path", "out", *PAINTING]
    )
    found = run(*options, "--clip", judges["clip"])
    clip = Clip(find("clip", judges["clip"], True), "cpu")
    one, dog = clip.images([read_image(Path("out/0000.png")), noise(1)])
    assert found["all"]["means"]["CLIP-I"]["mean"] == pytest.approx(float(one @ dog), abs=1e-5)
    assert found["all"]["means"]["CLIP-I"]["half"] is None


# ----------------------------------------------------------------------------------------------
# stopping and going on


def test_a_stopped_benchmark_goes_on(brush, monkeypatch, fails):
    measured, original = [], Wanted.measure

    def measure(self, output):
        if len(measured) == 2:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(output.getpixel((0, 0))[0])
        return original(self, output)

    monkeypatch.setattr(Wanted, "measure", measure)
    told = fails(benchmark.main, arguments(*brush), code=130)
    assert "stopped; the very same command goes on from here" in told.err
    assert measured == [51, 102, "stopped"] and not Path("report/report.json").exists()
    assert run(*brush)["all"]["means"]["L1"]["mean"] == pytest.approx(0.2)
    assert measured == [51, 102, "stopped", 153]
    flat("out/1.png", 153, 153, 0, 0)  # its numbers are known already
    assert run(*brush)["all"]["means"]["L1"]["mean"] == pytest.approx((0.1 + 0.3 + 0.3) / 3)
    flat("out/1.png", 204, 204, 0, 0)
    assert run(*brush)["all"]["means"]["L1"]["mean"] == pytest.approx((0.1 + 0.4 + 0.3) / 3)
    assert measured[4:] == [204]
    run(*brush, "--no_mask")
    assert measured[5:] == [51, 204, 153]


def test_other_models_texts_or_targets_are_measured_anew(brush, monkeypatch, judges):
    measured, original = [], Wanted.measure
    monkeypatch.setattr(
        Wanted, "measure", lambda self, output: measured.append(1) or original(self, output)
    )
    run(*brush)
    run(*brush, "--dino", judges["dino"])
    assert len(measured) == 6
    other = shutil.copytree(judges["dino"], "other")
    weights = load_file(f"{other}/model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, f"{other}/model.safetensors", {"format": "pt"})
    run(*brush, "--dino", other)
    assert len(measured) == 9
    measured.clear()
    flat("black.png", 0, 51)
    assert run(*brush)["rows"][0]["values"]["L1 outside"] == pytest.approx(0.1)
    assert len(measured) == 3
    change(Path("list.json"), 0, target_caption="a dog")
    run(*brush)
    assert len(measured) == 4


def test_a_record_is_of_all_that_its_numbers_depend_on():
    """Any other file, text, model or way to read masks gives a record another key."""
    item = BenchItem(
        Item(0, "a", (Path("in"), Path("cat")), 0), "add", 3, Path("target"), mask=Path("mask"),
        caption="x", target_caption="y", entities=(Path("cat"),), noun="cat",
    )  # fmt: skip
    names = ("in", "cat", "target", "mask")
    bench = Bench([item], {Path(name): name for name in names})
    output = Output(0, 0, Path("o.png"), "sha")
    judges = Judges({"clip": Weights("clip", "c", Path("c"), "digest")}, "cpu")
    others = [replace(bench, digests=bench.digests | {Path(name): "new"}) for name in names]
    for facts in ({"caption": "z"}, {"target_caption": "z"}, {"noun": "z"}, {"target": None}):
        others.append(replace(bench, items=[replace(item, **facts)]))
    others += [replace(bench, use_masks=False), replace(bench, erased=True)]
    keys = [record_key(each, output, judges) for each in [bench, *others]]
    keys.append(record_key(bench, replace(output, sha256="new"), judges))
    weights = replace(judges.weights["clip"], digest="new")
    keys += [record_key(bench, output, Judges(each, "cpu")) for each in ({}, {"clip": weights})]
    assert len(set(keys)) == len(keys) == 14
    elsewhere = replace(output, path=Path("moved.png"), index=1)
    assert record_key(bench, elsewhere, judges) == keys[0]


def test_an_output_that_changes_during_the_work_is_told(brush, monkeypatch, fails):
    original = Wanted.measure

    def measure(self, output):
        flat("out/1.png", 7)
        return original(self, output)

    monkeypatch.setattr(Wanted, "measure", measure)
    told = fails(benchmark.main, arguments(*brush)).err
    assert "out/1.png has changed since the work began; run the command again" in told


# ----------------------------------------------------------------------------------------------
# what is missing, and bad input


def test_missing_outputs(brush, fails):
    Path("out/0.png").unlink()
    Path("out/2.png").write_text("no picture")
    told = fails(benchmark.main, arguments(*brush)).err
    assert "2 of 3 outputs are missing or cannot be read, out/0.jpg first; paint them" in told
    assert "out/0.jpg: there is no such file\n" in told
    assert "out/2.png: out/2.png cannot be read as a picture" in told
    assert not Path("report").exists()
    found = run(*brush, "--allow_missing")
    assert found["outputs"] == {"measured": 1, "of": 3}
    assert [(each["idx"], each["output"]) for each in found["missing"]] == [
        (0, "out/0.jpg"), (2, "out/2.png"),
    ]  # fmt: skip
    assert found["all"]["means"]["L1"] | {"protocol": ""} == {
        "mean": pytest.approx(0.2), "half": None, "n": 1, "protocol": "",
    }  # fmt: skip
    text = Path("report/report.md").read_text()
    assert "* 1 of 3 outputs measured" in text and "* out/0.jpg: there is no such file" in text
    Path("out/1.png").unlink()
    assert "3 of 3 outputs are" in fails(benchmark.main, arguments(*brush, "--allow_missing")).err


BAD = [
    (["--bench", "no"], "there is no bench no"),
    (["--bench", "bench", "--task", "dance"], "MIGEBench has no task 'dance'"),
    (["--bench", "bench/add_bench.json", "--task", "dance"], "has no task 'dance'; its tasks are"),
    (["--bench", "bench", "--clip", "nowhere"], "there is no model folder nowhere; give --clip"),
    (["--bench", "bench", "--sam", "x"], "give both or neither"),
    (["--bench", "bench", "--sam", "x", "--detector", "y"], "measured by --clip or --dino"),
    (["--bench", "bench", "--device", "cuda:99"], "--device cuda:99 is not available here"),
    (["--bench", "bench", "--write_items", "x"], "leave out --outputs and --report"),
    (["--bench", "bench", "--report", "bench/add_bench.json"], "is a file, not a folder"),
    (["--bench", "subjects.json"], "subjects are measured by --clip and --dino; give one"),
    (["--bench", "bench", "--outputs", "nowhere"], "there is no folder nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "told"), BAD)
def test_the_command_refuses(options, told, bench, fails):
    outputs_of_both()
    noise(1).save("dog.png")
    write([{"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>"}], "subjects.json")
    before = sorted(Path().rglob("*"))
    assert told in fails(benchmark.main, [*arguments(), *options]).err
    assert sorted(Path().rglob("*")) == before


def test_writing_items_refuses(bench, fails):
    assert "give --outputs and --report, or" in fails(benchmark.main, ["--bench", "bench"]).err
    command = ["--bench", "bench", "--write_items"]
    told = fails(benchmark.main, [*command, "bench/add_bench.json"]).err
    assert "bench/add_bench.json is there already; give another --write_items" in told
    benchmark.main([*command, "new.json"])
    benchmark.main([*command, "new.json"])  # of the same content
    emu({}, {"task": "global"})
    command = ["--bench", "list.json", "--format", "emu", "--split", "any", "--task", "global"]
    assert (
        "whose numbers would be others"
        in fails(benchmark.main, [*command, "--write_items", "x"]).err
    )


def test_a_file_of_records_that_is_none(brush, fails):
    Path("report").mkdir()
    Path("report/records.jsonl").write_text("mine\n")
    told = fails(benchmark.main, arguments(*brush)).err
    assert "no record of an evaluation; move it away or give another --report" in told
    assert Path("report/records.jsonl").read_text() == "mine\n"


def test_a_report_of_another_bench_stays(brush, fails, tmp_path, monkeypatch):
    run(*brush)
    before = Path("report/report.json").read_bytes()
    other = shutil.copy("list.json", "other.json")
    command = arguments("--bench", other, *brush[2:])
    told = "report holds a report of another bench; give another --report"
    assert told in fails(benchmark.main, command).err
    facts = json.loads(before)
    assert facts.pop("bench_from_here") == "../list.json"
    Path("report/report.json").write_text(json.dumps(facts))  # as earlier ones are
    assert told in fails(benchmark.main, command).err
    flat("out/1.png", 153, 153, 0, 0)
    assert run(*brush)["rows"][1]["values"]["L1"] == pytest.approx(0.3)
    (tmp_path / "some/where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "some/where")  # from where the same bench is called otherwise
    away = ["--outputs", "../../out", "--report", "../../report", "--device", "cpu", *brush[2:]]
    benchmark.main([*away, "--bench", "../../list.json"])
    shutil.copy("../../list.json", "list.json")
    assert told in fails(benchmark.main, [*away, "--bench", "list.json"]).err


def test_a_report_has_a_folder_of_its_own(bench, brush, fails):
    before = sorted(Path().rglob("*"))
    for options, told in (
        ([*brush, "--report", "out"], "the folder out is that of --outputs; give another --report"),
        ([*brush, "--report", "out/../"], "is the bench's; give another --report"),
        (["--bench", "bench", "--report", "bench"], "the folder bench is the bench's; give"),
    ):
        assert told in fails(benchmark.main, [*arguments(), *options]).err
    assert sorted(Path().rglob("*")) == before
    Path("report").mkdir()
    Path("report/report.json").write_text('{"mine": 1}')
    told = fails(benchmark.main, arguments(*brush)).err
    assert "report.json: it has no 'bench'; give another --report" in told


def test_a_list_of_migebench_by_its_name(bench):
    outputs_of_both()
    found = run("--bench", bench / "replace_bench.json", out="out/replace")
    assert found["tasks"]["replace"]["items"] == 2
    assert "against the target" in found["all"]["means"]["L1"]["protocol"]


def test_texts_of_strangers_stay_in_their_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--bench", emu({"task": "a|b\n# <b>"}), "--format", "emu")
    assert "## a\\|b # &lt;b>\n" in Path("report/report.md").read_text()
    assert Path("report/sheet_0_a_b____b_.png").is_file()
