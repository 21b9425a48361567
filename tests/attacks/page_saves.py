"""Saving an instance as the page does, as a command: a photo of one red, and masks."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from imagelab.cli import Parser, report_errors
from mifo_page.draft import open_photo, save_instance
from mifo_page.places import Places


def save(root: Path, red: int, may_replace: bool) -> Path:
    """Save ``root/toys``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photo.png")
        Image.new("RGB", (64, 64), (red, 0, 0)).save(path)
        draft = open_photo(path)
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 8:48, 8:28] = masks[1, 8:48, 36:56] = True
    draft = replace(draft, masks=tuple(masks[: 1 + (red > 100)]))
    return save_instance(Places(folder_path=str(root)), "toys", draft, may_replace)


def content(red: int) -> dict[str, bytes]:
    """The files of an instance folder of this red."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), red, False)
        return {each.name: each.read_bytes() for each in path.iterdir()}


def main(argv: list[str]) -> None:
    parser = Parser(prog="page_saves.py")
    parser.add_argument("red", type=int)
    parser.add_argument("--overwrite", action="store_true")
    options: argparse.Namespace = parser.parse_args(argv)
    with report_errors(parser):
        print(save(Path.cwd(), options.red, options.overwrite))
