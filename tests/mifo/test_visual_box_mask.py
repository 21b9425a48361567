import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visual_box_mask
from imagelab.boxes import color_of
from mifo.cli import boxes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photo(folder):
    """A picture of 60x40 with noise in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return "photo.png"


def run(*argv):
    """Run the command and read the picture that it wrote."""
    visual_box_mask.main([str(value) for value in argv])
    output = argv[argv.index("--output") + 1] if "--output" in argv else "mask.png"
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        picture.load()
    return picture


def white(top, bottom, left, right, size=(512, 512)):
    """The expected white box on black."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[top:bottom, left:right] = 255
    return pixels


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", white(128, 384, 128, 384)),
        ("--top_left 128 64 --bottom_right 384 256", white(64, 256, 128, 384)),
        ("--top_left 0.25 0.125 --bottom_right 0.75 0.5", white(64, 256, 128, 384)),
        ("--top_left 25% 12.5% --bottom_right 75% 50%", white(64, 256, 128, 384)),
        ("--top_left 128px 64px --bottom_right 384px 256px", white(64, 256, 128, 384)),
        ("--top_left 0 0 --bottom_right 1 1", white(0, 512, 0, 512)),
        ("--top_left 0 0 --bottom_right 2 1", white(0, 1, 0, 2)),
        ("--top_left 10.4 10.6 --bottom_right 99.6 99.4", white(11, 99, 10, 100)),
        ("--bottom_right 300 200", white(128, 200, 128, 300)),
        ("--top_left 0.5 0.5", white(256, 384, 256, 384)),
        ("--box 0.1,0.2,0.5,0.6", white(102, 307, 51, 256)),
        ("--boxes [[0.5,0,1,1]]", white(0, 512, 256, 512)),
        ("--size 100", white(25, 75, 25, 75, (100, 100))),
        ("--size 40x80 --box 0,0,10,20px", white(0, 20, 0, 10, (40, 80))),
        ("--box 51,102,205,205px --box_format xywh", white(102, 307, 51, 256)),
        ("--box '0.25 0.5 0.5 1' --box_format cxcywh", white(0, 512, 0, 256)),
        ("""--box '{"x": 0.5, "y": 0, "width": 0.5, "height": 1}'""", white(0, 512, 256, 512)),
        ("""--box '{"label": "a=b", "bbox_2d": [0, 0, 1, 0.5]}'""", white(0, 256, 0, 512)),
        ("""--boxes '{"xmin":0.5,"ymin":0,"xmax":1,"ymax":1}'""", white(0, 512, 256, 512)),
        ("--boxes '[[0.5,0,0.5,1]]' --box_format xywh", white(0, 512, 256, 512)),
        # The corners of --top_left and --bottom_right are no such box.
        ("--top_left 0 0 --bottom_right 0.5 1 --box_format xywh", white(0, 512, 0, 256)),
    ],
)
def test_one_box_is_white_on_black(argv, expected):
    picture = run(*shlex.split(argv))
    assert picture.mode == "L"
    assert np.array_equal(np.array(picture), expected)


def test_several_boxes_are_outlined_in_their_colours():
    picture = run("--size", 300, "--box", "<asset0>=0,0,0.5,0.5", "--boxes", "[[0.5,0.5,1,1]]")
    assert picture.mode == "RGB" and picture.size == (300, 300)
    assert picture.getpixel((0, 149)) == color_of(0)
    assert picture.getpixel((299, 299)) == color_of(1)
    assert picture.getpixel((100, 120)) == tuple(channel // 4 for channel in color_of(0))
    assert picture.getpixel((200, 50)) == (0, 0, 0)


def test_a_named_box_is_labelled():
    named = np.array(run("--box", "<asset0>=0,0,1,1"))
    other = np.array(run("--box", "<asset8>=0,0,1,1"))
    assert (named[3:6, 3:6] == color_of(0)).all()
    assert (named != other).any() and (named[100:] == other[100:]).all()


def test_a_long_name_is_shortened(capsys):
    run("--box", "name " * 1000 + "=0,0,1,1")
    assert capsys.readouterr().out.splitlines()[0] == (
        "name " * 11 + "name…: 0,0,1,1 = 0,0,512,512px"
    )


def test_corners_and_boxes_add_up():
    picture = run("--top_left", 0, 0, "--bottom_right", 256, 256, "--box", "0.5,0.5,1,1")
    assert picture.getpixel((0, 255)) == color_of(0)
    assert picture.getpixel((511, 511)) == color_of(1)


def test_boxes_lie_over_a_picture_of_its_own_size(photo):
    before = np.array(Image.open(photo))
    after = np.array(run("--image", photo, "--box", "30,20,60,40px"))
    assert after.shape == before.shape
    assert np.array_equal(after[:20], before[:20]) and np.array_equal(after[:, :30], before[:, :30])
    assert (after[39, 30:] == color_of(0)).all()
    assert np.abs(after[25, 40] - (0.75 * before[25, 40] + 0.25 * np.array(color_of(0)))).max() <= 1


def test_a_turned_picture_is_shown_upright_without_its_metadata(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    exif[0x010E] = "a secret place"
    source = Image.new("RGB", (60, 40), "white")
    source.paste("black", (0, 0, 60, 20))  # the upper half as stored, the right half as shown
    source.save("turned.jpg", exif=exif, icc_profile=b"a profile", quality=95)
    picture = run("--image", "turned.jpg", "--box", "0,0.9,1,1")
    assert picture.size == (40, 60)
    assert min(picture.getpixel((5, 20))) > 240 and max(picture.getpixel((35, 20))) < 15
    assert not picture.info and b"secret" not in (folder / "mask.png").read_bytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode(mode):
    name = "picture.jpg" if mode == "CMYK" else "picture.png"
    Image.new(mode, (32, 32)).save(name)
    assert run("--image", name).mode == "RGB"


def test_the_command_says_what_it_drew_and_where(capsys):
    run("--box", "<asset0>=0.1,0.2,0.5,0.6", "--box", "0,0,50%,50%", "--output", "new/boxes.png")
    assert capsys.readouterr().out.splitlines() == [
        "<asset0>: 0.1,0.2,0.5,0.6 = 51,102,256,307px",
        "box 2: 0,0,0.5,0.5 = 0,0,256,256px",
        f"saved {Path('new/boxes.png')} (512x512)",
    ]


def test_an_earlier_output_is_replaced_and_nothing_else_is_left(folder):
    run("--size", 64)
    assert run("--size", 32).size == (32, 32)
    assert os.listdir(folder) == ["mask.png"]


def test_the_output_is_on_the_disk_before_it_takes_its_name(monkeypatch):
    """And then its name."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, real=real: (order.append(n), real(*a)))
    run("--size", 32)
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("owner, name", [(Image.Image, "save"), (os, "replace")])
def test_a_failed_write_leaves_the_earlier_output(folder, monkeypatch, capsys, owner, name):
    run("--size", 64)
    before = (folder / "mask.png").read_bytes()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(SystemExit):
        visual_box_mask.main(["--size", "32"])
    assert "mask.png cannot be written (No space left on device)" in capsys.readouterr().err
    assert os.listdir(folder) == ["mask.png"]
    assert (folder / "mask.png").read_bytes() == before


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--image none.jpg", "there is no picture none.jpg; give a JPEG"),
        ("--image folder", "folder is no file; give a JPEG, PNG or WebP file"),
        ("--image text.png", "text.png cannot be read .* give a JPEG, PNG or WebP file"),
        ("--image cut.png", "cut.png cannot be read as a picture"),
        ("--image wide.png", "wide.png is 16385 x 1 pixels, which is too large; shrink it"),
        ("--image script.eps", r"script.eps cannot be read as a picture \(unknown format\)"),
        ("--image photo.tif", r"photo.tif cannot be read as a picture \(unknown format\)"),
        ("--image photo.png --output photo.png", "is the picture of --image; name anoth"),
        ("--image photo.png --output link.png", "is the picture of --image; name anoth"),
        ("--image photo.png --size 64", "--size '64' cannot be combined with --image"),
        ("--size 0", "--size '0' is out of range; use 1 to 8192 pixels a side"),
        ("--size 512x8193", "--size '512x8193' is out of range"),
        ("--size 512x", "--size '512x' is not a size; write 512 or 768x512"),
        ("--size -5", "--size '-5' is not a size"),
        ("--size ''", "--size '' is not a size"),
        ("--output mask.jpg", "--output 'mask.jpg' does not end in .png; name a PNG file"),
        ("--output folder", "--output 'folder' does not end in .png"),
        ("--output folder.png", r"--output folder.png cannot be written \("),
        ("--output text.png/mask.png", r"cannot be written \(.*\); name another file"),
        (f"--output {300 * 'a'}.png", r"--output a+…a+\.png cannot be written"),
        ("--top_left 0.8 0 --bottom_right 0.2 1", "has its left edge .* beyond its right"),
        ("--top_left 384 0 --bottom_right 128 512", "has its left edge .* beyond its right"),
        ("--top_left 0 0 --bottom_right 600 600", "has its right edge at 1.171875 of the"),
        ("--top_left a b", "holds 'a', which is not a number"),
        ("--top_left 0.1 nan", "holds 'nan', which is not a number"),
        ("--top_left 0.1", "argument --top_left: expected 2 arguments"),
        ("--box 0,0,0.001,1 --size 64", r"the box \(0.0, 0.0, 0.001, 1.0\) covers nothing"),
        ("--box 0,0,1,1 --box 0,0,0.001,1 --size 64", "box 2 .* covers nothing of a grid"),
        ("--box 128,128,256,256", "holds 128, which is more than the whole picture"),
        ("--box =0,0,1,1", "the box '=0,0,1,1' does not name its asset"),
        ("--box 300,200,100,50px", "left edge .* beyond its right .*, or give --box_format xywh"),
        ("--box 0,0,1,1 --box_format voc", "argument --box_format: invalid choice: 'voc'"),
        (
            """--box '{"x":0,"y":0,"w":1,"h":1}' --box_format corners""",
            "which say left, top, width, height, and --box_format is corners",
        ),
        (f"--size {'9' * 3000}", "--size '9+…' is not a size"),
        ("--boxes []", "are not a list with boxes in it"),
        ("--boxes ''", "are not valid JSON"),
    ],
)
def test_bad_input_ends_with_a_sentence(folder, photo, capsys, argv, message):
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path(photo).read_bytes()[:3000])
    Path("link.png").hardlink_to(photo)
    Image.new("L", (16385, 1)).save("wide.png")
    Image.new("L", (32, 32)).save("photo.tif")
    Image.new("L", (32, 32)).save("script.eps")  # which Pillow gives to Ghostscript
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    with pytest.raises(SystemExit) as stop:
        visual_box_mask.main(shlex.split(argv))
    output, errors = capsys.readouterr()
    assert stop.value.code == 2 and not output
    assert re.search(message, errors.splitlines()[-1])
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        visual_box_mask.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert boxes.__doc__.split("\n")[0] in text
    for default in (" ".join(boxes.TOP_LEFT), " ".join(boxes.BOTTOM_RIGHT)):
        assert f"(default: {default}" in text
    assert f"(default: {boxes.SIZE}, or" in text and "(default: mask.png)" in text


def test_the_command_in_a_process_of_its_own():
    argv = ["--top_left", "128", "128", "--bottom_right", "384", "384"]
    code = (
        "import sys, runpy; sys.argv[0] = 'visual_box_mask.py'; "
        f"runpy.run_path({str(ROOT / 'visual_box_mask.py')!r}, run_name='__main__'); "
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "box: 0.25,0.25,0.75,0.75 = 128,128,384,384px",
        "saved mask.png (512x512)",
        "set()",
    ]
    assert np.array_equal(np.array(Image.open("mask.png")), white(128, 384, 128, 384))


def test_an_error_in_a_process_of_its_own():
    result = subprocess.run(
        [sys.executable, str(ROOT / "visual_box_mask.py"), "--size", "huge"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and not result.stdout
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "visual_box_mask.py: error: --size 'huge' is not a size; write 512 or 768x512, in pixels"
    )
