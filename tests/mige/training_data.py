"""What tests of training share: a list of all tasks, its pictures, features of known numbers."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from conftest import picture
from safetensors.torch import save_file

from mige.data.features import Kind
from mige.data.records import parse_record

SHAPE = (4, 8, 8)  # of latents
RECORDS = [
    {
        "image": "x/Subjects200K/t/0.png", "source_path": [],
        "entity_path": ["x/Subjects200K/e/0.png"], "multi_prompt": "A<imagehere>on the Beach!",
    },
    {
        "image": "x/instructpix2pix/t/1.png", "source_path": ["x/instructpix2pix/s/1.png"],
        "entity_path": ["x/instructpix2pix/s/1.png"],
        "multi_prompt": "make the cup in<imagehere>red",
    },
    {
        "image": "x/replace/t/2.png", "source_path": ["x/replace/s/2.png"],
        "entity_path": ["x/replace/s/2.png", "x/replace/e/2.png"],
        "multi_prompt": "replace the cup in<imagehere>with<imagehere>",
    },
    {
        "image": "x/add/t/3.png", "source_path": ["x/add/s/3.png"],
        "entity_path": ["x/add/e/3.png", "x/add/s/3.png"],
        "multi_prompt": "put<imagehere>in<imagehere>",
    },
    {
        "image": "x/Subjects200K/t/4.png", "source_path": [],
        "entity_path": ["x/Subjects200K/e/0.png", "x/Subjects200K/e/4.png"],
        "multi_prompt": "a<imagehere>beside a<imagehere>",
    },
    {
        "image": "x/instructpix2pix/t/5.png", "source_path": ["x/instructpix2pix/t/1.png"],
        "entity_path": ["x/instructpix2pix/t/1.png"], "multi_prompt": "make it snow in<imagehere>",
    },
]  # fmt: skip
PLAIN = {
    "image": "x/Subjects200K/t/6.png", "source_path": [], "entity_path": [],
    "multi_prompt": "a dog on the beach",
}  # fmt: skip


def save_data(folder: Path, model: Path, records: list[dict] = RECORDS) -> Path:
    """d.json, its pictures, and F, features in one shard; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "d.json").write_text(json.dumps(records))
    paths = {path for each in records for path in parse_record(each).paths}
    for path in sorted(paths):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number_of(path), 33 + number_of(path) % 20, 40).save(file)
    (folder / "F").mkdir(exist_ok=True)
    (folder / "F/features.json").write_text(json.dumps(Kind.of_model(model).facts(1)))
    save_file({path: torch.cat(posterior(path)) for path in paths}, folder / "F/00000.safetensors")
    return folder


def number_of(path: str) -> int:
    return int(hashlib.md5(path.encode()).hexdigest()[:6], 16)


def posterior(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a picture's latents: noise that its path fixes."""
    rng = np.random.default_rng(number_of(path))
    mean, deviation = rng.normal(size=SHAPE) * 4, rng.uniform(0.1, 1, size=SHAPE)
    return tuple(torch.tensor(each, dtype=torch.float32) for each in (mean, deviation))


def usual(model: Path, output: str, *options: str) -> list[str]:
    """The options of a short training in a folder of `save_data`; later ones go first."""
    text = """--data d.json --features F --device cpu --mixed_precision no --seed 5 --workers 0
        --batch_size 4 --steps 2 --warmup_steps 0 --learning_rate 0.001 --dropout 0
        --sample_steps 0"""
    return [*text.split(), "--model", str(model), "--output", output, *options]
