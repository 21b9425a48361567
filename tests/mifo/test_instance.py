"""Instance folders: every way a mask can be stored, sizes worked by hand, errors, drawn views."""

import hashlib
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from imagelab.io.images import read_image, working_size
from mifo.learning.instance import coverage_report, list_instances, read_instance
from mifo.learning.views import View, sample_view
from mifo.tokens import asset_token, view_prompt

SIDE = 64
MODES = ("1", "L", "RGB", "LA", "RGBA", "RGBA opaque", "P", "P transparent", "I;16", "L + tRNS")


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


def mask_image(inside, mode, rng):
    """The mask as a picture of the given kind, with random levels on each side of ½."""
    light, dark = rng.integers(128, 256, inside.shape), rng.integers(0, 128, inside.shape)
    levels = np.where(inside, light, dark).astype(np.uint8)
    if mode == "1":
        return Image.fromarray(inside)
    if mode == "I;16":
        return Image.fromarray(levels.astype(np.uint16) * 256 + 255)
    if mode == "L":
        return Image.fromarray(levels)
    if mode == "L + tRNS":  # the level 200 is transparent
        image = Image.fromarray(np.where(inside, 90, 200).astype(np.uint8))
        image.info["transparency"] = 200
        return image
    if mode == "RGB":
        return Image.fromarray(levels).convert("RGB")
    if mode in ("P", "P transparent"):
        image = Image.fromarray(np.where(inside, 1, 0).astype(np.uint8), mode="P")
        colours = [0, 0, 0, 255, 255, 255] if mode == "P" else [200, 0, 0, 0, 0, 90]
        image.putpalette(colours)
        if mode == "P transparent":
            image.info["transparency"] = 0
        return image
    if mode == "RGBA opaque":
        return Image.fromarray(levels).convert("RGBA")
    image = Image.fromarray(rng.integers(0, 256, inside.shape, dtype=np.uint8)).convert(mode)
    image.putalpha(Image.fromarray(levels))
    return image


@pytest.mark.parametrize("mode", MODES)
def test_mask_modes(tmp_path, mode):
    inside = disc()
    folder = make_folder(tmp_path, [inside])
    mask_image(inside, mode, np.random.default_rng(1)).save(folder / "mask0.png")
    with Image.open(folder / "mask0.png") as stored:
        assert stored.format == "PNG"
    assert np.array_equal(read(folder).masks, inside[None])


@settings(max_examples=40, deadline=None)
@given(bits=st.binary(min_size=512, max_size=512), mode=st.sampled_from(MODES), seed=st.integers(0))
def test_any_binary_mask_is_read_back(tmp_path_factory, bits, mode, seed):
    inside = np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(SIDE, SIDE).astype(bool)
    assume(inside.any() and not inside.all())
    folder = make_folder(tmp_path_factory.mktemp("masks"), [disc()])
    mask_image(inside, mode, np.random.default_rng(seed)).save(folder / "mask0.png")
    assert np.array_equal(read(folder).masks[0], inside)


def test_a_jpeg_called_png_is_thresholded(tmp_path):
    inside = np.zeros((SIDE, SIDE), bool)
    inside[16:48, 8:40] = True  # on JPEG's 8-pixel blocks, so that it can be compared exactly
    folder = make_folder(tmp_path, [inside])
    grey(inside).save(folder / "mask0.png", format="JPEG", quality=60)
    assert np.array_equal(read(folder).masks[0], inside)


def test_the_threshold_is_one_half(tmp_path):
    levels = np.full((SIDE, SIDE), 127, np.uint8)
    levels[:, 40:] = 128
    folder = make_folder(tmp_path, [disc()])
    Image.fromarray(levels).save(folder / "mask0.png")
    assert np.array_equal(read(folder).masks[0], levels == 128)


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


def test_16_bit_and_transparent_pictures(tmp_path):
    folder = make_folder(tmp_path, [disc()])
    (folder / "img.jpg").unlink()
    Image.fromarray(np.full((SIDE, SIDE), 0x80FF, np.uint16)).save(folder / "img.png")
    assert (read(folder).image == 0x80).all()

    picture = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 255))
    picture.paste((10, 20, 30, 0), (0, 0, 32, SIDE))
    picture.save(folder / "img.png")
    instance = read(folder)
    assert (instance.image[:, :32] == 255).all()
    assert (instance.image[:, 32:] == (10, 20, 30)).all()
    assert len(instance.notes) == 1 and "alpha" in instance.notes[0]


def profile_with_primaries(**primaries) -> bytes:
    """sRGB's ICC profile with other colorants, ``rXYZ`` and so on: (X, Y, Z) under D50."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack(">I", profile[128:132])[0]):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if xyz := primaries.get(tag.decode()):
            struct.pack_into(">3i", profile, offset + 8, *(round(65536 * v) for v in xyz))
    return bytes(profile)


DISPLAY_P3 = profile_with_primaries(
    rXYZ=(0.51512, 0.24120, -0.00105),
    gXYZ=(0.29198, 0.69225, 0.04189),
    bXYZ=(0.15710, 0.06657, 0.78407),
)


def test_a_transparent_colour_survives_a_colour_profile(tmp_path):
    picture = Image.new("RGB", (SIDE, SIDE), (120, 200, 90))
    picture.paste((0, 0, 0), (0, 0, 32, SIDE))
    picture.save(tmp_path / "a.png", icc_profile=DISPLAY_P3, transparency=(0, 0, 0))
    pixels = np.asarray(read_image(tmp_path / "a.png")).astype(int)
    assert (pixels[:, :32] == 255).all()
    assert np.abs(pixels[:, 32:] - (89, 203, 71)).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_applied(mode, tmp_path, caplog):
    """Display P3's (120, 200, 90) by hand: linear light through P3's matrix and back by sRGB's."""
    folder = make_folder(tmp_path, [disc()])
    (folder / "img.jpg").unlink()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.new("RGB", (SIDE, SIDE), (120, 200, 90))
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    picture.save(folder / "img.png", icc_profile=DISPLAY_P3, exif=exif)
    assert np.abs(read(folder).image.astype(int) - (89, 203, 71)).max() <= 1
    assert "profile" not in caplog.text


def test_a_colour_profile_that_cannot_be_used_is_told(tmp_path, caplog):
    folder = make_folder(tmp_path, [disc()])
    Image.new("RGB", (SIDE, SIDE), "teal").save(folder / "img.jpg", icc_profile=b"none")
    assert np.abs(read(folder).image.astype(int) - (0, 128, 128)).max() <= 4  # JPEG
    assert "img.jpg: its colour profile cannot be used" in caplog.text


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


def test_an_exif_orientation_of_0_is_none(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 0
    folder = make_folder(tmp_path, [disc()])
    Image.fromarray(noise()).save(folder / "img.jpg", exif=exif)
    assert read(folder).notes == ()


@pytest.mark.parametrize(
    ("source", "resolution", "multiple", "resize", "expected"),
    [
        ((512, 512), 512, 64, "aspect", (512, 512)),
        ((4000, 3000), 512, 64, "aspect", (704, 512)),  # 682.7 is nearer to 11·64 than to 10·64
        ((3000, 4000), 512, 64, "aspect", (512, 704)),
        ((3000, 2000), 512, 64, "aspect", (768, 512)),
        ((1920, 1080), 512, 64, "aspect", (768, 512)),  # 910 is more than 1.5 · 512
        ((100, 5000), 512, 64, "aspect", (512, 768)),
        ((520, 512), 512, 64, "aspect", (512, 512)),
        ((4000, 3000), 128, 16, "aspect", (176, 128)),  # 170.7
        ((1920, 1080), 96, 32, "aspect", (128, 96)),  # 1.5 · 96 = 144 is no multiple: not above it
        ((512, 512), 500, 64, "aspect", (512, 512)),
        ((4000, 3000), 512, 64, "squash", (512, 512)),
        ((100, 5000), 128, 16, "squash", (128, 128)),
    ],
)
def test_working_sizes(source, resolution, multiple, resize, expected):
    assert working_size(source, resolution, multiple, resize) == expected


@given(
    source=st.tuples(st.integers(64, 16384), st.integers(64, 16384)),
    cells=st.integers(2, 16),
    multiple=st.sampled_from([8, 16, 32, 64]),
)
def test_working_sizes_keep_their_promises(source, cells, multiple):
    short, long = sorted(working_size(source, cells * multiple, multiple))
    assert short == cells * multiple and long % multiple == 0 and long <= 1.5 * short
    assert working_size(source[::-1], cells * multiple, multiple) in ((short, long), (long, short))


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


def test_a_solid_mask_is_thresholded_at_half_a_pixel(tmp_path):
    mask = np.zeros((128, 128), bool)
    mask[:, 32:65] = True  # columns 16..31 whole, and half of column 32
    mask[:32, 65:] = True
    mask[:, 0] = True  # half of column 0
    mask[0, 1:32:2] = True  # 1 of 4: not enough
    expected = np.zeros((64, 64), bool)
    expected[:, 16:33] = True
    expected[:16, 33:] = True
    expected[:, 0] = True
    expected[0, :16] = [True] + [False] * 15
    assert np.array_equal(read(make_folder(tmp_path, [mask])).masks[0], expected)


@settings(max_examples=12, deadline=None)
@given(row=st.integers(0, 511), column=st.integers(0, 511))
def test_a_thin_mask_does_not_vanish(tmp_path_factory, row, column):
    line, dot = np.zeros((2, 512, 512), bool)
    line[:, column] = True
    dot[row, column] = True
    masks = read(make_folder(tmp_path_factory.mktemp("thin"), [line, dot])).masks
    assert masks[0, :, column // 8].all() and masks[0].sum() == 64
    assert masks[1, row // 8, column // 8] and masks[1].sum() == 1


def test_notes_on_masks(tmp_path):
    tiny = disc(radius=0.02)
    notes = read(make_folder(tmp_path, [np.ones((SIDE, SIDE), bool), tiny])).notes
    assert len(notes) == 2
    assert notes[0].startswith("mask0.png covers the whole picture")
    assert notes[1].startswith(f"mask1.png covers only {100 * tiny.mean():.3g}%")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def save(name, image, **options):
    return lambda folder: image.save(folder / name, **options)


def truncate(name):
    def cut(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def two_pictures(folder):
    rename("img.jpg", "img.png")(folder)
    (folder / "img.webp").write_bytes((folder / "img.png").read_bytes())


def claim(name, side):
    """A PNG whose header claims side x side pixels, far beyond the data that follows."""

    def write_header(folder):
        data = bytearray((folder / "mask0.png").read_bytes())
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        (folder / name).write_bytes(data)

    return write_header


BAD_FOLDERS = {
    "no picture": (remove("img.jpg"), "toy holds no img.jpg; save the picture under that name"),
    "two pictures": (two_pictures, "several pictures (img.png, img.webp); keep one"),
    "no masks": (remove("mask0.png", "mask1.png", "mask2.png"), "toy holds no mask; save one"),
    "gap": (remove("mask1.png"), "mask1.png is missing although there is a mask2.png"),
    "not from 0": (remove("mask0.png"), "mask0.png is missing although there is a mask2.png"),
    "number twice": (save("mask01.png", grey(disc())), "(mask01.png and mask1.png); keep one"),
    "mask is .jpg": (save("mask3.jpg", grey(disc())), "mask3.jpg is not a .png; save it as mask3"),
    "mask is .PNG": (rename("mask2.png", "mask2.PNG"), "mask2.PNG is not a .png; save it as mask2"),
    "empty picture": (
        write("img.jpg", b""),
        "img.jpg cannot be read as a picture (unknown format)",
    ),
    "text picture": (write("img.jpg", b"hello"), "img.jpg cannot be read as a picture"),
    "cut picture": (
        truncate("img.jpg"),
        "img.jpg cannot be read as a picture (image file is trunc",
    ),
    "cut mask": (
        truncate("mask1.png"),
        "mask1.png cannot be read as a picture (image file is trun",
    ),
    "black mask": (
        save("mask1.png", Image.new("L", (SIDE, SIDE), 100)),
        "mask1.png is empty (its highest luminance is 100 of 255); paint the instance white",
    ),
    "dark 16-bit mask": (
        save("mask1.png", Image.fromarray(np.full((SIDE, SIDE), 255, np.uint16))),
        "mask1.png is empty (its highest luminance is 255 of 65535)",
    ),
    "faint mask": (
        save("mask1.png", Image.fromarray(disc().astype(np.uint8) * 90).convert("LA")),
        "mask1.png is empty (its highest luminance is 90 of 255)",
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
    "bomb": (
        claim("img.jpg", 20_000),
        "img.jpg is over 100 megapixels, which is too large; shrink",
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


def test_more_than_100_megapixels_are_refused_before_decoding(tmp_path, recwarn):
    folder = make_folder(tmp_path, [disc()])
    claim("mask0.png", 10_200)(folder)
    with pytest.raises(ValueError, match="mask0.png is 10200 x 10200 pixels, which is too large"):
        read(folder)
    assert not recwarn.list


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


@pytest.mark.parametrize(
    ("resolution", "resize", "sentence"),
    [
        (32, "aspect", "a resolution of 32 pixels is too small for the model; use at least 64"),
        (64, "crop", "resize is 'crop'; choose 'aspect' or 'squash'"),
    ],
)
def test_bad_settings(tmp_path, resolution, resize, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(make_folder(tmp_path, [disc()]), resolution, 64, resize)


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


def test_views_are_uniform_and_reproducible():
    count, draws = 3, 6000
    generator = torch.Generator().manual_seed(0)
    views = [sample_view(count, generator) for _ in range(draws)]
    tally = Counter(view.assets for view in views)
    # 3 ordered views of size 1, 6 of size 2, 6 of size 3; every size has a third of the draws.
    assert len(tally) == 15
    for assets, seen in tally.items():
        expected = draws / 3 / {1: 3, 2: 6, 3: 6}[len(assets)]
        assert abs(seen - expected) < 5 * expected**0.5
    flips = sum(view.flip for view in views)
    assert abs(flips - draws / 2) < 5 * (draws / 4) ** 0.5

    torch.manual_seed(1)  # the global generator has no say
    generator = torch.Generator().manual_seed(0)
    assert [sample_view(count, generator) for _ in range(50)] == views[:50]


def test_the_documented_order_of_draws():
    generator, again = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(20):
        size = int(torch.randint(1, 6, (), generator=again))
        assets = tuple(torch.randperm(5, generator=again).tolist()[:size])
        flip = bool(torch.randint(0, 2, (), generator=again))
        assert sample_view(5, generator) == View(assets, flip)


def test_prompts():
    assert asset_token(12) == "<asset12>"
    assert view_prompt((2, 0)) == "a photo of <asset2> and <asset0>"
    assert view_prompt((1,)) == "a photo of <asset1>"


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
