"""The commands on two processes, which share the items."""

import json

import numpy as np
import torch
from forked import start_two
from PIL import Image

from mige import generate


def test_a_list_is_the_same_on_two_processes(model, place):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each process of a launch has: sums are rounded alike
    record = {"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>on the beach"}
    (place / "list.json").write_text(json.dumps([record] * 3))
    argv = f"--model {model} --items list.json --steps 2 --seed 3 --device cpu".split()
    argv += ["--mixed_precision", "no", "--output_path"]
    try:
        generate.main([*argv, "one"])
    finally:
        torch.set_num_threads(threads)
    shared = start_two("mige.generate", *argv, "two", cwd=place)
    out, told = shared.communicate()
    assert shared.returncode == 0, told
    names = sorted(path.name for path in (place / "one").iterdir())
    assert sorted(path.name for path in (place / "two").iterdir()) == names
    for name in ("0000.png", "0001.png", "0002.png"):
        with Image.open(place / "one" / name) as ours, Image.open(place / "two" / name) as theirs:
            assert np.array_equal(ours, theirs)
    assert out.count("0002.png") == 2  # the first process tells of all, and of the sheet
