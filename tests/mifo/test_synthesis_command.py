"""semantic_synthesis.py end to end, on a learned folder of a thin random model."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

import semantic_synthesis
from imagelab.io import pictures
from mifo.learned import Learned, portable
from mifo.method.regions import Refiner
from mifo.synthesis import paint as painting
from semantic_synthesis import main

PROMPT = "a photo of <asset0> and <asset1>"
BOXES = "[[0.0, 0.2, 0.5, 0.8], [0.5, 0.2, 1.0, 0.8]]"


@pytest.fixture
def paint(learned_dir, tmp_path, monkeypatch):
    """Run the command in two steps with more options; returns the folder of pictures."""
    monkeypatch.chdir(tmp_path)
    options = f"""--models_dir {learned_dir} --model_id toys --output_path pictures --seed 7
        --num_inference_steps 2 --guidance_steps 1 --guidance_iterations 1 --refine_every 0
        --device cpu --mixed_precision no""".split()

    def run(*more, prompt=PROMPT):
        main([*options, "--prompt", prompt, *map(str, more)])
        return tmp_path / "pictures" / "toys"

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def facts(path):
    return json.loads(path.with_suffix(".json").read_text())


def difference(a, b):
    return np.abs(pixels(a) - pixels(b)).max()


def test_files_and_what_they_say(paint, capsys):
    folder = paint("--num_images", 2)
    assert names(folder) == [
        "0000.json",
        "0000.png",
        "0001.json",
        "0001.png",
        "sheet_0000-0001.png",
    ]
    told = capsys.readouterr().out
    assert "seed 7" in told and "<asset1> in 0.562, 0.25, 0.938, 0.75" in told
    assert told.splitlines()[-3:] == [
        f"pictures/toys/{name}" for name in ("0000.png", "0001.png", "sheet_0000-0001.png")
    ]
    for index in range(2):
        path = folder / f"000{index}.png"
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
            assert json.loads(picture.text["mifo"]) == portable(facts(path))
            assert picture.text["prompt"] == PROMPT
        assert facts(path)["settings"]["seed"] == 7 + index
        # The masks are 48×64 pixels, and the places of two subjects 0.4 wide and 0.5 high.
        boxes = [[0.0625, 0.25, 0.4375, 0.75], [0.5625, 0.25, 0.9375, 0.75]]
        assert facts(path)["boxes"] == [pytest.approx(box) for box in boxes]
    with Image.open(folder / "sheet_0000-0001.png") as sheet:
        assert sheet.size == (384 * 2 + 4, 384)


def test_a_large_sheet_is_shrunk(paint, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_SHEET_SIDE", 300)
    folder = paint("--num_images", 3)
    with Image.open(folder / "sheet_0000-0002.png") as sheet:
        assert sheet.size == (150 * 2 + 4, 150 * 2 + 4)


def test_pictures_are_never_replaced(paint):
    folder = paint()
    (folder / "0004.png").write_bytes(b"mine")
    (folder / "0005.json").write_bytes(b"mine")
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    paint()
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert set(names(folder)) - set(before) == {"0005.png", "0005_1.json", "sheet_0005-0005.png"}
    assert (folder / "0005.png").read_bytes() == before["0000.png"]  # one seed, one picture


def test_batch_size_does_not_change_pictures(paint):
    folder = paint("--num_images", 3)
    paint("--num_images", 3, "--batch_size", 2)
    for index in range(3):
        assert difference(folder / f"{index:04d}.png", folder / f"{index + 3:04d}.png") <= 1
    assert difference(folder / "0000.png", folder / "0001.png") > 20


def test_refined_regions_do_not_depend_on_the_batch(paint):
    options = ("--num_inference_steps", 3, "--refine_every", 1, "--num_images", 2)
    folder = paint(*options)
    paint(*options, "--batch_size", 2)
    for index in range(2):
        assert difference(folder / f"{index:04d}.png", folder / f"{index + 2:04d}.png") <= 1


def test_only_maps_that_refine_regions_are_recorded(paint, monkeypatch):
    """In three steps with guidance in the first, regions can be refined before steps 1 and 2."""
    recorded, add = [], Refiner.add

    def counted(refiner, kind, attention):
        recorded.append(kind)
        add(refiner, kind, attention)

    monkeypatch.setattr(Refiner, "add", counted)
    counts = []
    for every, guided in ((1, 1), (2, 1), (0, 1), (1, 3)):
        paint("--num_inference_steps", 3, "--refine_every", every, "--guidance_steps", guided)
        counts.append(len(recorded))
        recorded.clear()
    assert counts[0] == 2 * counts[1] > 0
    assert counts[2:] == [0, 0]


def test_offline_reaches_the_model(paint, monkeypatch):
    asked, load = [], Learned.load

    def spied(learned, model_path, offline):
        asked.append(offline)
        return load(learned, model_path, offline)

    monkeypatch.setattr(Learned, "load", spied)
    paint()
    paint("--offline")
    assert asked == [False, True]


def test_a_picture_is_made_again_from_its_json(paint):
    folder = paint("--num_images", 2, "--guidance_scale", 3)
    settings = facts(folder / "0001.png")["settings"]
    paint("--seed", settings["seed"], "--guidance_scale", settings["guidance_scale"])
    assert difference(folder / "0001.png", folder / "0002.png") == 0


def test_boxes_in_every_form(paint):
    folder = paint("--boxes", BOXES)
    paint("--box", "<asset1>=50%,20%,100%,80%", "--box", "<asset0>=0,0.2,0.5,0.8")
    paint("--boxes", '[["0px", "25.6px", "64px", "102.4px"], [0.5, 0.2, 1, 0.8]]',
          "--width", 128, "--height", 128)  # fmt: skip
    paint()
    for index in (1, 2):
        assert facts(folder / f"000{index}.png")["boxes"] == json.loads(BOXES)
        assert difference(folder / "0000.png", folder / f"000{index}.png") == 0
    assert difference(folder / "0000.png", folder / "0003.png") > 0


def test_one_asset_in_two_boxes(paint):
    boxes = ("--box", "<asset0>=0,0,0.4,0.4", "--box", "<asset0>=0.5,0.5,1,1")
    folder = paint(*boxes, "--box", "<asset1>=0.5,0,1,0.4", prompt="<asset0> <asset1> <asset0>")
    said = facts(folder / "0000.png")
    assert said["subjects"] == ["<asset0>", "<asset1>", "<asset0>"]
    assert said["boxes"] == [[0, 0, 0.4, 0.4], [0.5, 0, 1, 0.4], [0.5, 0.5, 1, 1]]


def test_boxes_in_pixels_need_the_size(paint, capsys):
    for given in (("--box", "<asset0>=0,0,64,64px"), ("--boxes", '[["0px", 0, "64px", 1]]')):
        told = fails(paint, capsys, 2, *given)
        assert told.endswith("write fractions or percent, or give --width and --height")


def test_without_box_control(paint):
    folder = paint("--no_box_control")
    assert facts(folder / "0000.png")["boxes"] == []
    paint()
    paint("--no_box_control", prompt="a photo")
    assert difference(folder / "0000.png", folder / "0001.png") > 0
    assert difference(folder / "0000.png", folder / "0002.png") > 0


def test_negative_prompt(paint):
    folder = paint()
    paint("--negative_prompt", "a photo of noise")
    paint("--negative_prompt", "a photo of <asset1>")
    for index in (1, 2):
        assert difference(folder / "0000.png", folder / f"000{index}.png") > 0


def test_subject_token_indices(paint, learned_dir):
    folder = paint(prompt="a photo of <asset0>")
    assert facts(folder / "0000.png")["subject_token_indices"] == [[at := 4]]
    paint("--subject_token_indices", f"[[{at}]]", prompt="a photo of <asset0>")
    assert difference(folder / "0000.png", folder / "0001.png") == 0
    paint("--subject_token_indices", "[[2]]", prompt="a photo of <asset0>")
    assert facts(folder / "0002.png")["subjects"] == ["subject 1"]
    assert difference(folder / "0000.png", folder / "0002.png") > 0


def test_sizes(paint):
    folder = paint("--width", 192, "--height", 128)
    assert pixels(folder / "0000.png").shape == (128, 192, 3)


def test_steps_that_would_start_from_little_noise(paint, capsys, tmp_path):
    told = fails(paint, capsys, 2, "--num_inference_steps", 501)
    assert told.endswith("of the model's 1000 timesteps: give at most 250, or 333 or 500")
    assert not (tmp_path / "pictures").exists()


def test_random_seed_is_told_and_kept(paint, capsys):
    folder = paint("--seed", "None")
    seed = facts(folder / "0000.png")["settings"]["seed"]
    assert f"seed {seed}," in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# what goes wrong underway


def fails(run, capsys, code, *more):
    with pytest.raises(SystemExit) as stop:
        run(*more)
    told = capsys.readouterr().err
    assert stop.value.code == code, told
    assert "Traceback" not in told
    return told.strip().splitlines()[-1]


def test_full_disk_keeps_the_pictures_that_are_done(paint, tmp_path, capsys, monkeypatch):
    write, written = pictures.write_new, []

    def full(*args):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(*args))
        return written[-1]

    monkeypatch.setattr(pictures, "write_new", full)
    assert "the disk is full" in fails(paint, capsys, 2, "--num_images", 2)
    assert names(tmp_path / "pictures/toys") == ["0000.json", "0000.png", "0001.png"]


def test_ctrl_c_keeps_the_pictures_that_are_done(paint, tmp_path, capsys, monkeypatch):
    decode, done = painting.decode, []

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return decode(*args)

    monkeypatch.setattr(painting, "decode", interrupted)
    told = fails(paint, capsys, 130, "--num_images", 2)
    assert told == "semantic_synthesis.py: stopped"
    assert names(tmp_path / "pictures/toys") == ["0000.json", "0000.png"]


@pytest.mark.parametrize(
    "error, words",
    [
        (FloatingPointError("the latents are not finite"), "the latents are not finite"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory"),
    ],
)
def test_failures_underway(paint, tmp_path, capsys, monkeypatch, error, words):
    def broken(*args):
        raise error

    monkeypatch.setattr(painting, "denoise", broken)
    assert words in fails(paint, capsys, 1)
    assert names(tmp_path / "pictures/toys") == []


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_unexpected_errors_keep_their_traceback(paint, monkeypatch, error):
    """A ValueError too, unless it is a UserError: it is a fault of the program."""

    def broken(*args):
        raise error("shapes do not fit")

    monkeypatch.setattr(painting, "denoise", broken)
    with pytest.raises(error, match="shapes do not fit"):
        paint()


def test_edited_presets_are_checked(paint, capsys, monkeypatch):
    monkeypatch.setattr(semantic_synthesis, "get_boxes", lambda count, _: [(0.1, 0.1, 0.5)] * count)
    assert "does not hold four numbers" in fails(paint, capsys, 2)


@pytest.mark.parametrize("wrong", ["asset1", "<asset 1>", "<Asset1>", "asset 1"])
def test_an_asset_that_is_nearly_written_is_no_other_word(learned_dir, fails, wrong):
    argv = ["--models_dir", str(learned_dir), "--model_id", "toys", "--prompt"]
    told = fails(semantic_synthesis.main, [*argv, f"<asset0> and {wrong} in the snow"]).err
    assert f"the prompt writes {wrong!r}; write <asset1> for an asset" in told
