"""Draw boxes as a picture, to see a layout before it is synthesised.

A single box without a name is drawn white on black. Several boxes, a named box and boxes over a
picture (--image) are drawn as labelled outlines in colours. A box is left, top, right, bottom
(unless --box_format says otherwise), measured from the top left corner in fractions (0.25), percent
(25%) or pixels (128px).

    python visual_box_mask.py --top_left 128 128 --bottom_right 384 384
    python visual_box_mask.py --box "<asset0>=0,0.3,0.5,0.9" --box "<asset1>=0.5,0.3,1,0.9"
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from imagelab.boxes import (
    Box,
    check_box,
    draw_boxes,
    parse_box,
    parse_boxes,
    parse_named_box,
    raster,
)
from imagelab.cli import Parser, add_box_format, report_errors
from imagelab.errors import UserError, shorten
from imagelab.io.atomic import written_aside

if TYPE_CHECKING:
    from PIL import Image

TOP_LEFT = ("25%", "25%")
BOTTOM_RIGHT = ("75%", "75%")
SIZE = "512"  # pixels
MAX_SIDE = 8192  # pixels of --size
FILL = 0.25  # share of a box's colour inside a coloured box


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="visual_box_mask.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--top_left",
        nargs=2,
        metavar=("X", "Y"),
        help="top left corner of the box: fractions, or pixels as soon as a number without a unit "
        "in either corner exceeds 1 (default: 25%% 25%%, unless --box or --boxes is given)",
    )
    parser.add_argument(
        "--bottom_right",
        nargs=2,
        metavar=("X", "Y"),
        help="bottom right corner, likewise (default: 75%% 75%%)",
    )
    parser.add_argument(
        "--box",
        action="append",
        default=[],
        metavar="NAME=X0,Y0,X1,Y1",
        help='one box, such as "<asset0>=0.1,0.2,0.5,0.6", 10%%,20%%,50%%,60%% or '
        "256,256,512,512px; the name may be left out, the option may be repeated",
    )
    parser.add_argument(
        "--boxes", metavar="JSON", help='several boxes, "[[0.1,0.2,0.5,0.6], [0.5,0.2,0.9,0.6]]"'
    )
    add_box_format(parser)
    parser.add_argument("--image", type=Path, help="picture to lay the boxes over")
    parser.add_argument(
        "--size",
        help=f"canvas in pixels, WxH or one number for a square (default: {SIZE}, "
        "or the size of --image)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("mask.png"),
        help="PNG to write; a file of that name is replaced (default: %(default)s)",
    )
    return parser


def parse_size(text: str) -> tuple[int, int]:
    """Read `512` or `768x512` into (width, height)."""
    match = re.fullmatch(r"([0-9]{1,9})(?:[xX×]([0-9]{1,9}))?", text.strip())
    if not match:
        raise UserError(f"--size {shorten(text)!r} is not a size; write 512 or 768x512, in pixels")
    size = int(match[1]), int(match[2] or match[1])
    if not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise UserError(f"--size {text!r} is out of range; use 1 to {MAX_SIDE} pixels a side")
    return size


def read_boxes(args: argparse.Namespace, size: tuple[int, int]) -> tuple[list[Box], list[str]]:
    """All boxes that the options name, in the order corners, --box, --boxes, with their labels."""
    named: list[tuple[str, Box]] = []
    if args.top_left or args.bottom_right or not (args.box or args.boxes is not None):
        corners = (*(args.top_left or TOP_LEFT), *(args.bottom_right or BOTTOM_RIGHT))
        named.append(("", parse_box(corners, size, guess_pixels=True, box_format="corners")))
    form = args.box_format
    for text in args.box:
        if "=" in text and not text.lstrip().startswith("{"):
            named.append(parse_named_box(text, size, form))
        else:
            named.append(("", parse_box(text, size, box_format=form)))
    if args.boxes is not None:
        named.extend(("", box) for box in parse_boxes(args.boxes, size, form))

    named = [(shorten(name), box) for name, box in named]
    if len(named) > 1:
        named = [(name or f"box {i}", box) for i, (name, box) in enumerate(named, start=1)]
    for name, box in named:
        check_box(box, rows=size[1], columns=size[0], name=name or "the box")
    return [box for _, box in named], [name for name, _ in named]


def white_on_black(box: Box, size: tuple[int, int]) -> Image.Image:
    """The mask of one box, 255 inside and 0 outside."""
    from PIL import Image

    picture = Image.new("L", size)
    down, across = raster(box, rows=size[1], columns=size[0])
    picture.paste(255, (across.start, down.start, across.stop, down.stop))
    return picture


def save(picture: Image.Image, output: Path) -> None:
    """Write a PNG and the folder it goes to; a failure leaves the old file whole."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(output) as aside:
            picture.save(aside, format="PNG")
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror or error}); name another file"
        ) from None


def preview(args: argparse.Namespace) -> None:
    """Check every option, draw, save, and say what was drawn where."""
    from PIL import Image

    output, image = args.output, args.image
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {shorten(str(output))!r} does not end in .png; name a PNG file")
    if image and all(map(os.path.exists, (image, output))) and output.samefile(image):
        raise UserError(f"--output {output} is the picture of --image; name another file")
    if image and args.size is not None:
        raise UserError(
            f"--size {shorten(args.size)!r} cannot be combined with --image; leave one out"
        )
    picture = None
    if image:
        from imagelab.io.images import read_image

        picture = read_image(image)
    size = picture.size if image else parse_size(SIZE if args.size is None else args.size)
    boxes, labels = read_boxes(args, size)
    if image or any(labels):
        picture = draw_boxes(picture or Image.new("RGB", size), boxes, labels, fill=FILL)
    else:
        picture = white_on_black(boxes[0], size)
    save(picture, output)

    for box, label in zip(boxes, labels, strict=True):
        down, across = raster(box, rows=size[1], columns=size[0])
        print(
            f"{label or 'box'}: {','.join(f'{edge:g}' for edge in box)} = "
            f"{across.start},{down.start},{across.stop},{down.stop}px"
        )
    print(f"saved {output} ({size[0]}x{size[1]})")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with report_errors(parser):
        preview(args)
