"""The Python code of docs/python.md runs, on toybox, with fewer steps."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def python_blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shortened(code: str, changes: dict[str, str]) -> str:
    """The code with each text, which is there once, replaced."""
    for text, other in changes.items():
        assert code.count(text) == 1, text
        code = code.replace(text, other)
    return code


def run(code: str, name: str) -> dict:
    names: dict = {}
    exec(compile(code, name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder like the repository's, with an example in it."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "example/toy_car", folder / "example/toy_car")
    return folder


@pytest.fixture(scope="module")
def learned(place):
    """What the first example of docs/python.md makes."""
    code = shortened(
        python_blocks("docs/python.md")[0],
        {
            "num_class_images=16,": "prior_weight=0, train_steps=2, finetune_steps=1, lora_rank=2,",
            "num_images=4": "num_images=2, num_inference_steps=2, guidance_iterations=1",
        },
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return run(code, "docs/python.md")


def test_learning_and_painting_from_python(learned, place):
    assert learned["toys"].tokens == ["<asset0>", "<asset1>", "<asset2>"]
    assert (place / "mine/toy_car/asset2.safetensors").is_file()
    pictures = learned["pictures"]
    assert [list(p.boxes[1]) for p in pictures] == [[0.55, 0.35, 0.95, 0.65]] * 2
    saved = {path.name for path in (place / "output/mine").iterdir()}
    assert saved == {"0000.png", "0000.json", "0001.png", "0001.json"}
    assert (place / "sheet.png").is_file()


def test_the_objects_are_as_they_are_described(learned):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    section = text.split("\n## `LearnedInstance`\n")[1].split("\n## ")[0]
    described = re.findall(r"^\| `(\w+)", section, re.MULTILINE)
    shown = {name for name in dir(learned["toys"]) if name[0] != "_"}
    assert set(described) == shown
    section = text.split("\n## `Paintings` and `Painting`\n")[1].split("\n## ")[0]
    for name in ("sheet", "save"):
        assert f"`{name}(" in section and hasattr(learned["pictures"], name)
    for name in ("image", "boxes", "names", "facts", "with_boxes"):
        assert f"`{name}" in section and hasattr(learned["pictures"][0], name)


def test_the_pieces_run():
    _, method, sampling = python_blocks("docs/python.md")
    names = run(method, "docs/python.md")
    hidden = names["hidden"][0].view(4, 4, 4, 4)
    assert hidden[:, :2, :, 2:].all() and not hidden[:, :2, :, :2].any()
    names = run(shortened(sampling, {"steps=25": "steps=2"}), "docs/python.md")
    assert names["pixels"].shape == (2, 3, 128, 128)
    assert names["attention"].shape[:2] == (2, names["side"] ** 2)


def test_plain_diffusers_draws_with_toybox(tmp_path, monkeypatch):
    weights = "toybox/stable_diffusion/weights"
    [code] = python_blocks("toybox/stable_diffusion/README.md")[:1]
    code = shortened(code, {f'"{weights}"': repr(str(ROOT / weights)), "steps=25": "steps=2"})
    monkeypatch.chdir(tmp_path)
    run(code, "toybox/stable_diffusion/README.md")
    with Image.open(tmp_path / "toys.png") as picture:
        assert picture.size == (128, 128)
