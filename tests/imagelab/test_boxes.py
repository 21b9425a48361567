import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from imagelab.boxes import (
    PALETTE,
    Box,
    UnknownSize,
    box_mask,
    check_box,
    color_of,
    draw_boxes,
    parse_box,
    parse_boxes,
    parse_named_box,
    raster,
)
from imagelab.errors import UserError

ROOT = Path(__file__).parents[2]
BOX = Box(0.1, 0.2, 0.5, 0.6)


@st.composite
def boxes(draw):
    """Boxes in the picture whose sides are at least a thousandth."""
    edges = st.integers(0, 1000)
    x0, x1 = sorted(draw(st.lists(edges, min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(edges, min_size=2, max_size=2, unique=True)))
    return Box(x0 / 1000, y0 / 1000, x1 / 1000, y1 / 1000)


# --- parsing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "0.1,0.2,0.5,0.6",
        " 0.1 0.2  0.5\t0.6 ",
        ".1, 2e-1, +0.5, 0.60",
        "[0.1, 0.2, 0.5, 0.6]",
        "(0.1,0.2,0.5,0.6)",
        '["10%", "20%", "50%", "60%"]',
        "10%,20%,50%,60%",
        "10,20,50,60%",
        "10 20 50 60 %",
        "100px,100px,500px,300px",
        "100,100,500,300px",
        "100, 100, 500, 300 PX",
        "100px,20%,0.5,300px",
        [0.1, 0.2, 0.5, 0.6],
        ("10%", 0.2, "500px", "60 %"),
        np.array([0.1, 0.2, 0.5, 0.6]),
        BOX,
    ],
)
def test_every_format_of_a_box(value):
    assert parse_box(value, size=(1000, 500)) == BOX


def test_pixels_are_measured_on_the_width_and_the_height():
    assert parse_box("256,256,512,512px", size=(512, 1024)) == (0.5, 0.25, 1.0, 0.5)


def test_fractions_and_percent_need_no_size():
    assert parse_box("0,0,100%,1") == (0, 0, 1, 1)


def test_guessed_pixels():
    def guess(text):
        return parse_box(text, size=(512, 512), guess_pixels=True)

    assert guess("128 128 384 384") == (0.25, 0.25, 0.75, 0.75)
    assert guess("1 0.5 384 384") == (1 / 512, 0.5 / 512, 0.75, 0.75)
    assert guess("25% 25% 384 384") == (0.25, 0.25, 0.75, 0.75)
    assert guess("0 0.5 1 1") == (0, 0.5, 1, 1)


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "the box '' does not hold four numbers; write left, top, right, bottom"),
        ("0.1,0.2,0.5", "does not hold four numbers"),
        ("0,1,0,2,0,5,0,6", "does not hold four numbers"),
        ("0.1,,0.5,0.6", "holds '', which is not a number"),
        ("0.1,0.2,0.5,b", "holds 'b', which is not a number; write fractions"),
        ("0.1,0.2,0.5,0.6cm", "holds '0.6cm', which is not a number"),
        ("0.1,0.2,nan,0.6", "holds 'nan', which is not a number"),
        ([0.1, 0.2, float("inf"), 0.6], "holds 'inf', which is not a number"),
        ([0.1, 0.2, True, 0.6], "holds 'True', which is not a number"),
        ("[0.1,0.2,0.5,0.6", r"holds '\[0.1', which is not a number"),
        (
            "256,256,512,512",
            "holds 256, which is more than the whole picture; append px for pixels",
        ),
        ("256px,256,512,512px", "holds 256, which is more than the whole picture"),
        ("0.1,0.2,0.5,1e999", "holds inf, which is more than the whole picture"),
        ("-0.1,0.2,0.5,0.6", "has its left edge at -0.1 of the picture; keep it between 0 and 1"),
        ("10%,20%,50%,160%", "has its bottom edge at 1.6 of the picture"),
        ("0,0,768,512px", "has its right edge at 1.5 of the picture"),
        ("0.5,0.2,0.1,0.6", r"has its left edge \(0.5\) beyond its right edge \(0.1\); write left"),
        ("0.1,0.6,0.5,0.2", r"has its top edge \(0.6\) beyond its bottom edge \(0.2\)"),
        ("0.1,0.2,0.1,0.6", r"has its left edge \(0.1\) at its right edge \(0.1\)"),
    ],
)
def test_bad_boxes_say_what_is_wrong(value, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_box(value, size=(512, 512))
    assert "\n" not in str(error.value)


def test_pixels_without_a_canvas_are_an_error():
    with pytest.raises(UnknownSize, match="in pixels, but the size of the picture is not known"):
        parse_box("1px,1px,2px,2px")


def test_long_input_is_quoted_in_short():
    for value in ("0.1," * 10_000, [0.1] * 10_000, {"bbox": [0.1] * 10_000}, '{"bbox": "0.1'):
        with pytest.raises(ValueError, match=r"does not hold four|not valid JSON") as error:
            parse_box(value)
        assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "text",
    [
        "[[0.1, 0.2, 0.5, 0.6]]",
        "[0.1, 0.2, 0.5, 0.6]",
        "0.1,0.2,0.5,0.6",
        " [[.1, .2, .5, .6]] ",
        "[.1 .2 .5 .6]",
        "[10%, 20%, 50%, 60%]",
    ],
)
def test_a_list_with_one_box_and_a_flat_box_are_the_same(text):
    assert parse_boxes(text) == [BOX]


def test_a_list_of_boxes_in_several_units():
    text = '[[0, 0, 0.5, 1], ["50%", "0%", "100%", "100%"], [100, 100, 500, "300px"]]'
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1), BOX]
    assert parse_boxes(text, size=(1000, 500)) == boxes
    assert parse_boxes(text.replace('"', ""), size=(1000, 500)) == boxes


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"the boxes '' are not valid JSON \(Expecting value\); write a list of boxes"),
        ("[[0.1, 0.2", "are not valid JSON"),
        ("[[.1, .2, .5, .6], .5]", "are not valid JSON"),
        ("[[.1, .2, .5, .6], [.1, .2", "are not valid JSON"),
        ("[[.1, .2, .5, .6], x]", "are not valid JSON"),
        ("[box [.1, .2, .5, .6]]", "are not valid JSON"),
        ("hello", "the box 'hello' does not hold four numbers; write left, top"),
        ("[[0.1, 0.2, 0.5, a]]", "holds 'a', which is not a number; write fractions"),
        ("[" * 100_000, "are not valid JSON"),
        (
            "[[0, 0, 1, " + "9" * 5000 + "]]",
            "does not hold four numbers|more than the whole",
        ),
        ("[]", r"the boxes '\[\]' are not a list with boxes in it; write a list"),
        ("0.5", "are not a list with boxes in it"),
        ('{"<asset0>": [0, 0, 1, 1]}', "are not a list with boxes in it"),
        ("[[0, 0, 1, 1], 0.5]", "hold '0.5', which is not a box"),
        ("[[0, 0, 1]]", "does not hold four numbers"),
        ("[[0, 0, 1, null]]", "holds 'None', which is not a number"),
        ("[[0, 0, 1, NaN]]", "holds 'nan', which is not a number"),
        ("[[0, 0, 1, 1], [1, 0, 0, 1]]", "the box '1, 0, 0, 1' has its left edge"),
    ],
)
def test_bad_lists_of_boxes_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_boxes(text)
    assert "\n" not in str(error.value)


def test_a_named_box():
    assert parse_named_box("<asset0>=0.1,0.2,0.5,0.6") == ("<asset0>", BOX)
    assert parse_named_box(" cat = 100,100,500,300px", size=(1000, 500)) == ("cat", BOX)


@pytest.mark.parametrize("text", ["0.1,0.2,0.5,0.6", "=0.1,0.2,0.5,0.6", " =0,0,1,1"])
def test_a_box_without_its_name_is_an_error(text):
    with pytest.raises(ValueError, match="does not name its asset; write '<asset0>=0.1"):
        parse_named_box(text)


@given(boxes())
def test_what_is_written_is_read_back(box):
    assert parse_box(box) == box
    assert parse_box(", ".join(map(str, box))) == box
    assert parse_boxes(json.dumps([box, box])) == [box, box]
    assert parse_named_box("<asset7>=" + ",".join(map(str, box))) == ("<asset7>", box)
    percent = parse_box(",".join(f"{100 * edge}%" for edge in box))
    assert percent == pytest.approx(box, abs=1e-12)


@given(st.integers(2, 3000), st.integers(2, 3000), st.data())
def test_pixels_come_back_as_the_same_pixels(width, height, data):
    x0 = data.draw(st.integers(0, width - 1))
    y0 = data.draw(st.integers(0, height - 1))
    x1 = data.draw(st.integers(x0 + 1, width))
    y1 = data.draw(st.integers(y0 + 1, height))
    box = parse_box(f"{x0},{y0},{x1},{y1}px", size=(width, height))
    assert raster(box, rows=height, columns=width) == (slice(y0, y1), slice(x0, x1))


# --- as annotation tools write them -----------------------------------------------------------

CORNERS = {
    "VOC": {"xmin": 0.1, "ymin": 0.2, "xmax": 0.5, "ymax": 0.6},
    "Open Images": {"XMin": 0.1, "YMin": 0.2, "XMax": 0.5, "YMax": 0.6, "Confidence": 1},
    "x0": {"x0": 0.1, "y0": 0.2, "x1": 0.5, "y1": 0.6},
    "x1": {"x1": 0.1, "y1": 0.2, "x2": 0.5, "y2": 0.6},
    "edges": {"left": 0.1, "top": 0.2, "right": 0.5, "bottom": 0.6},
    "Qwen": {"bbox_2d": [100, 100, 500, "300px"], "label": "car"},
}
SIZES = {
    "x": {"x": 0.1, "y": 0.2, "width": 0.4, "height": 0.4},
    "w": {"x": "10%", "y": "20%", "w": "40%", "h": "40%", "id": 3},
    "Rekognition": {"Width": 0.4, "Height": 0.4, "Left": 0.1, "Top": 0.2},
}
CENTRES = {
    "cx": {"cx": 0.3, "cy": 0.4, "w": 0.4, "h": 0.4},
    "x_center": {"x_center": "300px", "y_center": "200px", "width": "400px", "height": "200px"},
}


def cases(*tables):
    return pytest.mark.parametrize("value", [v for t in tables for v in t.values()])


@cases(CORNERS, SIZES, CENTRES)
def test_names_say_what_the_numbers_are(value):
    size = (1000, 500)
    for written in (value, json.dumps(value), f"  {json.dumps(value, indent=1)} "):
        assert parse_box(written, size) == BOX
    assert parse_boxes(json.dumps(value), size) == [BOX]
    assert parse_boxes(json.dumps([value, [0.1, 0.2, 0.5, 0.6]]), size) == [BOX, BOX]
    assert parse_named_box("<asset0>=" + json.dumps(value), size) == ("<asset0>", BOX)


@pytest.mark.parametrize(
    ("box_format", "value"),
    [
        ("corners", "0.1,0.2,0.5,0.6"),
        ("xywh", "0.1,0.2,0.4,0.4"),
        ("xywh", "100,100,400,200px"),
        ("xywh", "10 20 40 40%"),
        ("xywh", ["100px", 0.2, 0.4, "40%"]),
        ("xywh", {"bbox": [100, 100, 400, "200px"], "category_id": 3, "area": 80_000}),
        ("corners", {"bbox": [0.1, 0.2, 0.5, 0.6]}),
        (None, {"bbox": [0.1, 0.2, 0.5, 0.6]}),
        ("cxcywh", "0.3 0.4 0.4 0.4"),
        ("cxcywh", "300,200,400,200px"),
    ],
)
def test_the_format_says_what_four_numbers_are(box_format, value):
    size = (1000, 500)
    assert parse_box(value, size, box_format=box_format) == BOX
    text = json.dumps(value)
    if not isinstance(value, str):
        assert parse_boxes(f"[{text}]", size, box_format) == [BOX]
        assert parse_box(text, size, box_format=box_format) == BOX
    else:
        assert parse_named_box(f"a={value}", size, box_format) == ("a", BOX)


@pytest.mark.parametrize(
    ("table", "own", "order"),
    [
        (CORNERS, "corners", "left, top, right, bottom"),
        (SIZES, "xywh", "left, top, width, height"),
        (CENTRES, "cxcywh", "centre x, centre y, width, height"),
    ],
)
def test_names_and_a_format_that_disagree(table, own, order):
    for value in table.values():
        assert parse_box(value, (1000, 500), box_format=own) == BOX
        for other in {"corners", "xywh", "cxcywh"} - {own}:
            message = f", which say {order}, and --box_format is {other}; leave that out, or write"
            with pytest.raises(UserError, match=message):
                parse_box(value, (1000, 500), box_format=other)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1, "b": 2}, "has no names that are known; write it once, with xmin, ymin, xmax"),
        ({"x": 0, "y": 0, "width": 1}, "has no names that are known"),
        ({"x0": 0, "y0": 0, "x1": 1, "y1": 1, "x2": 1, "y2": 1}, "holds its box in several ways"),
        ({"bbox": [0, 0, 1, 1], "bbox_2d": [0, 0, 1, 1]}, "holds its box in several ways"),
        ({"bbox": 5}, "has no list under bbox; write four numbers there"),
        ({"bbox_2d": {"x": 1}}, "has no list under bbox_2d; write four numbers there"),
        ({"bbox": [0, 0, 1]}, "does not hold four numbers; write left, top, right, bottom"),
        ({"bbox": [[0, 0], [1, 1]]}, "does not hold four numbers"),
        ({"xmin": 0, "ymin": 0, "xmax": None, "ymax": 1}, "holds 'None', which is not a number"),
        ({"xmin": 64, "ymin": 64, "xmax": 128, "ymax": 128}, "holds 64, .* append px for pixels"),
        ({"xmin": 0.5, "ymin": 0, "xmax": 0.1, "ymax": 1}, "write left, top, right, bottom$"),
        ({"x": 0.5, "y": 0, "width": 0.6, "height": 1}, "right edge at 1.1 of the picture"),
        ({"x": 0.5, "y": 0, "width": 0, "height": 1}, "a width of 0; write left, top, width, hei"),
        ({"cx": 0.5, "cy": 0.5, "w": 1, "h": -1}, "a height of -1; write centre x, centre y, wid"),
        ({"cx": 0.5, "cy": 0.5, "w": 1.5, "h": 1}, "holds 1.5, which is more than the whole pict"),
        ({"cx": 0.2, "cy": 0.5, "w": 0.5, "h": 1}, "has its left edge at -0.05 of the picture"),
        ('{"xmin": 0.1', r"is not valid JSON \(.*\); write {"),
        ("{'xmin': 0.1}", "is not valid JSON"),
        ('{"a":' * 100_000, "is not valid JSON"),
        ([10**400, 0, 1, 1], "holds 'a number of about 400 digits', which is not a number"),
    ],
)
def test_bad_objects_say_what_is_wrong(value, message):
    with pytest.raises(UserError, match=message) as error:
        parse_box(value, size=(512, 512))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_an_object_is_no_name_of_an_asset():
    with pytest.raises(UserError, match="does not name its asset"):
        parse_named_box('{"label": "a=b", "x": 0}')


def test_an_unknown_format():
    with pytest.raises(UserError, match="box_format is 'yolo'; give corners, xywh, cxcywh"):
        parse_box("0,0,1,1", box_format="yolo")


@pytest.mark.parametrize(
    "value", ["300,200,100,50px", [0.6, 0.2, 0.3, 0.4], {"bbox": [0, 0.5, 1, 0.5]}]
)
def test_sizes_that_are_no_corners_are_told_the_format(value):
    hint = "or give --box_format xywh for left, top, width, height"
    with pytest.raises(UserError, match=hint):
        parse_box(value, size=(1000, 500))
    with pytest.raises(UserError, match="write left, top, right, bottom$"):
        parse_box(value, size=(1000, 500), box_format="corners")
    box = parse_box(value, size=(1000, 500), box_format="xywh")
    assert box.x0 < box.x1 <= 1 and box.y0 < box.y1 <= 1


@pytest.mark.parametrize(
    ("value", "box_format", "expected"),
    [
        ("0,0,1.0000001,1", None, (0, 0, 1, 1)),
        ("-0.0000001,0,1,1.001", None, (0, 0, 1, 1)),
        ("0.5,0.25,0.5000001,0.75", "xywh", (0.5, 0.25, 1, 1)),
        ("0.5 0.5 1.000001 1", "cxcywh", (0, 0, 1, 1)),
        ("0,0,100.05%,100%", None, (0, 0, 1, 1)),
        ("0,0,512.3,512px", None, (0, 0, 1, 1)),
        ("0.999,0,1,1", None, (0.999, 0, 1, 1)),
    ],
)
def test_what_exceeds_the_picture_by_rounding_is_cut_off(value, box_format, expected):
    assert parse_box(value, (512, 512), box_format=box_format) == expected


@pytest.mark.parametrize("value", ["0,0,1.0011,1", "0,-0.0011,1,1", "0,0,513,512px", "0,0,101%,1"])
def test_what_exceeds_it_by_more_is_refused(value):
    with pytest.raises(UserError, match="more than the whole|of the picture; keep it between"):
        parse_box(value, (512, 512))


def test_rounding_makes_no_pixels_of_fractions():
    assert parse_box("0 0.5 1.0000001 1", (512, 512), guess_pixels=True) == (0, 0.5, 1, 1)


@given(boxes())
def test_one_box_in_every_format(box):
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    sizes, centred = (x0, y0, width, height), (x0 + width / 2, y0 + height / 2, width, height)
    for form, numbers in (("corners", box), ("xywh", sizes), ("cxcywh", centred)):
        assert parse_box(numbers, box_format=form) == pytest.approx(box, abs=1e-12)


# --- checking and rasterising ----------------------------------------------------------------


@pytest.mark.parametrize(
    "box, message",
    [
        (Box(float("nan"), 0, 1, 1), "box 1 has its left edge at nan of the picture"),
        (Box(0, float("-inf"), 1, 1), "box 1 has its top edge at -inf of the picture"),
        (Box(0, 0, 1.0001, 1), "box 1 has its right edge at 1.0001 of the picture"),
        (Box(0.5, 0, 0.5, 1), r"box 1 has its left edge \(0.5\) at its right edge \(0.5\)"),
        (Box(0, 0.7, 1, 0.6), r"box 1 has its top edge \(0.7\) beyond its bottom edge \(0.6\)"),
    ],
)
def test_check_refuses_what_is_no_box(box, message):
    with pytest.raises(ValueError, match=message):
        check_box(box)


def test_check_refuses_a_box_that_rounds_to_nothing():
    thin = Box(0.50, 0.1, 0.53, 0.9)
    check_box(thin)
    check_box(thin, rows=16, columns=64)
    message = (
        r"box 3 \(0.5, 0.1, 0.53, 0.9\) covers nothing of a grid of 16 columns and 8 rows; "
        r"make it larger than one cell \(0.0625 by 0.125\)"
    )
    with pytest.raises(ValueError, match=message):
        check_box(thin, rows=8, columns=16, name="box 3")


@pytest.mark.parametrize(
    "box, rows, columns, expected",
    [
        (Box(0.1, 0.2, 0.5, 0.6), 16, 16, (slice(3, 10), slice(2, 8))),
        (Box(0, 0, 1, 1), 5, 7, (slice(0, 5), slice(0, 7))),
        # Halves go to the even neighbour: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4.
        (Box(0.125, 0.375, 0.625, 0.875), 4, 4, (slice(2, 4), slice(0, 2))),
        (Box(0.25, 0.5, 0.75, 1), 8, 16, (slice(4, 8), slice(4, 12))),
    ],
)
def test_rasters_worked_by_hand(box, rows, columns, expected):
    assert raster(box, rows, columns) == expected


def test_a_mask_worked_by_hand():
    mask = box_mask(Box(0.25, 0, 0.75, 0.5), rows=2, columns=4)
    assert mask.dtype == bool
    assert mask.tolist() == [[False, True, True, False], [False, False, False, False]]


@given(boxes(), st.integers(1, 200), st.integers(1, 200))
def test_rasters_stay_in_the_grid_and_keep_the_area(box, rows, columns):
    down, across = raster(box, rows, columns)
    assert 0 <= down.start <= down.stop <= rows
    assert 0 <= across.start <= across.stop <= columns
    assert abs((down.stop - down.start) - (box.y1 - box.y0) * rows) <= 1 + 1e-9
    assert abs((across.stop - across.start) - (box.x1 - box.x0) * columns) <= 1 + 1e-9
    mask = box_mask(box, rows, columns)
    assert mask.shape == (rows, columns)
    assert mask.sum() == (down.stop - down.start) * (across.stop - across.start)


@given(boxes(), st.integers(1, 200), st.integers(1, 200))
def test_check_accepts_exactly_the_boxes_that_cover_something(box, rows, columns):
    if box_mask(box, rows, columns).any():
        check_box(box, rows, columns)
    else:
        with pytest.raises(ValueError, match="covers nothing"):
            check_box(box, rows, columns)


@given(boxes(), st.integers(1, 200))
def test_a_box_larger_than_one_cell_covers_something(box, size):
    larger = min(box.x1 - box.x0, box.y1 - box.y0) * size > 1 + 1e-9
    assert not larger or box_mask(box, size, size).any()


# --- drawing ---------------------------------------------------------------------------------


def changed(before, after):
    """The bounding box of the pixels that differ."""
    return ImageChops.difference(before.convert("RGB"), after).getbbox()


def test_colours_differ_and_repeat():
    assert len({color_of(i) for i in range(len(PALETTE))}) == len(PALETTE)
    assert color_of(len(PALETTE) + 2) == color_of(2)


def test_an_outline_lies_on_the_first_and_last_pixels_of_its_box():
    white = Image.new("RGB", (100, 80), "white")
    picture = draw_boxes(white, [Box(0.1, 0.25, 0.5, 0.75)], [""])
    pixels = np.array(picture)
    assert changed(white, picture) == (10, 20, 50, 60)
    outline = box_mask(Box(0.1, 0.25, 0.5, 0.75), 80, 100)
    outline[21:59, 11:49] = False
    assert (pixels[outline] == color_of(0)).all()
    assert (pixels[20:60, 10:50][2:-2, 2:-2] == 255).all()
    assert white.getextrema() == ((255, 255),) * 3, "the image given was drawn on"


def test_an_outline_shows_on_a_ground_of_its_own_colour():
    ground = Image.new("RGB", (100, 80), color_of(0))
    assert changed(ground, draw_boxes(ground, [Box(0.1, 0.25, 0.5, 0.75)], [""])) is not None


def test_fill_mixes_the_colour_in():
    picture = draw_boxes(Image.new("L", (100, 100)), [Box(0, 0, 0.5, 1)], [""], fill=0.5)
    assert picture.mode == "RGB"
    assert picture.getpixel((25, 50)) == tuple(channel // 2 for channel in color_of(0))
    assert picture.getpixel((75, 50)) == (0, 0, 0)


def test_neighbours_do_not_cover_each_other():
    left, right = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
    picture = draw_boxes(Image.new("RGB", (64, 64)), [left, right], ["", ""])
    assert picture.getpixel((31, 40)) == color_of(0)
    assert picture.getpixel((32, 40)) == color_of(1)


@pytest.mark.parametrize("side", [128, 512, 2048])
def test_a_label_is_readable_and_grows_with_the_picture(side):
    blank = Image.new("RGB", (side, side))
    box = Box(0.1, 0.1, 0.9, 0.9)
    label = changed(draw_boxes(blank, [box], [""]), draw_boxes(blank, [box], ["<asset0>"]))
    assert label[3] - label[1] >= max(10, side / 40)
    assert label[0] >= 0.1 * side - 1 and label[1] >= 0.1 * side - 1
    assert label[2] <= 0.9 * side


@pytest.mark.parametrize("index", range(len(PALETTE)))
def test_the_text_of_a_label_contrasts_with_its_colour(index):
    def luminance(color):  # WCAG 2
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (channel / 255 for channel in color)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    picture = draw_boxes(
        Image.new("RGB", (400, 400), (9, 9, 9)),
        [Box(0, 0, 1, 1)] * (index + 1),
        [""] * index + ["MMMM"],
    )
    colors = {color for _, color in picture.crop((3, 3, 40, 20)).getcolors(10_000)}
    text = colors & {(0, 0, 0), (255, 255, 255)}
    assert len(text) == 1
    low, high = sorted((luminance(text.pop()), luminance(color_of(index))))
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (64, 64), (128, 32), (700, 300)])
@pytest.mark.parametrize("box", [Box(0, 0, 0.1, 0.1), Box(0.95, 0.95, 1, 1), Box(0, 0, 1, 1)])
def test_any_picture_can_be_drawn_on(size, box):
    blank = Image.new("RGB", size)
    picture = draw_boxes(blank, [box, box], ["<asset0>", "a very long name indeed"], fill=0.3)
    assert picture.size == size
    assert changed(blank, picture) is not None


@pytest.mark.parametrize("box", [Box(0.95, 0.95, 1, 1), Box(0.98, 0, 1, 0.02), Box(0, 0.9, 1, 1)])
@pytest.mark.parametrize("size", [(128, 128), (500, 300)])
def test_a_label_at_the_border_is_drawn_whole(size, box):
    """The plate has as many pixels at the border as in the middle of the picture."""

    def plate(box):
        tight = draw_boxes(Image.new("RGB", size, "white"), [box], ["<asset0>"])
        bare = draw_boxes(Image.new("RGB", size, "white"), [box], [""])
        return np.array(ImageChops.difference(tight, bare)).any(axis=2)

    middle = plate(Box(0.4, 0.4, 0.42, 0.42))
    rows, columns = np.nonzero(middle)
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    rows, columns = np.nonzero(plate(box))
    assert np.ptp(columns) + 1 >= width - 4 and np.ptp(rows) + 1 >= height - 4


def test_a_label_does_not_hide_a_small_box():
    blank = Image.new("RGB", (500, 500))
    for box in (Box(0.4, 0.4, 0.42, 0.42), Box(0.4, 0.97, 0.42, 1)):
        down, across = raster(box, 500, 500)
        frame = (across.start, down.start, across.stop, down.stop)
        bare, labelled = (draw_boxes(blank, [box], [label]) for label in ("", "<asset0>"))
        assert changed(bare.crop(frame), labelled.crop(frame)) is None
        assert changed(bare, labelled) is not None


def test_a_label_too_long_for_the_picture_is_written_smaller():
    blank = Image.new("RGB", (64, 64))
    short, long = (
        draw_boxes(blank, [Box(0, 0, 1, 1)], [label]) for label in ("a", "<asset0> again")
    )
    bare = draw_boxes(blank, [Box(0, 0, 1, 1)], [""])
    assert changed(bare, long)[3] < changed(bare, short)[3]


def test_labels_of_boxes_with_one_corner_do_not_cover_each_other():
    boxes = [Box(0, 0, 1, 1), Box(0, 0, 0.6, 0.6), Box(0, 0, 0.6, 0.8)]
    picture = draw_boxes(Image.new("RGB", (512, 512)), boxes, ["<asset0>", "<asset1>", "<asset2>"])
    one = draw_boxes(Image.new("RGB", (512, 512)), boxes[:1], ["<asset0>"])
    bare = draw_boxes(Image.new("RGB", (512, 512)), boxes[:1], [""])
    left, top, right, bottom = changed(bare, one)
    assert changed(one.crop((4, 4, right, bottom)), picture.crop((4, 4, right, bottom))) is None
    below = {picture.getpixel((8, y)) for y in range(bottom, 3 * bottom)}
    assert {color_of(1), color_of(2)} <= below


def test_labels_and_boxes_have_to_be_as_many():
    with pytest.raises(ValueError):
        draw_boxes(Image.new("RGB", (64, 64)), [BOX], ["one", "two"])


def test_no_heavy_import():
    code = (
        "import sys, imagelab.boxes; "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
