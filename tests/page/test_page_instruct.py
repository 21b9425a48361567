"""The tab of MIGE: its commands, what it shows, and a browser from pictures to an edit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from browser import fill, shoot, value_of, wait_until
from PIL import Image, PngImagePlugin

from imagelab.errors import UserError
from mifo_page import places as folders
from mifo_page.instruct import instruction_command
from mige import edit, generate
from toybox.scenes.triplets import draw_triplet

WITHOUT_MARK = ("make it blue", "/a/in.png", [])


def test_without_a_picture_to_edit_subjects_are_painted(places):
    argv = instruction_command(
        places, "a <image> by a <image>", None, ["/a/1.png", "/a/2.png"], seed=3, num_images=2
    )
    assert argv[:3] == ["python", "-m", "mige.generate"]
    options = generate.parse_args(argv[3:])[1]
    assert (options.model, options.prompt) == ("toybox", "a <image> by a <image>")
    assert options.images == [Path("/a/1.png"), Path("/a/2.png")]
    assert options.output_path == Path(places.output_path, "mige")
    assert (options.seed, options.num_images, options.steps) == (3, 2, None)


def test_with_one_it_is_edited(places):
    text = "put <image> into <image>"
    argv = instruction_command(places, text, "/a/in.png", ["/a/1.png"], order=2, text_scale=3.5)
    assert argv[:3] == ["python", "-m", "mige.edit"]
    options = edit.parse_args(argv[3:])[1]
    assert (options.instruction, options.source) == (text, Path("/a/in.png"))
    assert (options.images, options.order) == ([Path("/a/1.png")], 2)
    assert (options.text_scale, options.num_images) == (3.5, 1)
    # the only picture may go without a mark
    argv = instruction_command(places, *WITHOUT_MARK)
    assert edit.parse_args(argv[3:])[1].images == []
    # the model and the device are those that the page was started with
    argv = instruction_command(replace(places, mige_model="O/model", device="cpu"), *WITHOUT_MARK)
    options = edit.parse_args(argv[3:])[1]
    assert (options.model, options.device) == ("O/model", "cpu")


@pytest.mark.parametrize("text", ["--output_path=/etc <image>", "-h <image>", "$(reboot) <image>"])
def test_no_text_becomes_an_option(places, text):
    options = generate.parse_args(instruction_command(places, text, None, ["1.png"])[3:])[1]
    assert options.prompt == text and options.output_path == Path(places.output_path, "mige")


@pytest.mark.parametrize(
    "text, source, pictures, told",
    [
        ("a <image>", None, [], "has 1 <image> and there are 0 pictures; write one for each"),
        ("a dog", None, ["1.png"], "has 0 <image> and there are 1 pictures"),
        ("replace <image>", "in.png", ["1.png"], "has 1 <image> and there are 2 pictures"),
        (  # "the image" is a mark where one picture alone is edited
            "put <image> into the image",
            "in.png",
            ["1.png"],
            "has 1 <image> and there are 2 pictures",
        ),
        (" ", "in.png", [], "the instruction is empty; write what to paint, or what to change"),
    ],
)
def test_each_picture_has_its_mark(places, text, source, pictures, told):
    with pytest.raises(UserError, match=told):
        instruction_command(places, text, source, pictures)


def test_the_newest_sheet_and_pictures_are_shown(places):
    """The newest are those that were written last, whatever their names."""
    assert folders.instructed(places) == (None, [])
    folder = Path(places.output_path, "mige")
    folder.mkdir(parents=True)
    for number, name in enumerate(("0001", "sheet_0001-0001", "0000", "sheet_0000-0000")):
        words = PngImagePlugin.PngInfo()
        if name.isdigit():
            words.add_text("mige", json.dumps({"seed": 7 + number}))
        Image.new("RGB", (8 + number, 8)).save(folder / f"{name}.png", pnginfo=words)
        os.utime(folder / f"{name}.png", (number, number))
    sheet, pictures = folders.instructed(places)
    assert sheet.size == (11, 8)
    assert pictures == [
        (str(folder / "0000.png"), "0000.png, seed 9"),
        (str(folder / "0001.png"), "0001.png, seed 7"),
    ]
    os.utime(folder, ns=(5, 5))  # when something was last written into it
    assert folders.stamps(places, None, None)["instructed"] == (5,)


def test_what_the_page_says_is_the_command(events, tmp_path):
    """Fields that are empty are left out; a missing mark is told where the command stands."""
    told = events("instruct_command", instruction="a <image>", subjects=None, source=None)
    assert told == "# the instruction has 1 <image> and there are 0 pictures; write one for each"
    told = events("instruct_command", instruction="a <image>", subjects=[("/a/1.png", None)])
    assert told.startswith("python -m mige.generate --model toybox --output_path ")
    assert told.endswith(" --prompt 'a <image>' --num_images 2 --seed 0 --images /a/1.png")


def test_from_pictures_to_an_edit_in_a_browser(browser_page, site, tmp_path):
    """A toy beside another one, then its edit: given pictures and results stand side by side."""
    triplet = draw_triplet(5, "test", 0, "subject_edit", "replace")
    names = ["source.png", "subject.png"]
    for name, picture in zip(names, triplet.entities, strict=True):
        picture.save(tmp_path / name)
    page, made = browser_page, site[0] / "output" / "mige"
    page.get_by_role("tab", name="Instructions").click()
    fill(page, "instruction", "a <image> on the grass")
    wait_until(page, "instruct_command", "# the instruction has 1 <image> and there are 0 pictures")
    page.locator("#subjects input[type=file]").set_input_files(tmp_path / "subject.png")
    wait_until(page, "instruct_command", "--images ")
    page.get_by_text("More settings").last.click()
    for name in ("instruct_steps", "text_scale", "image_scale"):
        assert value_of(page, name) == ""
    fill(page, "instruct_steps", "2")
    fill(page, "instruct_count", "1")
    wait_until(page, "instruct_command", "--steps 2")
    page.locator("#instruct").click()
    wait_until(page, "status", "carrying out: a <image> on the grass: finished")
    page.wait_for_selector("#instructed img[src*='0000.png']")
    assert page.locator("#sheet img").count() == 1

    page.locator("#source input[type=file]").set_input_files(tmp_path / "source.png")
    wait_until(page, "instruct_command", "# the instruction has 1 <image> and there are 2 pictures")
    fill(page, "instruction", triplet.prompt.replace("<imagehere>", " <image> "))
    wait_until(page, "instruct_command", "python -m mige.edit")
    page.locator("#instruct").click()
    page.wait_for_selector("#instructed img[src*='0001.png']")
    wait_until(page, "status", "finished")
    shoot(page, "4_instructions")
    for number, task in enumerate(("subject", "subject_edit")):
        facts = json.loads((made / f"000{number}.json").read_text())
        assert (facts["task"], facts["steps"], facts["seed"]) == (task, 2, 0)
        given = [Path(path).read_bytes() for path in facts["pictures"]]
        wanted = names[1:] if task == "subject" else names
        assert given == [(tmp_path / name).read_bytes() for name in wanted]  # as they were dropped
