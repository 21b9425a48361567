"""Reading pictures and masks: every way they are stored, sizes worked by hand, damaged files."""

import hashlib
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from imagelab.errors import UserError
from imagelab.io.images import (
    mask_window,
    open_picture,
    read_image,
    read_mask,
    resize_mask,
    working_size,
)

SIDE = 64
MODES = ("1", "L", "RGB", "LA", "RGBA", "RGBA opaque", "P", "P transparent", "I;16", "L + tRNS")


def disc(width=SIDE, height=SIDE, x=0.5, y=0.5, radius=0.25):
    """A bool [height, width] ellipse; x, y and radius are fractions of the sides."""
    rows, columns = np.mgrid[0.5:height, 0.5:width]
    return ((columns / width - x) ** 2 + (rows / height - y) ** 2) < radius**2


def grey(inside):
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))


def mask_image(inside, mode, rng):
    """The mask as a picture of the given kind, with random levels near black and near white."""
    light, dark = rng.integers(200, 256, inside.shape), rng.integers(0, 56, inside.shape)
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


def read_saved(image, path, **options):
    """The mask of an image that is saved first."""
    image.save(path, **options)
    return read_mask(path)


@pytest.mark.parametrize("mode", MODES)
def test_mask_modes(tmp_path, mode):
    inside = disc()
    path = tmp_path / "mask0.png"
    assert np.array_equal(
        read_saved(mask_image(inside, mode, np.random.default_rng(1)), path), inside
    )
    with Image.open(path) as stored:
        assert stored.format == "PNG"


@settings(max_examples=40, deadline=None)
@given(bits=st.binary(min_size=512, max_size=512), mode=st.sampled_from(MODES), seed=st.integers(0))
def test_any_binary_mask_is_read_back(tmp_path_factory, bits, mode, seed):
    inside = np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(SIDE, SIDE).astype(bool)
    assume(inside.any() and not inside.all())
    path = tmp_path_factory.mktemp("masks") / "mask0.png"
    image = mask_image(inside, mode, np.random.default_rng(seed))
    assert np.array_equal(read_saved(image, path), inside)


def test_a_jpeg_called_png_is_thresholded(tmp_path):
    inside = np.zeros((SIDE, SIDE), bool)
    inside[16:48, 8:40] = True  # on JPEG's 8-pixel blocks, so that it can be compared exactly
    found = read_saved(grey(inside), tmp_path / "mask0.png", format="JPEG", quality=60)
    assert np.array_equal(found, inside)


def test_the_limit_is_halfway_between_the_areas(tmp_path):
    """Areas of 20 and 220, and a step of each level between them: those above 120 are inside."""
    levels = np.full((SIDE, SIDE), 20, np.uint8)
    levels[:, 40:] = 220
    levels[:, 36:40] = 119, 120, 121, 150
    found = read_saved(Image.fromarray(levels), tmp_path / "mask0.png")
    assert np.array_equal(found, levels >= 121)


# ----------------------------------------------------------------------------------------------
# pictures


def read_pixels(image, path, **options):
    """The sRGB pixels of an image that is saved first."""
    image.save(path, **options)
    picture = read_image(path)
    assert picture.mode == "RGB" and picture.info == {}
    return np.asarray(picture).astype(int)


def test_16_bit_and_transparent_pictures(tmp_path):
    path = tmp_path / "a.png"
    grey16 = Image.fromarray(np.full((SIDE, SIDE), 0x80FF, np.uint16))
    assert (read_pixels(grey16, path) == 0x80).all()
    picture = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 255))
    picture.paste((10, 20, 30, 0), (0, 0, 32, SIDE))
    pixels = read_pixels(picture, path)
    assert (pixels[:, :32] == 255).all() and (pixels[:, 32:] == (10, 20, 30)).all()
    assert open_picture(path).has_alpha
    assert open_picture(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


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
    options = {"icc_profile": DISPLAY_P3, "transparency": (0, 0, 0)}
    pixels = read_pixels(picture, tmp_path / "a.png", **options)
    assert (pixels[:, :32] == 255).all()
    assert np.abs(pixels[:, 32:] - (89, 203, 71)).max() <= 1


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of greys whose light is their level to the power of gamma."""
    white = struct.pack(">3i", *(round(65536 * v) for v in (0.9642, 1, 0.8249)))
    tags = {
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(256 * gamma)),
        b"wtpt": b"XYZ " + bytes(4) + white,
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey" + bytes(80),
        b"cprt": b"text" + bytes(4) + b"none" + bytes(4),
    }
    table, body, begin = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", begin + len(body), len(data))
        body += data
    header = bytearray(128)
    header[:4] = struct.pack(">I", begin + len(body))
    header[8:24] = b"\x02\x10\0\0mntrGRAYXYZ "
    header[36:40], header[68:80] = b"acsp", white
    return bytes(header) + table + body


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16"])
def test_a_profile_of_greys_is_applied_and_keeps_the_transparency(mode, tmp_path, caplog):
    """Linear light of 90/255 is 255 · (1.055 · 0.353^(1/2.4) − 0.055) = 160 in sRGB."""
    levels = np.full((SIDE, SIDE), 90, np.uint8)
    levels[:, 32:] = 0
    options = {"icc_profile": grey_profile(1.0)}
    if mode in ("L", "P", "I;16"):
        options["transparency"] = 0
        picture = Image.fromarray(levels.astype(np.uint16) * 257 if mode == "I;16" else levels)
        picture = picture.convert("P") if mode == "P" else picture
    else:
        picture = Image.fromarray(levels).convert(mode)
        picture.putalpha(Image.fromarray(np.where(levels, 255, 0).astype(np.uint8)))
    pixels = read_pixels(picture, tmp_path / "a.png", **options)
    assert (pixels[:, 32:] == 255).all()
    assert np.abs(pixels[:, :32] - 160).max() <= 1
    assert "profile" not in caplog.text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_applied(mode, tmp_path, caplog):
    """Display P3's (120, 200, 90) by hand: linear light through P3's matrix and back by sRGB's."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.new("RGB", (SIDE, SIDE), (120, 200, 90))
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    pixels = read_pixels(picture, tmp_path / "a.png", icc_profile=DISPLAY_P3, exif=exif)
    assert np.abs(pixels - (89, 203, 71)).max() <= 1
    assert "profile" not in caplog.text


def test_a_colour_profile_that_cannot_be_used_is_a_warning(tmp_path, caplog):
    picture = Image.new("RGB", (SIDE, SIDE), "teal")
    pixels = read_pixels(picture, tmp_path / "img.jpg", icc_profile=b"none")
    assert np.abs(pixels - (0, 128, 128)).max() <= 4  # JPEG
    assert "img.jpg: its colour profile cannot be used" in caplog.text


def test_exif_rotation_is_applied(tmp_path):
    shown = np.zeros((96, 64, 3), np.uint8)
    shown[:32] = (255, 0, 0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # viewers turn the stored picture 90° clockwise
    path = tmp_path / "img.jpg"
    red = read_pixels(Image.fromarray(np.rot90(shown)), path, exif=exif, quality=95)[..., 0] > 128
    assert red.shape == (96, 64) and red[:31].all() and not red[33:].any()
    picture = open_picture(path)
    assert (picture.size, picture.stored_size, picture.was_turned) == ((64, 96), (96, 64), True)
    exif[ExifTags.Base.Orientation] = 0  # which is none
    Image.fromarray(shown).save(path, exif=exif)
    assert not open_picture(path).was_turned


def test_nothing_of_exif_is_kept(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    path = tmp_path / "img.jpg"
    Image.new("RGB", (SIDE, SIDE)).save(path, exif=exif, comment=b"private")
    assert b"a camera" in path.read_bytes()
    picture = read_image(path)
    assert not picture.info and not picture.getexif()


# ----------------------------------------------------------------------------------------------
# sizes


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


def test_working_sizes_that_make_no_sense():
    with pytest.raises(UserError, match="32 pixels is too small for the model; use at least 64"):
        working_size((64, 64), 32, 64)
    with pytest.raises(UserError, match="resize is 'crop'; choose 'aspect' or 'squash'"):
        working_size((64, 64), 64, 64, "crop")


def test_a_solid_mask_is_thresholded_at_half_a_pixel():
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
    assert np.array_equal(resize_mask(mask, (64, 64)), expected)


@settings(max_examples=12, deadline=None)
@given(row=st.integers(0, 511), column=st.integers(0, 511))
def test_a_thin_mask_does_not_vanish(row, column):
    line, dot = np.zeros((2, 512, 512), bool)
    line[:, column] = True
    dot[row, column] = True
    line, dot = (resize_mask(mask, (64, 64)) for mask in (line, dot))
    assert line[:, column // 8].all() and line.sum() == 64
    assert dot[row // 8, column // 8] and dot.sum() == 1


def test_the_window_of_a_mask():
    mask = np.zeros((8, 9), bool)
    mask[2, 3] = mask[5, 7] = True
    assert mask_window(mask) == (slice(2, 6), slice(3, 8))


# ----------------------------------------------------------------------------------------------
# what cannot be read


def png_header(side):
    """A PNG whose header claims side x side pixels, far beyond the data that follows."""
    data = bytearray(png(Image.new("L", (SIDE, SIDE))))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def png(image):
    from io import BytesIO

    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


UNREADABLE = {
    "empty": (b"", "cannot be read as a picture (unknown format); give a JPEG, PNG or WebP file"),
    "text": (b"hello", "cannot be read as a picture (unknown format)"),
    "cut": (png(grey(disc()))[:150], "cannot be read as a picture (image file is truncated"),
    "wide": (
        png(Image.new("RGB", (20_000, 64))),
        "is 20000 x 64 pixels, which is too large; shrink it, and masks together with their "
        "picture, to at most 16384 pixels a side and 100 megapixels",
    ),
    "large": (png_header(10_200), "is 10200 x 10200 pixels, which is too large"),
    "bomb": (png_header(20_000), "is over 100 megapixels, which is too large; shrink"),
}
NO_MASKS = {
    "dark": (
        Image.new("L", (SIDE, SIDE), 100),
        "is empty (its highest luminance is 100 of 255); paint the instance white on black",
    ),
    "dark, of 16 bits": (
        Image.fromarray(np.full((SIDE, SIDE), 255, np.uint16)),
        "is empty (its highest luminance is 255 of 65535)",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_unreadable_files(tmp_path, recwarn, case, read):
    content, sentence = UNREADABLE[case]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} {sentence}")) as error:
        read(path)
    assert "\n" not in str(error.value) and not recwarn.list


@pytest.mark.parametrize("case", NO_MASKS)
def test_masks_without_a_pixel_inside(tmp_path, case):
    image, sentence = NO_MASKS[case]
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_saved(image, tmp_path / "mask0.png")


def test_a_missing_file_and_other_formats(tmp_path):
    for path in (tmp_path / "no.png", tmp_path / "a.png/no.png"):
        (tmp_path / "a.png").touch()
        with pytest.raises(UserError, match=f"^there is no picture {path}; give a JPEG, PNG or"):
            read_image(path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(UserError, match=r"a.png cannot be read as a picture \(unknown format\)"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "link to a device"])
def test_what_may_never_end_is_not_read(tmp_path, kind):
    path = tmp_path / "img.png"
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is no file; give a JPEG, PNG or WebP file"):
        open_picture(path)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "img.png"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(UserError, match="img.png is 3072 MiB, which is too large"):
        open_picture(path)
