"""Pictures that are saved: numbered PNGs with what they were made of, and contact sheets."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from imagelab.boxes import Box, draw_boxes
from imagelab.io.atomic import write_new

MAX_SHEET_SIDE = 8192  # pixels
READABLE_SIDE = 384  # pixels, below which a saved sheet enlarges pictures for labels to be read
CAPTION_SIZE = 11  # pixels of letters, at least


# ----------------------------------------------------------------------------------------------
# numbered pictures


def next_number(folder: Path) -> int:
    """One more than the largest number among the PNGs of a folder."""
    return 1 + max((int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()), default=-1)


def save_picture(
    folder: Path, number: int, picture: Image.Image, facts: dict, words: Mapping[str, str]
) -> Path:
    """Write ``NNNN.png``, under the next free number if it is taken; its path.

    Args:
        facts: for a JSON file of the same name.
        words: for the PNG itself, where image viewers show them.
    """
    path = write_new(folder, lambda n: f"{number + n:04d}.png", encode_png(picture, words))
    text = json.dumps(facts, indent=2) + "\n"
    write_new(folder, lambda n: f"{path.stem}{f'_{n}' if n else ''}.json", text.encode())
    return path


def encode_png(picture: Image.Image, words: Mapping[str, str] | None = None) -> bytes:
    """A picture as PNG, with texts by keyword in it."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in (words or {}).items():
        info.add_text(keyword, text)
    buffer = BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------
# contact sheets


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet.

    picture: an image, or the path of one, which is read only when it is drawn.
    caption: a text under it, in ``colour``.
    boxes, labels: drawn over it.
    """

    picture: Image.Image | Path
    caption: str = ""
    colour: str = "black"
    boxes: Sequence[Box] = ()
    labels: Sequence[str] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture in pixels."""
        if isinstance(self.picture, Image.Image):
            return self.picture.size
        with Image.open(self.picture) as file:
            return file.size

    def draw(self, size: tuple[int, int]) -> Image.Image:
        """The picture at a size, with its boxes."""
        if isinstance(self.picture, Image.Image):
            picture = self.picture.convert("RGB")
        else:
            with Image.open(self.picture) as file:
                picture = file.convert("RGB")
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return draw_boxes(picture, self.boxes, self.labels) if self.boxes else picture


def contact_sheet(
    tiles: Sequence[Tile], columns: int | None = None, side: int | None = None, gap: int = 4
) -> Image.Image:
    """Pictures in a grid, in reading order, each in the middle of its cell.

    Args:
        columns: None for a grid as near to a square as it goes.
        side: pixels of each picture's longer side; None leaves the pictures at their sizes. They
            are shrunk where the sheet would be wider than MAX_SHEET_SIDE.
        gap: pixels between two cells.
    """
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    sizes = [_scaled(tile.size, side) for tile in tiles]
    shrink = min(1.0, MAX_SHEET_SIDE / (columns * max(map(max, sizes))))
    sizes = [tuple(max(1, round(shrink * edge)) for edge in size) for size in sizes]
    width, height = (max(size[axis] for size in sizes) for axis in (0, 1))
    font = ImageFont.load_default(max(CAPTION_SIZE, width // 24))
    captions = [_wrapped(tile.caption, font, width) for tile in tiles]
    line = sum(font.getmetrics())
    tall = height + line * max(len(caption) for caption in captions) + gap
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * tall - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (tile, size, caption) in enumerate(zip(tiles, sizes, captions, strict=True)):
        left, top = index % columns * (width + gap), index // columns * tall
        sheet.paste(tile.draw(size), (left + (width - size[0]) // 2, top + (height - size[1]) // 2))
        for number, text in enumerate(caption):
            draw.text((left + 2, top + height + number * line), text, tile.colour, font)
    return sheet


def sheet_of_lines(lines: Sequence[Sequence[Tile]], side: int) -> Image.Image:
    """A contact sheet with a line for each of ``lines``, which may be of different lengths."""
    columns = max(map(len, lines))
    blank = Tile(Image.new("RGB", (side, side), "white"))
    tiles = [tile for line in lines for tile in (*line, *[blank] * (columns - len(line)))]
    return contact_sheet(tiles, columns, side)


def _scaled(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """A size whose longer side is ``side``."""
    if side is None:
        return size
    return round(side * size[0] / max(size)), round(side * size[1] / max(size))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of a text that is to be as wide as a picture."""
    letters = max(10, int(width / font.getlength("n")))
    return textwrap.wrap(text, letters, max_lines=4, placeholder=" …")


def save_sheet(paths: Sequence[Path], boxes: Sequence[Box], labels: Sequence[str]) -> Path:
    """Write a contact sheet of saved pictures beside them, the boxes drawn over each; its path.

    Small pictures are enlarged by a whole number of times, for the labels to be read.
    """
    tiles = [Tile(path, boxes=boxes, labels=labels) for path in paths]
    largest = max(tiles[0].size)
    side = largest * max(1, READABLE_SIDE // largest)
    stem = f"sheet_{paths[0].stem}-{paths[-1].stem}"
    return write_new(
        paths[0].parent,
        lambda n: f"{stem}{f'_{n}' if n else ''}.png",
        encode_png(contact_sheet(tiles, side=side)),
    )
