"""A MIGEBench of two items a task, with pictures of noise."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

ADDED = "put<imagehere>in<imagehere>"
REPLACED = "replace the cup in<imagehere>with<imagehere>"


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Coarse noise, so that no two pictures look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def save_mask(path: Path, width: int, height: int, box: tuple[int, int, int, int]) -> None:
    """White in a box (left, top, right, bottom) on black."""
    inside = np.zeros((height, width), np.uint8)
    left, top, right, bottom = box
    inside[top:bottom, left:right] = 255
    Image.fromarray(inside).save(path)


def save_bench(folder: Path) -> Path:
    """add_bench.json and replace_bench.json with their pictures of 40×30."""
    for task, text in (("add", ADDED), ("replace", REPLACED)):
        items = []
        (folder / task).mkdir(parents=True)
        for idx in (3, 7):
            names = {kind: f"{task}/{idx}_{kind}.png" for kind in ("source", "target", "entity")}
            for at, name in enumerate(names.values()):
                noise(10 * idx + at + 100 * (task == "add")).save(folder / name)
            mask = f"{task}/{idx}_mask.png"
            save_mask(folder / mask, 40, 30, (5, 6, 25, 20))
            order = [names["entity"], names["source"]]
            items.append({
                "image": names["target"], "source_path": [names["source"]],
                "entity_path": order if task == "add" else order[::-1], "mask_path": [mask],
                "multi_prompt": text, "caption": "a cup on a shelf",
                "target_caption": "a red dog on a shelf", "object": "dog", "idx": idx,
            })  # fmt: skip
        (folder / f"{task}_bench.json").write_text(json.dumps(items))
    return folder


def change(path: Path, at: int, **facts) -> None:
    """Let an item of a list say something else."""
    items = json.loads(path.read_text())
    items[at] |= facts
    path.write_text(json.dumps(items))
