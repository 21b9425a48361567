"""Masks as people's tools write them: each file is read as a person would, or refused in words."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFilter

from imagelab.errors import UserError
from imagelab.io.images import open_picture, read_image, read_mask

SIDE = 96
ROWS, COLUMNS = np.mgrid[0.5:SIDE, 0.5:SIDE]


def disc(x=0.5, y=0.5, radius=0.3):
    return ((COLUMNS / SIDE - x) ** 2 + (ROWS / SIDE - y) ** 2) < radius**2


ROUND = disc()
LEFT, RIGHT = np.zeros((2, SIDE, SIDE), bool)
LEFT[24:72, 8:32] = RIGHT[24:72, 64:88] = True  # 48 x 24 of 96 x 96: an eighth each
BOTH = LEFT | RIGHT
RIM = disc(radius=0.35) & ~ROUND  # five pixels wide, as around the objects of VOC
LINE = np.zeros((SIDE, SIDE), bool)
LINE[:, 40] = True
ONE = np.zeros((SIDE, SIDE), bool)
ONE[48, 48] = True
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, *[0] * (252 * 3), 224, 224, 192]  # 0, 1, 2 and 255 of it


# ----------------------------------------------------------------------------------------------
# drawing


def greys(*layers, ground=0, dtype=np.uint8):
    """Levels on a ground: (where, level), the later ones over the earlier."""
    levels = np.full((SIDE, SIDE), ground, dtype)
    for where, level in layers:
        levels[where] = level
    return Image.fromarray(levels)


def deep(*layers, ground=0):
    return greys(*layers, ground=ground, dtype=np.uint16)


def colours(*layers, ground="black"):
    picture = Image.new("RGBA", (SIDE, SIDE), ground)
    for where, colour in layers:
        picture.paste(colour, mask=Image.fromarray(where))
    return picture if picture.getextrema()[3][0] < 255 else picture.convert("RGB")


def palette(*layers, ground=0, table=VOC):
    picture = greys(*layers, ground=ground)
    picture.putpalette(table)
    return picture


def photo():
    """Smooth and of many colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def smooth(picture, factor=4):
    """With the edges of a tool that smooths them: drawn larger and averaged."""
    return picture.resize((SIDE * factor,) * 2, Image.Resampling.BICUBIC).resize(
        (SIDE, SIDE), Image.Resampling.BOX
    )


def with_alpha(picture, alpha, hidden=None):
    """A picture with an alpha channel; ``hidden``: another picture where it is 0."""
    picture = picture.convert("RGB")
    if hidden is not None:
        picture = Image.composite(picture, hidden, alpha.point(lambda level: 255 * (level > 0)))
    picture.putalpha(alpha)
    return picture


def plain(colour):
    return Image.new("RGB", (SIDE, SIDE), colour)


def strokes(*places, opacity=0.4):
    """Alpha of a translucent brush: each stroke covers a share of what is still bare."""
    through = np.ones((SIDE, SIDE))
    for where in places:
        through[where] *= 1 - opacity
    return Image.fromarray((255 * (1 - through)).round().astype(np.uint8))


def salience():
    """As a network says it: nearly black and nearly white, everywhere a little off."""
    levels = smooth(greys((ROUND, 250), ground=3)).filter(ImageFilter.GaussianBlur(1))
    noise = np.random.default_rng(0).integers(-3, 4, (SIDE, SIDE))
    return Image.fromarray((np.asarray(levels) + noise).clip(0, 255).astype(np.uint8))


def jpeg_again(path):
    """What a JPEG makes of black and white, in a PNG."""
    greys((ROUND, 255)).save(path, "JPEG", quality=75)
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, "PNG")


def grey_png(depth, inside, outside):
    """A PNG of grey levels of less than 8 bits, which Pillow does not write."""

    def write(path):
        levels = np.where(ROUND, inside, outside).astype(np.uint8)
        bits = (levels[..., None] >> np.arange(depth)[::-1] & 1).reshape(SIDE, -1)
        rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
        parts = {"IHDR": struct.pack(">IIBBBBB", SIDE, SIDE, depth, 0, 0, 0, 0)}
        parts |= {"IDAT": zlib.compress(rows), "IEND": b""}
        data = b"\x89PNG\r\n\x1a\n"
        for name, body in parts.items():
            chunk = name.encode() + body
            data += struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(data)

    return write


def turned(path):
    """Stored on its side: viewers turn it by its EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(np.rot90(np.where(LEFT, 255, 0).astype(np.uint8)))
    stored.save(path, "PNG", exif=exif)


def animated(kind):
    def write(path):
        frames = [greys((LEFT, 255)), greys((RIGHT, 255)), greys((ROUND, 255))]
        frames[0].convert("RGB").save(path, kind, save_all=True, append_images=frames[1:])

    return write


def saved(picture, kind="PNG", **options):
    return lambda path: picture.save(path, kind, **options)


def write(made, path):
    """Write what a case has made: a picture, or a function that writes a file."""
    if isinstance(made, Image.Image):
        made = saved(made)
    made(path)


# ----------------------------------------------------------------------------------------------
# files that are read: what is written, what is inside, and the label that is asked for

READ = {
    # greys
    "1 bit": (Image.fromarray(ROUND), ROUND),
    "8 bits": (greys((ROUND, 255)), ROUND),
    "8 bits, smooth": (smooth(greys((ROUND, 255))), ROUND),
    "feathered": (greys((ROUND, 255)).filter(ImageFilter.GaussianBlur(4)), ROUND),
    "a thin line": (greys((LINE, 255)), LINE),
    "16 bits": (deep((ROUND, 65535)), ROUND),
    "16 bits, values 0 and 255": (deep((ROUND, 255)), ROUND),
    "16 bits, values 0 and 1": (deep((ROUND, 1)), ROUND),
    "16 bits that hold 12": (deep((ROUND, 4095)), ROUND),
    "2 bits": (grey_png(2, 3, 0), ROUND),
    "4 bits, values 0 and 1": (grey_png(4, 1, 0), ROUND),
    "values 0 and 1": (greys((ROUND, 1)), ROUND),
    "values 0 and 1, in RGB": (greys((ROUND, 1)).convert("RGB"), ROUND),
    "grey on black": (greys((ROUND, 100)), ROUND),
    "grey on black, smooth": (smooth(greys((ROUND, 100))), ROUND),
    "light on dark grey": (greys((ROUND, 200), ground=60), ROUND),
    "specks of another grey": (greys((ROUND, 255), (ONE, 100)), ROUND & ~ONE),
    "a network's": (salience(), ROUND),
    "white everywhere": (greys(ground=255), np.ones_like(ROUND)),
    "nearly white everywhere": (greys((ROUND, 250), ground=255), np.ones_like(ROUND)),
    # colours
    "RGB": (colours((ROUND, "white")), ROUND),
    "red on black": (colours((ROUND, (255, 0, 0))), ROUND),
    "dark red on black, smooth": (smooth(colours((ROUND, (128, 0, 0)))), ROUND),
    "blue on nearly black": (colours((ROUND, (0, 0, 255)), ground=(9, 9, 12)), ROUND),
    "cream on nearly black": (colours((ROUND, (250, 245, 225)), ground=(10, 9, 8)), ROUND),
    "yellow on black, soft": (
        colours((ROUND, "yellow")).filter(ImageFilter.GaussianBlur(3)),
        ROUND,
    ),
    # palettes
    "palette": (palette((ROUND, 1), table=[0, 0, 0, 255, 255, 255]), ROUND),
    "palette, white first": (palette((~ROUND, 1), table=[255, 255, 255, 0, 0, 0]), ROUND),
    "palette of few bits": (saved(palette((ROUND, 1), table=VOC[:12]), bits=2), ROUND),
    "labelme, VOC: label 1": (palette((ROUND, 1)), ROUND),
    "VOC: label 2": (palette((ROUND, 2)), ROUND),
    "palette of greys": (palette((ROUND, 3), table=[v for i in range(9) for v in [i] * 3]), ROUND),
    # transparency
    "opaque RGBA": (colours((ROUND, "white")).convert("RGBA"), ROUND),
    "a stray pixel of alpha 254": (
        with_alpha(colours((ROUND, "white")), greys((ONE, 254), ground=255)),
        ROUND,
    ),
    "a stray transparent pixel": (
        with_alpha(colours((ROUND, "white")), greys((ONE, 0), ground=255)),
        ROUND,
    ),
    "half transparent everywhere": (
        with_alpha(colours((ROUND, "white")), greys(ground=100)),
        ROUND,
    ),
    "cut out": (with_alpha(photo(), greys((ROUND, 255))), ROUND),
    "cut out, smooth": (with_alpha(photo(), smooth(greys((ROUND, 255)))), ROUND),
    "cut out, black under it": (with_alpha(photo(), greys((ROUND, 255)), plain("black")), ROUND),
    "cut out of a grey photo": (with_alpha(photo().convert("L"), greys((ROUND, 255))), ROUND),
    "cut out, with residue": (
        with_alpha(photo(), greys((disc(radius=0.45), 8), (ROUND, 255))),
        ROUND,
    ),
    "cut out, WebP": (saved(with_alpha(photo(), greys((ROUND, 255))), "WEBP"), ROUND),
    "under a veil": (with_alpha(photo(), greys((ROUND, 255), ground=102)), ROUND),
    "white brush": (with_alpha(plain("white"), greys((ROUND, 255)), plain("black")), ROUND),
    "white brush, white under it": (with_alpha(plain("white"), greys((ROUND, 255))), ROUND),
    "white brush, its colour rounded": (
        with_alpha(colours((LEFT, (252, 255, 254)), ground="white"), greys((ROUND, 255))),
        ROUND,
    ),
    "black brush": (with_alpha(plain("black"), greys((ROUND, 255))), ROUND),
    "red brush, white under it": (
        with_alpha(plain("red"), greys((ROUND, 255)), plain("white")),
        ROUND,
    ),
    "red brush, LA": (with_alpha(plain("red"), greys((ROUND, 255))).convert("LA"), ROUND),
    "alpha of 0 and 1": (with_alpha(plain("white"), greys((ROUND, 1))), ROUND),
    "brush of 40%": (with_alpha(plain("lime"), strokes(ROUND)), ROUND),
    "brush of 40%, smooth": (with_alpha(plain("lime"), smooth(strokes(ROUND))), ROUND),
    "brush of 40%, five strokes": (
        with_alpha(plain("lime"), strokes(*(disc(radius=r) for r in (0.3, 0.25, 0.2, 0.15, 0.1)))),
        ROUND,
    ),
    "brush of 40% on black": (smooth(colours((ROUND, (0, 102, 0)))), ROUND),
    "black is transparent": (
        saved(palette((ROUND, 1), table=[0, 0, 0, 255, 255, 255]), transparency=0),
        ROUND,
    ),
    "grey, black is transparent": (saved(greys((ROUND, 255)), transparency=0), ROUND),
    "RGB, black is transparent": (saved(colours((ROUND, "red")), transparency=(0, 0, 0)), ROUND),
    "16 bits, black is transparent": (saved(deep((ROUND, 65535)), transparency=0), ROUND),
    # other files
    "JPEG": (saved(greys((ROUND, 255)), "JPEG", quality=75), ROUND),
    "JPEG, red on black": (saved(colours((ROUND, "red")), "JPEG", quality=90), ROUND),
    "JPEG, then PNG": (jpeg_again, ROUND),
    "WebP": (saved(greys((ROUND, 255)), "WEBP", lossless=True), ROUND),
    "WebP that loses": (saved(greys((ROUND, 255)), "WEBP", quality=60), ROUND),
    "turned": (turned, LEFT),
    # labels
    "index 1 of VOC": (palette((LEFT, 1), (RIGHT, 2)), LEFT, "1"),
    "index 2 of VOC": (palette((LEFT, 1), (RIGHT, 2)), RIGHT, "2"),
    "index of the rim": (palette((ROUND, 1), (RIM, 255)), RIM, "255"),
    "index by its colour": (palette((LEFT, 1), (RIGHT, 2)), RIGHT, "#008000"),
    "the ground by its index": (palette((ROUND, 1)), ~ROUND, "0"),
    "a grey level": (greys((LEFT, 1), (RIGHT, 2)), RIGHT, "2"),
    "a level of 16 bits": (deep((LEFT, 26001), (RIGHT, 26002)), LEFT, "26001"),
    "1 of 1 bit": (Image.fromarray(ROUND), ROUND, "1"),
    "a colour": (colours((LEFT, (255, 0, 0)), (RIGHT, (0, 0, 255))), LEFT, "#FF0000"),
    "a grey of RGB": (colours((LEFT, (2, 2, 2)), (RIGHT, (2, 0, 9))), LEFT, "2"),
    "red on white": (colours((ROUND, "red"), ground="white"), ROUND, "#ff0000"),
}
ROUNDED = (  # their edges may be a pixel off
    "smooth", "feathered", "network", "soft", "JPEG", "WebP", "on black",
)  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_masks_that_are_read(tmp_path, case):
    made, inside, *label = READ[case]
    path = tmp_path / "mask0.png"
    write(made, path)
    wrong = read_mask(path, *label) != inside
    if any(word in case for word in ROUNDED):
        levels = Image.fromarray(inside).convert("L")
        edge = np.asarray(levels.filter(ImageFilter.MaxFilter(3))) != np.asarray(
            levels.filter(ImageFilter.MinFilter(3))
        )
        assert wrong[edge].mean() < 0.35
        wrong[edge] = False
    assert not wrong.any()


# ----------------------------------------------------------------------------------------------
# files that are refused: what is written, what is said of it, and the label that is asked for

BLACK_AND_WHITE = "is black where it is opaque (25% of the picture) and white where it is"
CUT = with_alpha(photo(), greys((ROUND, 255)))
REFUSED = {
    # nothing, or nearly nothing
    "black": (greys(), "is empty (its highest luminance is 0 of 255); paint the instance white"),
    "dark": (greys(ground=100), "is empty (its highest luminance is 100 of 255)"),
    "dark, 16 bits": (deep(ground=255), "is empty (its highest luminance is 255 of 65535)"),
    "dark on darker": (greys((ROUND, 110), ground=60), "is empty (its highest luminance is 110"),
    "dark noise": (
        saved(greys((ROUND, 1)), "JPEG", quality=95),
        "is empty (its highest luminance is 1 of 255)",
    ),
    "white on light": (
        greys((ROUND, 255), ground=200),
        "is light everywhere (its luminance is 200 to 255 of 255): the whole picture may be "
        "inside, or a part of it; paint the instance white on black",
    ),
    "light": (greys(ground=200), "is light everywhere"),
    "nearly one grey": (
        Image.fromarray(np.random.default_rng(0).integers(120, 136, (SIDE, SIDE), dtype=np.uint8)),
        "is neither black nor white in much of it",
    ),
    "one grey and specks": (
        greys((ONE, 140), (np.roll(ONE, 5), 135), ground=120),
        "is neither black nor white in much of it",
    ),
    # photos
    "a photo": (photo(), "is a picture in many colours and no mask; paint the instance white on"),
    "an opaque photo": (photo().convert("RGBA"), "is a picture in many colours and no mask"),
    "a photo, JPEG": (saved(photo(), "JPEG"), "is a picture in many colours and no mask"),
    "a grey photo": (photo().convert("L"), "is neither black nor white in much of it, like a pho"),
    "cut out on black": (
        Image.composite(photo(), plain("black"), Image.fromarray(ROUND)),
        "is a picture in many colours and no mask; paint the instance white on black, or save the "
        "instance alone, with all the rest transparent",
    ),
    "a red veil on a photo": (
        Image.composite(Image.blend(photo(), plain("red"), 0.5), photo(), Image.fromarray(ROUND)),
        "is a picture in many colours",
    ),
    # two colours
    "red on white": (
        colours((BOTH, "red"), ground="white"),
        "shows two colours (#ffffff 75%, #ff0000 25%), and either may be inside; paint the "
        "instance white on black, or name the one that is inside with --mask_label",
    ),
    "red on blue": (colours((BOTH, "red"), ground="blue"), "shows two colours (#0000ff 75%"),
    "green on red, of a palette": (
        palette((BOTH, 2), ground=1),
        "shows two colours (1 75%, 2 25%), and either may be inside",
    ),
    # labels
    "values 0, 1 and 2": (
        greys((LEFT, 1), (RIGHT, 2)),
        "holds several labels (0 75%, 1 12.5%, 2 12.5%), and any of them may be inside; save a "
        "mask for each thing, white on black, or name the one that is inside with --mask_label",
    ),
    "values 0, 1 and a thin 2": (greys((LEFT, 1), (LINE & ~LEFT, 2)), "holds several labels (0"),
    "values 0, 1 and 255": (greys((ROUND, 1), (RIM, 255)), "holds several labels (0"),
    "greys far apart": (greys((LEFT, 85), (RIGHT, 170)), "holds several labels (0 75%, 85 12.5"),
    "16 bits": (deep((LEFT, 26001), (RIGHT, 26002)), "holds several labels (0 75%, 26001 12.5"),
    "twelve near levels": (Image.fromarray((100 + COLUMNS // 8).astype(np.uint8)), "(100 8.33%"),
    "VOC with two": (palette((LEFT, 1), (RIGHT, 2)), "holds several labels (0 75%, 1 12.5%, 2"),
    "VOC with a rim": (palette((ROUND, 1), (RIM, 255)), "holds several labels (0 6"),
    "colours": (
        colours((LEFT, (128, 0, 0)), (RIGHT, (0, 128, 0))),
        "holds several labels (#000000 75%, #008000 12.5%, #800000 12.5%)",
    ),
    "a trimap": (greys((COLUMNS < 48, 128), (LEFT, 255)), "holds several labels (0 50%, 128 37"),
    "a trimap, JPEG": (
        saved(greys((disc(radius=0.4), 128), (ROUND, 255)), "JPEG", quality=75),
        "holds several labels (0",
    ),
    # transparency
    "white is transparent": (
        saved(palette((BOTH, 1), ground=0, table=[255, 255, 255, 0, 0, 0]), transparency=0),
        BLACK_AND_WHITE,
    ),
    "white is transparent, the rest black": (
        saved(palette((BOTH, 1), table=[0, 0, 0, 255, 255, 255]), transparency=1),
        "is black where it is opaque (75% of the picture) and white where it is transparent, and "
        "either may be inside; save it without transparency, the instance white on black",
    ),
    "grey, white is transparent": (
        saved(greys((~BOTH, 255)), transparency=255),
        BLACK_AND_WHITE,
    ),
    "black on hidden white": (
        with_alpha(plain("black"), greys((BOTH, 255)), plain("white")),
        BLACK_AND_WHITE,
    ),
    "white on black, the rim erased": (
        with_alpha(colours((LEFT, "white")), greys((ROWS < 72, 255))),
        "is transparent in part, and the rest has several colours (0 83.3%, 255 16.7%): all of "
        "that may be inside, or one colour alone; save it without transparency",
    ),
    "two colours on nothing": (
        colours((LEFT, "red"), (RIGHT, "blue"), ground=(0, 0, 0, 0)),
        "is transparent in part, and the rest has several colours (#0000ff 50%, #ff0000 50%)",
    ),
    "transparent everywhere": (
        with_alpha(colours((ROUND, "white")), greys()),
        "is transparent everywhere, and what lies under that may or may not be meant",
    ),
    "half opaque and opaque": (
        with_alpha(plain("white"), greys((LEFT, 102), (RIGHT, 255))),
        "is opaque in several degrees (40%, 100%): all of that may be inside, or its most opaque "
        "part alone; paint the instance with full opacity, and nothing else",
    ),
    # labels that are asked for
    "no such label": (
        palette((LEFT, 1), (RIGHT, 2)),
        "has no label 3; it holds 0 75%, 1 12.5%, 2 12.5%: give one of them with --mask_label",
        "3",
    ),
    "no such colour": (colours((ROUND, "red")), "has no label #00ff00; it holds #000", "#00ff00"),
    "no such level of 8 bits": (greys((BOTH, 255)), "has no label 26001; it holds 0 75", "26001"),
    "no label": (palette(), "--mask_label 'car' is no label; give a number, such as 1, or", "car"),
    "a negative label": (palette(), "--mask_label '-1' is no label", "-1"),
    "a long label": (palette(), f"--mask_label '{'1' * 40}' is no label", "1" * 1000),
    "a JPEG's label": (
        saved(greys((ROUND, 255)), "JPEG"),
        "is no PNG, which alone keeps labels exactly; save it as PNG",
        "255",
    ),
    # other files
    "animated PNG": (animated("PNG"), "is animated, with 3 pictures; save the one that is meant"),
    "animated WebP": (animated("WEBP"), "is animated, with 3 pictures"),
    "GIF": (saved(greys((ROUND, 255)), "GIF"), "cannot be read as a picture (unknown format)"),
    "TIFF": (saved(greys((ROUND, 255)), "TIFF"), "cannot be read as a picture (unknown format)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_are_refused(tmp_path, case):
    made, sentence, *label = REFUSED[case]
    path = tmp_path / "mask0.png"
    write(made, path)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        read_mask(path, *label)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))
    assert str(path) in str(error.value) or label


def test_there_are_many_cases():
    assert len(READ) >= 60 and len(REFUSED) >= 40


def test_two_levels_are_told_apart_wherever_they_lie(tmp_path):
    """127 is not above one half, 128 is: as far as that goes, this is black and white."""
    path = tmp_path / "mask0.png"
    greys((ROUND, 128), ground=127).save(path)
    assert np.array_equal(read_mask(path), ROUND)


def test_a_label_is_seen_from_a_small_area_on(tmp_path):
    """An area: two of 10 000 pixels like their neighbours. Of 96 x 96, that is two pixels."""
    path = tmp_path / "mask0.png"
    for side, is_label in ((3, False), (4, True)):  # 1 and 4 pixels with four neighbours like them
        square = np.zeros_like(ROUND)
        square[2 : 2 + side, 2 : 2 + side] = True
        greys((ROUND, 255), (square, 128)).save(path)
        if is_label:
            with pytest.raises(UserError, match="holds several labels"):
                read_mask(path)
        else:
            assert np.array_equal(read_mask(path), ROUND | square)  # 128 is above one half


def test_a_photo_of_several_pictures_is_the_first_of_them(tmp_path):
    """Phones write a second, smaller picture into a JPEG, which no viewer shows."""
    path = tmp_path / "img.jpg"
    first = plain("teal")
    first.save(path, "MPO", save_all=True, append_images=[plain("red")])
    assert open_picture(path).size == (SIDE, SIDE)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (0, 128, 128)).max() <= 4
