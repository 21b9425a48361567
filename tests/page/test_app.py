"""The page to draw on: what it saves and runs, and a browser from photo to picture."""

import base64
import io
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import NEEDED, fill, shoot, value_of, wait_until
from PIL import ExifTags, Image, PngImagePlugin

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock
from imagelab.training.checkpoint import Checkpoint, write_checkpoint
from mifo.cli import learning, synthesis
from mifo.learning.instance import read_instance
from mifo.synthesis.paint import save_painting
from mifo_page import __main__ as app
from mifo_page import draft as drafts
from mifo_page import places as folders
from mifo_page.draft import Draft, add_mask_file, add_painted_mask, open_photo, save_instance
from mifo_page.job import Job, as_words, learning_command, shown, synthesis_command
from mifo_page.places import folder_in

ROOT = Path(__file__).parents[2]
BOXES = "[[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]]"


def painted(size=(128, 128), box=(0, 0, 40, 40)) -> dict:
    """What the brush sends: a PNG as a data URL, transparent where nothing is painted."""
    strokes = Image.new("RGBA", size)
    strokes.paste((255, 64, 192, 255), box)
    data = io.BytesIO()
    strokes.save(data, "PNG")
    return {"mask": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}


# ----------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    "name", ["", " ", None, "..", ".", "../toys", "/etc", "a/b", ".hidden", "all", "a\nb", "a\0b"]
)
def test_names_lead_nowhere_else(places, draft, name):
    for use in (
        lambda: folder_in(places.folder_path, name, "instance"),
        lambda: drafts.open_instance(places, name),
        lambda: save_instance(places, name, draft, True),
        lambda: learning_command(places, name, "new"),
        lambda: synthesis_command(places, name, BOXES),
        lambda: folders.curves(places, name),
        lambda: folders.attention_maps(places, name),
        lambda: folders.pictures(places, name),
    ):
        with pytest.raises(ValueError, match="name"):
            use()
    assert os.listdir(places.folder_path) == ["toys"]


def test_a_link_out_of_the_folder_is_no_instance(places, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Path(places.folder_path, "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        folder_in(places.folder_path, "link", "instance")


def test_names_that_the_page_would_refuse_are_not_offered(places, tmp_path):
    instance, learned = Path(places.folder_path), Path(places.models_dir)
    for folder in (instance / "toys", learned / "toys"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()
        for name in ("all", "a\nb", ".toys.new"):
            shutil.copytree(folder, folder.with_name(name))
        shutil.copytree(folder, tmp_path / f"{folder.parent.name}_elsewhere")
        (folder.parent / "link").symlink_to(tmp_path / f"{folder.parent.name}_elsewhere")
    assert folders.instances(places) == ["toys"]
    assert folders.learned(places) == ["toys"]


# ----------------------------------------------------------------------------------------------
# photo and masks


def test_a_photo_is_turned_upright_and_stripped(tmp_path, places):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    stored = Image.new("RGB", (120, 80), "blue")
    stored.paste("red", (0, 0, 60, 80))
    stored.save(tmp_path / "photo.jpg", exif=exif, comment=b"private", icc_profile=b"profile")
    opened = open_photo(tmp_path / "photo.jpg")
    assert opened.photo.size == (80, 120)
    assert opened.photo.getpixel((40, 10))[0] > 200  # the left half is up
    save_instance(places, "mine", add_painted_mask(opened, painted((80, 120))), False)
    content = Path(places.folder_path, "mine", "img.png").read_bytes()
    with Image.open(io.BytesIO(content)) as saved:
        assert not saved.info and not saved.getexif() and saved.size == (80, 120)
    assert b"camera" not in content and b"private" not in content


def test_large_photos_are_shrunk_with_their_masks(tmp_path):
    Image.new("RGB", (3000, 1500)).save(tmp_path / "photo.png")
    mask = np.zeros((1500, 3000), np.uint8)
    mask[:, :1500] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    opened = add_mask_file(open_photo(tmp_path / "photo.png"), tmp_path / "mask.png")
    assert opened.photo.size == (2048, 1024)
    assert opened.masks[0].shape == (1024, 2048)
    assert opened.masks[0][:, :1024].all() and not opened.masks[0][:, 1024:].any()
    for column in range(1000, 1003):
        Image.fromarray(np.uint8(255 * (np.indices(mask.shape)[1] == column))).save(
            tmp_path / "line.png"
        )
        thin = add_mask_file(opened, tmp_path / "line.png").masks[-1]
        assert thin.all(axis=0).any() and thin.any(axis=0).sum() <= 2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: Image.new("1", (20_000, 8)).save(path), "20000 x 8 pixels"),
        (lambda path: path.write_bytes(b"GIF89a"), "cannot be read as a picture"),
        (lambda path: path.write_bytes(b"<svg onload='alert(1)'/>"), "cannot be read as a picture"),
    ],
)
def test_bad_uploads_are_told_by_their_name_alone(tmp_path, make, told):
    make(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=told) as error:
        open_photo(tmp_path / "photo.png")
    assert str(error.value).startswith("photo.png ")


def test_a_mask_of_another_size_is_refused(tmp_path, draft):
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask.png is 64 x 64 pixels, the photo 128 x 128"):
        add_mask_file(draft, tmp_path / "mask.png")


def test_strokes_become_a_mask(draft):
    mask = add_painted_mask(draft, painted(box=(8, 16, 24, 80))).masks[2]
    expected = np.zeros((128, 128), bool)
    expected[16:80, 8:24] = True
    assert np.array_equal(mask, expected)


def test_nothing_painted_is_told(draft):
    with pytest.raises(ValueError, match="nothing is painted"):
        add_painted_mask(draft, {"mask": ""})


@pytest.mark.parametrize("sent", [{}, {"mask": None}, {"mask": ["data:"]}, None, "data:"])
def test_what_is_no_mask_is_told(draft, sent):
    with pytest.raises(ValueError, match="the page sent no mask"):
        add_painted_mask(draft, sent)


def test_strokes_beyond_the_limit_of_a_file_are_not_decoded(draft, monkeypatch):
    sent = painted()
    monkeypatch.setattr(drafts, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(drafts, "MAX_SENT", len(sent["mask"]) - 1)
    with pytest.raises(ValueError, match="larger than 32 MiB"):
        add_painted_mask(draft, sent)


def test_coverage_and_overlap_are_told(draft):
    told = drafts.report(add_painted_mask(draft, painted(box=(8, 32, 32, 96)))).splitlines()
    assert told[0] == "mask0 covers 18.8% of the picture"  # 64 · 48 of 128² pixels
    assert told[3] == "mask0 and mask2 share 100% of the smaller"


def test_each_mask_is_shown_in_its_colour(draft):
    before, after = np.asarray(draft.photo, int), np.asarray(drafts.overlay(draft), int)
    orange = 0.45 * before[80, 20] + 0.55 * np.array((230, 159, 0))
    assert np.abs(after[80, 20] - orange).max() <= 1
    assert np.array_equal(after[10, 64], before[10, 64])


# ----------------------------------------------------------------------------------------------
# saving


def test_saved_folders_are_what_learning_reads(places, draft):
    folder = save_instance(places, "copy", draft, False)
    copy, original = (
        read_instance(Path(places.folder_path, name), 128, 1) for name in ("copy", "toys")
    )
    assert sorted(path.name for path in folder.iterdir()) == ["img.png", "mask0.png", "mask1.png"]
    assert np.array_equal(copy.image, original.image)
    assert np.array_equal(copy.masks, original.masks)


def test_a_folder_is_replaced_only_when_told_so(places, draft):
    folder = Path(places.folder_path, "toys")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        save_instance(places, "toys", draft, False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_instance(places, "toys", draft, True)
    assert (folder / "img.png").is_file() and not (folder / "img.jpg").exists()


def test_a_photo_that_the_page_has_shrunk_stays_in_its_folder(places, monkeypatch):
    folder = Path(places.folder_path, "toys")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(drafts, "MAX_SIDE", 100)
    shrunk = drafts.open_instance(places, "toys")
    with pytest.raises(ValueError, match="holds the photo in its full size, .* give another name"):
        save_instance(places, "toys", shrunk, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_instance(places, "smaller", shrunk, False)


def test_a_folder_with_other_things_is_never_replaced(places, draft):
    thesis = Path(places.folder_path, "toys", "thesis.txt")
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="toys holds thesis.txt, which would be lost"):
        save_instance(places, "toys", draft, True)
    assert thesis.read_text() == "years of work"


def test_what_file_managers_leave_in_a_folder_is_replaced_with_it(places, draft):
    folder = Path(places.folder_path, "toys")
    for name in (".DS_Store", "Thumbs.db"):
        (folder / name).touch()
    save_instance(places, "toys", draft, True)
    assert sorted(os.listdir(folder)) == ["img.png", "mask0.png", "mask1.png"]


def test_what_cannot_be_learned_is_not_saved(places, draft):
    for bad, told in (
        (Draft(draft.photo, draft.opened_size), "no mask yet"),
        (Draft(draft.photo, draft.opened_size, draft.masks[:1] * 2), "^mask0.png and mask1.png"),
    ):
        with pytest.raises(ValueError, match=told):
            save_instance(places, "new", bad, False)
    assert os.listdir(places.folder_path) == ["toys"]


def test_an_instance_is_saved_by_one_at_a_time(places, draft):
    busy = pytest.raises(UserError, match="is being written by another process")
    with folder_lock(Path(places.folder_path, "mine")), busy:
        save_instance(places, "mine", draft, False)
    save_instance(places, "mine", draft, False)
    assert sorted(os.listdir(places.folder_path)) == ["mine", "toys"]


# ----------------------------------------------------------------------------------------------
# commands


def test_the_commands_say_what_the_page_says(places):
    argv = learning_command(
        places, "toys", "resume", train_steps=7, seed=None, initializer_tokens=as_words("car, van")
    )
    assert argv[:5] == ["python", "-m", "semantic_learning", "--instance", "toys"]
    options = learning.parse_args(argv[3:])[1]
    assert (options.instance, options.folder_path) == (["toys"], places.folder_path)
    assert (options.output_dir, options.train_steps) == (places.models_dir, 7)
    assert options.initializer_tokens == ["car", "van"] and options.resume
    assert options.seed is None and not options.overwrite
    settings = {"seed": 3, "num_images": 2, "step_size": 2.5, "final_step_size": 2.0}
    argv = synthesis_command(places, "toys", BOXES, prompt="a <asset0>", **settings)
    assert "--final_step_size" not in argv
    options = synthesis.parse_args(argv[3:])[1]
    assert (options.model_id, options.prompt, options.boxes) == ("toys", "a <asset0>", BOXES)
    assert (options.models_dir, options.output_path) == (places.models_dir, places.output_path)
    assert (options.seed, options.num_images, options.step_size) == (3, 2, 2.5)
    assert shown(["python", "a <b>"]) == "python 'a <b>'"


@pytest.mark.parametrize("text", ["--output_path=/etc", "-h", "--debug", "$(reboot); 'x' \"y\""])
def test_no_text_becomes_an_option(places, text):
    argv = synthesis_command(places, "toys", BOXES, prompt=text, negative_prompt=text)
    options = synthesis.parse_args(argv[3:])[1]
    assert (options.prompt, options.negative_prompt) == (text, text)
    assert options.output_path == places.output_path and not options.debug
    argv = learning_command(places, "toys", "new", class_prompt=text)
    assert learning.parse_args(argv[3:])[1].class_prompt == text


def test_bad_settings_are_told(places):
    with pytest.raises(ValueError, match="'--debug' is no word"):
        learning_command(places, "toys", "new", initializer_tokens=as_words("car, --debug"))
    with pytest.raises(ValueError, match="no way to start"):
        learning_command(places, "toys", "output_dir=/etc")
    with pytest.raises(ValueError, match="'--output_path=/etc' does not hold four numbers"):
        synthesis_command(places, "toys", "--output_path=/etc")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_one_command_runs_at_a_time_and_can_be_stopped(interruptible):
    code = """import sys, time
print("hello")
for n in range(3): print(f"step: {n}%|##", end="\\r", file=sys.stderr)
try: time.sleep(60)
except KeyboardInterrupt: sys.exit(130)"""
    job = Job()
    assert job.status() == "nothing has been started"
    job.start("first", ["python", "-c", code])
    wait_for(lambda: "step: 1" in job.output() or "step: 2" in job.output())
    assert job.status() == "first: running"
    assert len(job.output().splitlines()) == 2
    with pytest.raises(ValueError, match="first is still running"):
        job.start("second", ["python", "-c", ""])
    job.stop()
    wait_for(lambda: not job.running)
    assert job.status() == "first: stopped"
    job.start("second", ["python", "-c", "raise SystemExit(2)"])
    wait_for(lambda: not job.running)
    assert job.status() == "second: failed (exit code 2)"


def test_a_command_that_ctrl_c_has_ended_was_stopped_whatever_its_code(interruptible):
    job = Job()
    job.start("painting", ["python", "-c", "import time; print('ready'); time.sleep(60)"])
    wait_for(lambda: job.output() == "ready")
    job.stop()
    wait_for(lambda: not job.running)
    assert job.status() == "painting: stopped"


def test_a_command_that_is_too_long_is_told():
    job = Job()
    with pytest.raises(UserError, match="^'a photo of .*'… is too long for a command; shorten it"):
        job.start("painting", ["python", "-c", "pass", "a photo of " + "fog " * 2**20])
    assert job.status() == "nothing has been started"


def test_closing_ends_a_command_that_does_not_stop():
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1)"
    job = Job()
    job.start("deaf", ["python", "-c", f"{code}; time.sleep(60)"])
    wait_for(lambda: job.output() == "1")
    job.close(seconds=0.1)
    assert not job.running


def test_closing_after_stop_does_not_stop_twice():
    code = """import signal, sys, time
def save(*_):
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    print("saving")
    time.sleep(1)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready")
time.sleep(60)"""
    job = Job()
    for title, by_hand in (("first", True), ("second", False)):
        job.start(title, ["python", "-c", code])
        wait_for(lambda: job.output() == "ready")
        if by_hand:
            job.stop()
            wait_for(lambda: "saving" in job.output())
        job.close()
        assert job.status() == f"{title}: stopped"


# ----------------------------------------------------------------------------------------------
# what there is to see


def test_curves_of_an_unfinished_run(places):
    assert folders.curves(places, "toys") is None
    losses = {name: torch.linspace(2, 1, 8).double() for name in ("loss", "attention")}
    losses["attention"][:] = float("nan")
    settings = {"train_steps": 5, "finetune_steps": 5, "reward_steps": 2}
    tensors = {f"curves.{name}": values for name, values in losses.items()}
    work = Path(places.models_dir, ".toys.work")
    work.mkdir(parents=True)
    before = folders.stamps(places, "toys", None)
    facts = {"settings": settings, "schedule": {}, "scaler": {}, "curves": [*losses]}
    write_checkpoint(work / "checkpoint.safetensors", Checkpoint("stage 2", 3, tensors, facts))
    picture = folders.curves(places, "toys")
    assert len(picture.convert("L").getcolors(1 << 20)) > 20
    after = folders.stamps(places, "toys", None)
    assert {key for key in after if after[key] != before[key]} == {"learning"}


def test_pictures_come_newest_first_with_their_seeds(places):
    folder = Path(places.output_path, "toys")
    folder.mkdir(parents=True)
    for number in range(2):
        facts = {"settings": {"seed": 5 + number, "prompt": "a <asset0>"}}
        path = save_painting(folder, number, Image.new("RGB", (8, 8)), facts)
        os.utime(path, (number, number))
    assert folders.pictures(places, "toys") == [
        (str(folder / "0001.png"), "0001.png, seed 6"),
        (str(folder / "0000.png"), "0000.png, seed 5"),
    ]


@pytest.mark.parametrize("text", [None, "no JSON", "{}", '{"settings": {}}', "[1]"])
def test_pictures_of_another_making_are_named(places, tmp_path, text):
    folder = Path(places.output_path, "toys")
    folder.mkdir(parents=True)
    words = PngImagePlugin.PngInfo()
    if text:
        words.add_text("mifo", text)
        (folder / "0000.json").write_text(text)
    Image.new("RGB", (8, 8)).save(folder / "0000.png", pnginfo=words)
    (folder / "damaged.png").write_bytes(b"no picture")
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere.png")
    shown = folders.pictures(places, "toys")
    assert sorted(caption for _, caption in shown) == ["0000.png", "damaged.png"]


def test_a_part_that_cannot_be_read_hides_no_other(places, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason=NEEDED)
    from mifo_page import page

    told = []
    monkeypatch.setattr(page.gr, "Warning", told.append)
    (tmp_path / "elsewhere").mkdir()
    Path(places.output_path).mkdir()
    Path(places.output_path, "toys").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(folders, "attention_maps", lambda *_: 1 / 0)
    look = partial(page.look, places, Job(), "toys", "toys")
    seen, names, _, status, log, *others = look({})
    assert names["choices"] == ["toys"]
    assert (status, log) == ("nothing has been started", "")
    assert others == [None, None, None, None, []]  # the last two are of instructions
    assert len(told) == 2 and "division by zero" in told[0] and "leads out of" in told[1]
    assert look(seen)[3] == status and len(told) == 2  # told once
    Path(places.output_path, "toys").unlink()
    assert look(seen)[-3] == []


# ----------------------------------------------------------------------------------------------
# the page itself


def answer(address, headers=None, data=None) -> tuple[int, dict, bytes]:
    request = urllib.request.Request(address, headers=headers or {}, data=data)
    try:
        with urllib.request.urlopen(request, timeout=60) as got:
            return got.status, dict(got.headers), got.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_it_listens_on_this_machine_alone(site):
    port = site[1].rsplit(":", 1)[1]
    listening = Path("/proc/net/tcp")
    if not listening.is_file():
        pytest.skip("the addresses in use are read from /proc/net/tcp, which is Linux's")
    lines = [line.split() for line in listening.read_text().splitlines()[1:]]
    local = [line[1] for line in lines if line[3] == "0A" and int(line[1][-4:], 16) == int(port)]
    assert local == [f"0100007F:{int(port):04X}"]


def test_no_other_page_can_use_it(site):
    address = site[1]
    assert answer(address)[0] == 200
    assert answer(address, {"Origin": address})[0] == 200
    assert answer(address, {"Host": "evil.example"})[0] == 403
    assert answer(address, {"Origin": "http://evil.example"})[0] == 403
    assert answer(address, {"Origin": "null"})[0] == 403


def test_the_browser_may_fetch_nothing_from_elsewhere(site):
    status, headers, page = answer(site[1])
    assert headers["content-security-policy"] == app.POLICY
    assert not re.search(rb"""(src|href)=["'](https?:)?//""", page)
    assert b'"analytics_enabled":false' in page.replace(b" ", b"")


def test_no_file_outside_the_pictures_is_served(site):
    folder, address = site
    (folder / "example" / "secret.txt").write_text("root:hush")
    for path in ("/etc/passwd", folder / "example" / "secret.txt", "output/../example/secret.txt"):
        status, _, body = answer(f"{address}/gradio_api/file={path}")
        assert status in (403, 404) and b"root:" not in body


@pytest.mark.parametrize("way", ["file=", "file/"])  # the second is an older one of gradio's
def test_only_pictures_are_shown_among_the_files(site, way):
    folder, address = site
    output = folder / "output"
    output.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(output / "0000.png")
    for name, text in (("a.html", "<script>alert(1)</script>"), ("a.svg", "<svg/>"), ("a.txt", "")):
        (output / name).write_text(text)
    kinds = {}
    for path in output.iterdir():
        status, headers, _ = answer(f"{address}/gradio_api/{way}{path}")
        assert status == 200
        kinds[path.name] = headers["content-disposition"].partition(";")[0]
        path.unlink()
    others = dict.fromkeys(("a.html", "a.svg", "a.txt"), "attachment")
    assert kinds == {"0000.png": "inline"} | others


def test_large_uploads_are_refused(site):
    boundary, head = "limit", 'Content-Disposition: form-data; name="files"; filename="a.png"'
    data = f"--{boundary}\r\n{head}\r\n\r\n".encode() + bytes(app.MAX_FILE + 1)
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    data += f"\r\n--{boundary}--\r\n".encode()
    assert answer(f"{site[1]}/gradio_api/upload", headers, data)[0] == 413


def stroke(page, *points):
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def test_from_photo_to_picture_in_a_browser(browser_page, site):
    page, folder = browser_page, site[0]
    page.wait_for_selector("#photo")
    page.locator("input[type=file]").first.set_input_files(ROOT / "example/toy_car/img.jpg")
    page.wait_for_selector(".brush:not([hidden])")
    paint_masks(page)
    fill(page, "name", "cars")
    fill(page, "classes", "toy car")
    page.locator("#save").click()
    wait_until(page, "saved", "--instance cars")
    shoot(page, "1_masks")
    names = sorted(path.name for path in (folder / "example" / "cars").iterdir())
    assert names == ["img.png", "instance.json", "mask0.png", "mask1.png"]

    learn(page, folder)
    shoot(page, "2_learn")

    place_boxes(page, folder)
    fill(page, "count", "2")
    empty_a_number(page, "steps", "painting_command", "# Steps is empty; give a number")
    fill(page, "steps", "2")
    page.get_by_text("More settings").last.click()
    assert value_of(page, "guidance_scale") == value_of(page, "step_scale") == ""
    fill(page, "step_scale", "0.25")
    wait_until(page, "painting_command", "--num_inference_steps 2")
    wait_until(page, "painting_command", "--step_scale 0.25")
    page.locator("#paint").click()
    wait_until(page, "status", "painting cars: finished")
    page.wait_for_selector("#gallery img[src*='0001.png']")
    shoot(page, "3_paint")
    for number in range(2):
        facts = json.loads((folder / "output" / "cars" / f"000{number}.json").read_text())
        assert facts["boxes"] == json.loads(value_of(page, "boxes"))
        assert facts["settings"]["seed"] == number
        assert facts["settings"]["step_scale"] == 0.25
        assert facts["origins"]["step_scale"] == "as given" != facts["origins"]["guidance_scale"]


def paint_masks(page):
    """Brush over two of the cars, one after the other."""
    page.locator("#brush .keep").click()
    page.get_by_text("nothing is painted").wait_for()
    canvas = page.locator("#brush canvas")
    for number, (x, y) in enumerate(((0.07, 0.27), (0.6, 0.6))):
        canvas.scroll_into_view_if_needed()
        frame = canvas.bounding_box()
        left, top = frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]
        right, bottom = left + 0.2 * frame["width"], top + 0.06 * frame["height"]
        stroke(page, (left, top), (right, top), (left, bottom), (right, bottom))
        page.locator("#brush .keep").click()
        wait_until(page, "report", f"mask{number} covers")


def learn(page, folder):
    """Start learning, stop it so that it can be resumed, learn something shorter to its end."""
    page.get_by_role("tab", name="Learn").click()
    wait_until(page, "instance", "cars")
    fill(page, "train_steps", "200")
    fill(page, "finetune_steps", "2")
    page.get_by_text("More settings").first.click()
    for name in ("num_class_images", "learning_rate", "finetune_learning_rate", "class_prompt"):
        assert value_of(page, name) == ""
    empty_a_number(page, "checkpoint_steps", "learning_command", "# Steps between curves is empty")
    page.get_by_label("Start the tokens from what the things are").check()
    fill(page, "num_class_images", "1")
    fill(page, "checkpoint_steps", "2")
    wait_until(page, "learning_command", "--checkpoint_steps 2")
    command = value_of(page, "learning_command")
    assert "--initialize_from_class" in command and "_rate" not in command
    page.locator("#learn").click()
    page.wait_for_selector("#curves img")  # while it runs
    assert value_of(page, "status") == "learning cars: running"
    page.locator("#stop").click()
    wait_until(page, "status", "learning cars: stopped")
    work = folder / "Model_ours" / ".cars.work"
    assert "--resume" in value_of(page, "log") and list(work.iterdir())

    page.get_by_role("radio", name="go on (--resume)").check()
    wait_until(page, "learning_command", "--resume")
    page.get_by_role("radio", name="replace (--overwrite)").check()
    fill(page, "train_steps", "4")
    wait_until(page, "learning_command", "--overwrite")
    wait_until(page, "learning_command", "--train_steps 4")
    page.locator("#learn").click()
    wait_until(page, "status", "learning cars: finished")
    page.wait_for_selector("#maps img")
    manifest = json.loads((folder / "Model_ours" / "cars" / "manifest.json").read_text())
    assert manifest["settings"]["class_prompt"] == "a photo of a toy car" and not work.exists()


def empty_a_number(page, name, command, told):
    """A number that has to be there is missed where it is emptied."""
    fill(page, name, "")
    wait_until(page, command, told)


def place_boxes(page, folder):
    """See the preset boxes, drag one, move another by the keys, write both."""
    manifest = json.loads((folder / "Model_ours" / "cars" / "manifest.json").read_text())
    page.get_by_role("tab", name="Paint").click()
    wait_until(page, "model_id", "cars")
    page.wait_for_function(
        "!document.querySelector('#boxes textarea, #boxes input').value.startsWith('[[0.05, 0.25')"
    )
    preset = json.loads(value_of(page, "boxes"))
    for box, proportion in zip(preset, manifest["proportions"], strict=True):
        assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(proportion, rel=0.02)
        assert box[1] + box[3] == pytest.approx(1, abs=0.002)  # in the middle
    page.locator("#stage .stage").scroll_into_view_if_needed()
    frame = page.locator("#stage .stage").bounding_box()
    box = page.locator("#stage .box").first.bounding_box()
    stroke(
        page,
        (box["x"] + 30, box["y"] + 30),
        (box["x"] + 30, box["y"] + 30 - frame["height"] / 10),
    )
    moved = wait_for_boxes(page, preset)
    assert moved[0] == pytest.approx(shifted(preset[0], 0, -0.1), abs=0.004)
    page.locator("#stage .box").nth(1).focus()
    for key in ("ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
        before, moved = moved, wait_for_boxes(page, moved)
        assert moved == [before[0], pytest.approx(shifted(before[1], 0, -0.01), abs=1e-6)]
    page.keyboard.press("Shift+ArrowLeft")
    left, top, right, bottom = moved[1]
    smaller = [left, top, pytest.approx(right - 0.01, abs=1e-6), bottom]
    assert wait_for_boxes(page, moved)[1] == smaller
    fill(page, "boxes", "[[0.05, 0.1, 0.45, 0.6], [0.5, 0.2, 0.95, 0.7]]")
    page.locator("#boxes textarea, #boxes input").press("Tab")
    page.wait_for_function("document.querySelector('#stage .box').style.top === '10%'")


def shifted(box, dx, dy):
    return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]


def wait_for_boxes(page, before):
    """The written boxes once they are others than before."""
    script = (
        """before => document.querySelector('#boxes textarea, #boxes input').value !== before"""
    )
    page.wait_for_function(script, arg=json.dumps(before))
    return json.loads(value_of(page, "boxes"))
