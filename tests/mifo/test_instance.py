"""Instance folders: what they hold, how it is sized, errors and notes."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from imagelab.errors import UserError
from mifo.learning.instance import (
    coverage_report,
    find_image,
    find_masks,
    list_instances,
    read_instance,
)

SIDE = 64


def disc(width=SIDE, height=SIDE, x=0.5, y=0.5, radius=0.25):
    """A bool [height, width] ellipse; x, y and radius are fractions of the sides."""
    rows, columns = np.mgrid[0.5:height, 0.5:width]
    return ((columns / width - x) ** 2 + (rows / height - y) ** 2) < radius**2


def noise(width=SIDE, height=SIDE):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey(inside):
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))


def make_folder(root, masks, image=None, name="toy"):
    """An instance folder of bool arrays; the image is noise of the first mask's size."""
    folder = root / name
    folder.mkdir()
    if image is None:
        image = noise(*masks[0].shape[::-1])
    Image.fromarray(image).save(folder / "img.jpg", quality=95)
    for i, mask in enumerate(masks):
        grey(mask).save(folder / f"mask{i}.png")
    return folder


def read(folder, resolution=SIDE, multiple=8, resize="aspect"):
    return read_instance(folder, resolution, multiple, resize)


def test_what_an_instance_holds(tmp_path):
    masks = [disc(x=0.3), disc(x=0.7)]
    folder = make_folder(tmp_path, masks)
    instance = read(folder)
    with Image.open(folder / "img.jpg") as image:
        assert np.array_equal(instance.image, np.array(image))
    assert instance.image.dtype == np.uint8 and instance.masks.dtype == bool
    assert np.array_equal(instance.masks, np.stack(masks))
    assert (instance.name, instance.folder) == ("toy", folder)
    assert instance.source_size == (SIDE, SIDE)
    assert instance.image_hash == hashlib.sha256((folder / "img.jpg").read_bytes()).hexdigest()
    assert (
        instance.mask_hashes[1] == hashlib.sha256((folder / "mask1.png").read_bytes()).hexdigest()
    )
    assert instance.notes == ()


def test_masks_are_in_numeric_order(tmp_path):
    masks = [np.roll(disc(radius=0.1), 2 * i, axis=1) for i in range(11)]  # "10" sorts before "2"
    assert np.array_equal(read(make_folder(tmp_path, masks)).masks, np.stack(masks))


@pytest.mark.parametrize("name", ["img.jpeg", "img.png", "img.webp"])
def test_other_names_of_the_picture(tmp_path, name):
    folder = make_folder(tmp_path, [disc()])
    (folder / "img.jpg").unlink()
    Image.fromarray(noise()).save(folder / name)
    assert read(folder).image.shape == (SIDE, SIDE, 3)


def test_img_jpg_goes_before_other_names(tmp_path):
    folder = make_folder(tmp_path, [disc()], image=np.zeros((SIDE, SIDE, 3), np.uint8))
    Image.fromarray(noise()).save(folder / "img.png")
    assert read(folder).image.max() == 0


@pytest.mark.parametrize("name", ["IMG.JPG", "Img.jpeg", "img.PNG"])
def test_names_in_capitals(tmp_path, name):
    """Such as cameras and Windows write; of a disk that knows no capitals, likewise."""
    masks = [disc(x=0.3), disc(x=0.7)]
    folder = make_folder(tmp_path, masks)
    (folder / "img.jpg").rename(folder / name)
    (folder / "mask0.png").rename(folder / "MASK0.PNG")
    (folder / "mask1.png").rename(folder / "Mask01.png")
    assert np.array_equal(read(folder).masks, np.stack(masks))
    assert find_image(folder) == folder / name
    assert find_masks(folder) == [folder / "MASK0.PNG", folder / "Mask01.png"]
    assert list_instances(tmp_path) == ["toy"]


def test_img_jpg_in_capitals_goes_before_other_names(tmp_path):
    folder = make_folder(tmp_path, [disc()])
    (folder / "img.jpg").rename(folder / "IMG.JPG")
    Image.fromarray(noise()).save(folder / "img.png")
    assert find_image(folder) == folder / "IMG.JPG"


def rotated_folder(root, mask_size):
    """A photo stored as 96 x 64 whose EXIF (6) has viewers show it as 64 x 96, red at the top."""
    shown = np.zeros((96, 64, 3), np.uint8)
    shown[:32] = (255, 0, 0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # viewers turn the stored picture 90° clockwise
    folder = root / "photo"
    folder.mkdir()
    Image.fromarray(np.rot90(shown)).save(folder / "img.jpg", exif=exif, quality=95)
    grey(disc(*mask_size)).save(folder / "mask0.png")
    return folder


def test_exif_rotation_is_applied(tmp_path, caplog):
    instance = read(rotated_folder(tmp_path, (64, 96)))
    assert instance.source_size == (64, 96) and instance.image.shape == (96, 64, 3)
    red = instance.image[..., 0] > 128
    assert red[:31].all() and not red[33:].any()
    assert np.array_equal(instance.masks[0], disc(64, 96))
    assert "EXIF rotation" in instance.notes[0] and instance.notes[0] in caplog.text


def test_a_long_picture_is_squeezed_with_a_note(tmp_path, caplog):
    mask = np.zeros((64, 256), bool)
    mask[:, 128:] = True
    instance = read(make_folder(tmp_path, [mask]))
    assert instance.image.shape == (64, 96, 3)
    assert instance.masks[0, :, 48:].all() and not instance.masks[0, :, :48].any()
    assert "256 x 64 pixels and is squeezed to 96 x 64" in instance.notes[0]
    assert instance.notes[0] in caplog.text


def test_the_picture_is_averaged_when_it_shrinks(tmp_path):
    checkers = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    folder = make_folder(tmp_path, [disc(128, 128)])
    Image.fromarray(checkers).save(folder / "img.jpg", quality=100)
    assert np.abs(read(folder).image.astype(int) - 127).max() < 20


def test_squash_and_aspect_of_one_folder(tmp_path):
    folder = make_folder(tmp_path, [disc(160, 128)])
    aspect, squash = read(folder, 64, 16), read(folder, 64, 16, "squash")
    assert aspect.masks.shape == (1, 64, 80) and aspect.notes == ()
    assert squash.image.shape == (64, 64, 3) and "squeezed to 64 x 64" in squash.notes[0]


@pytest.mark.parametrize(("width", "noted"), [(192, False), (193, False), (196, True)])
def test_any_squeeze_from_beyond_the_longest_aspect_is_noted(tmp_path, width, noted):
    instance = read(make_folder(tmp_path, [disc(width, 128)]))
    assert instance.image.shape == (64, 96, 3)
    assert bool(instance.notes) == noted


def test_a_relative_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path, [disc()]))
    assert read(Path(".")).name == "toy"


def test_transparency_is_noted(tmp_path):
    folder = make_folder(tmp_path, [disc()])
    (folder / "img.jpg").unlink()
    picture = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 255))
    picture.paste((10, 20, 30, 0), (0, 0, 32, SIDE))
    picture.save(folder / "img.png")
    instance = read(folder)
    assert (instance.image[:, :32] == 255).all()
    assert len(instance.notes) == 1 and "alpha" in instance.notes[0]


def test_notes_on_masks(tmp_path):
    tiny = disc(radius=0.02)
    notes = read(make_folder(tmp_path, [np.ones((SIDE, SIDE), bool), tiny])).notes
    assert len(notes) == 2
    assert notes[0].startswith("mask0.png covers the whole picture")
    assert notes[1].startswith(f"mask1.png covers only {100 * tiny.mean():.3g}%")


def frame(left_out):
    """All of the picture but a square in its middle."""
    inside = np.ones((SIDE, SIDE), bool)
    inside[32 - left_out : 32 + left_out, 32 - left_out : 32 + left_out] = False
    return inside


def test_a_mask_that_may_be_inverted_is_noted(tmp_path):
    most = np.zeros((SIDE, SIDE), bool)
    most[1:] = True  # nearly all, but not the upper edge
    masks = [frame(16), frame(24), most]  # all but 32² and all but 48² of 64²
    notes = read(make_folder(tmp_path, masks)).notes
    assert notes == (
        "mask0.png covers 75% of the picture and touches all its edges: if the thing is what is "
        "left out, invert the mask",
    )


def test_files_whose_names_begin_with_mask_are_noted(tmp_path, caplog):
    folder = make_folder(tmp_path, [disc()])
    grey(disc()).save(folder / "mask_all.png")
    (folder / "masks").mkdir()
    (folder / "masks.txt").write_text("none")
    notes = read(folder).notes
    assert notes == ("mask_all.png is no mask by its name, and is passed over",)
    assert notes[0] in caplog.text


# ----------------------------------------------------------------------------------------------
# labels


@pytest.fixture
def labelled(tmp_path):
    """A folder whose masks are one picture of labels: a disc of 1 and one of 2."""
    masks = [disc(x=0.3, radius=0.15), disc(x=0.7, radius=0.15)]
    folder = make_folder(tmp_path, masks)
    labels = Image.fromarray(np.select(masks, [1, 2]).astype(np.uint8), mode="P")
    labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    for index in range(2):
        labels.save(folder / f"mask{index}.png")
    return folder, masks


def test_one_picture_of_labels_serves_all_masks(labelled):
    folder, masks = labelled
    for labels in (["1", "2"], ["#800000", "2"]):
        assert np.array_equal(read_instance(folder, SIDE, 8, labels=labels).masks, np.stack(masks))
    (folder / "mask1.png").unlink()
    assert np.array_equal(read_instance(folder, SIDE, 8, labels=["2"]).masks, [masks[1]])


def test_labels_that_do_not_fit(labelled):
    folder, _ = labelled
    for labels, sentence in (
        ((), "mask0.png holds several labels"),
        (["1"], "mask0.png and mask1.png mark the same pixels"),
        (["1", "3"], "mask1.png has no label 3"),
        (["1", "2", "3"], "--mask_label has 3 entries for 2 masks; give one for all or one for ea"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            read_instance(folder, SIDE, 8, labels=labels)


# ----------------------------------------------------------------------------------------------
# what cannot be learned from


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def save(name, image, **options):
    return lambda folder: image.save(folder / name, **options)


def truncate(name):
    def cut(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def link(name, target):
    return lambda folder: (folder / name).symlink_to(target)


def directory(name):
    return lambda folder: (folder / name).mkdir()


def two_pictures(folder):
    rename("img.jpg", "img.png")(folder)
    (folder / "img.webp").write_bytes((folder / "img.png").read_bytes())


BAD_FOLDERS = {
    "no picture": (remove("img.jpg"), "toy holds no img.jpg; save the picture under that name"),
    "two pictures": (two_pictures, "several pictures (img.png, img.webp); keep one"),
    "no masks": (remove("mask0.png", "mask1.png", "mask2.png"), "toy holds no mask; save one"),
    "gap": (remove("mask1.png"), "mask1.png is missing although there is a mask2.png"),
    "not from 0": (remove("mask0.png"), "mask0.png is missing although there is a mask2.png"),
    "number twice": (save("mask01.png", grey(disc())), "(mask01.png and mask1.png); keep one"),
    "mask is .jpg": (save("mask3.jpg", grey(disc())), "mask3.jpg is not a .png; save it as mask3"),
    "twice the picture": (save("IMG.jpg", grey(disc())), "several pictures (IMG.jpg, img.jpg)"),
    "number twice, in capitals": (
        save("MASK1.PNG", grey(disc()), format="PNG"),
        "(MASK1.PNG and mask1.png); keep one",
    ),
    "mask is .JPG": (
        save("MASK3.JPG", grey(disc())),
        "MASK3.JPG is not a .png; save it as mask3.png",
    ),
    "mask_3": (
        save("mask_3.png", grey(disc())),
        "mask_3.png is not called as masks are; if it is one, call it mask3.png, or move it out",
    ),
    "mask 3": (save("mask 3.png", grey(disc())), "mask 3.png is not called as masks are"),
    "mask (3)": (save("Mask (3).png", grey(disc())), "Mask (3).png is not called as masks are"),
    "mask3 copy": (save("mask3 copy.png", grey(disc())), "if it is one, call it mask3.png"),
    "mask-03.tif": (
        save("mask-03.tif", grey(disc())),
        "mask-03.tif is not called as masks are; if it is one, call it mask3.png",
    ),
    "link to nowhere": (
        link("mask3.png", "gone.png"),
        "mask3.png is a link to gone.png, which is not there; put the file there",
    ),
    "picture is a link to nowhere": (
        lambda folder: (remove("img.jpg")(folder), link("img.jpg", "/gone/img.jpg")(folder)),
        "img.jpg is a link to /gone/img.jpg, which is not there",
    ),
    "mask is a folder": (
        directory("mask3.png"),
        "mask3.png is a folder and no mask; give it another name",
    ),
    "animated picture": (
        save("img.jpg", grey(disc()), format="PNG", save_all=True, append_images=[grey(~disc())]),
        "img.jpg is animated, with 2 pictures; save the one that is meant by itself",
    ),
    "cut mask": (
        truncate("mask1.png"),
        "mask1.png cannot be read as a picture (image file is trun",
    ),
    "black mask": (
        save("mask1.png", Image.new("L", (SIDE, SIDE), 100)),
        "mask1.png is empty (its highest luminance is 100 of 255); paint the instance white",
    ),
    "other size": (
        save("mask1.png", grey(disc(80, 64))),
        "mask1.png is 80 x 64 pixels, img.jpg is 64 x 64 pixels; make the mask the size",
    ),
    "same mask": (
        save("mask2.png", grey(disc(x=0.4))),
        "mask1.png and mask2.png mark the same pixels; give each instance its own mask",
    ),
    "1 x 1": (
        save("img.jpg", Image.new("RGB", (1, 1))),
        "img.jpg is 1 x 1 pixels, which is too small; use a picture of at least 64 pixels a side",
    ),
    "20,000 wide": (
        save("img.jpg", Image.new("RGB", (20_000, 64)), format="PNG"),
        "img.jpg is 20000 x 64 pixels, which is too large; shrink it, and masks together with "
        "their picture, to at most 16384 pixels a side and 100 megapixels",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(tmp_path, case):
    spoil, sentence = BAD_FOLDERS[case]
    folder = make_folder(tmp_path, [disc(x=0.3), disc(x=0.4), disc(x=0.5)])
    read(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_mask_of_the_unrotated_size(tmp_path):
    folder = rotated_folder(tmp_path, (96, 64))
    with pytest.raises(ValueError, match="img.jpg has an EXIF rotation and is 64 x 96 pixels as"):
        read(folder)


def test_a_missing_folder_lists_the_others(tmp_path):
    make_folder(tmp_path, [disc()], name="b_car")
    make_folder(tmp_path, [disc()], name="a_fish")
    with pytest.raises(ValueError, match="no instance folder .*/truck; the .* are: a_fish, b_car$"):
        read(tmp_path / "truck")
    with pytest.raises(ValueError, match="no instance folder .*; the instances in .* are: none$"):
        read(tmp_path / "a_fish" / "truck")
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/nowhere; give the folder"):
        read(tmp_path / "nowhere" / "truck")


def test_list_instances(tmp_path):
    make_folder(tmp_path, [disc()], name="car")
    make_folder(tmp_path, [disc()], name="ape")
    (tmp_path / "empty").mkdir()
    (make_folder(tmp_path, [disc()], name="blind") / "img.jpg").unlink()
    make_folder(tmp_path, [disc()], name=".cars.new")  # one that is being saved
    (make_folder(tmp_path, [disc()], name="maskless") / "mask0.png").unlink()
    (tmp_path / "notes.txt").write_text("not a folder")
    assert list_instances(tmp_path) == ["ape", "car"]


def test_coverage_report(tmp_path):
    left, most, corner = np.zeros((3, SIDE, SIDE), bool)
    left[:, :32] = True  # 50%
    most[:, 16:] = True  # 75%, half of `left` in it
    corner[:16, :8] = True  # 2048 of 4096 · 1/16 = 3.125%, all of it in `left`
    instance = read(make_folder(tmp_path, [left, most, corner]))
    assert coverage_report(instance).splitlines() == [
        "toy: 64 x 64 pixels, worked on at 64 x 64 pixels",
        "mask0 covers 50% of the picture",
        "mask1 covers 75% of the picture",
        "mask2 covers 3.12% of the picture",
        "mask0 and mask1 share 50% of the smaller",
        "mask0 and mask2 share 100% of the smaller",
    ]


def test_reading_needs_no_torch(tmp_path):
    folder = make_folder(tmp_path, [disc()])
    code = (
        "import sys; from mifo.learning import instance;"
        f"print(instance.coverage_report(instance.read_instance({str(folder)!r}, 64, 8)));"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("toy: 64 x 64")
