"""The example of the README does what its comments say."""

import re
from pathlib import Path

import torch

import mifo_lora

README = Path(__file__).parent.parent / "README.md"


def test_the_example_trains_saves_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(example.group(1), names)
    model, x = names["model"], names["x"]
    assert names["loss"] < 0.1 * x.shape[1]  # the variance of the sum is the width, 16
    merged = model(x)
    mifo_lora.unmerge(model)
    torch.testing.assert_close(model(x), merged, rtol=1e-4, atol=1e-4)
    mifo_lora.remove(model)
    assert not torch.allclose(model(x), merged, atol=0.1)
