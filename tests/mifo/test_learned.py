"""What is written beside learned assets and pictures is read back as it was."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagelab.models.stable_diffusion import load_base
from mifo.learned import (
    FORMAT,
    MANIFEST,
    open_learned,
    portable,
    replacing,
    write_learned,
    write_pipeline,
)
from mifo.learned_files import open_files
from mifo.synthesis.paint import save_picture

TEXT = st.text(st.characters(), max_size=20)  # any, as a path may hold bytes that are no letters
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 12), source=TEXT, sha256=TEXT, more=st.dictionaries(TEXT, VALUES))
def test_any_manifest_is_read_back(tmp_path_factory, count, source, sha256, more):
    manifest = {
        **more,
        "format": FORMAT,
        "base_model": {"source": source, "sha256": sha256},
        "tokens": [f"<asset{i}>" for i in range(count)],
        "settings": {**more, "finetune": "none", "finetune_steps": 0},
    }
    path = tmp_path_factory.mktemp("learned") / "toys"
    rows = torch.randn(count, 4)
    with replacing(path) as folder:
        write_learned(folder, None, rows, False, manifest)
    learned = open_learned(path)
    assert learned.manifest == manifest
    assert learned.assets == list(range(count)) and learned.tokens == manifest["tokens"]
    files = [path / f"asset{i}.safetensors" for i in range(count)]
    found = open_files(None, [str(file) for file in files])
    assert list(found.bases) == files
    assert all(base == manifest["base_model"] for base in found.bases.values())
    assert torch.equal(torch.stack([found.rows[i] for i in range(count)]), rows)


def test_a_process_that_is_not_the_first_writes_a_whole_pipeline(small_sd, tmp_path, monkeypatch):
    """There transformers leaves the writing to the first one."""
    base = load_base(str(small_sd))
    monkeypatch.setattr(
        type(base.text_encoder), "should_save_on_this_rank", lambda self, is_main: False
    )
    write_pipeline(tmp_path / "pipeline", base)
    again = load_base(str(tmp_path / "pipeline")).text_encoder.state_dict()
    for name, tensor in base.text_encoder.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_another_format_is_told(learned_dir, tmp_path):
    folder = shutil.copytree(learned_dir / "toys", tmp_path / "toys")
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format": FORMAT + 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}, and .* reads format {FORMAT}"):
        open_learned(folder)


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=99), facts=VALUES
)
def test_what_a_picture_says_is_read_back(tmp_path_factory, prompt, facts):
    folder = tmp_path_factory.mktemp("pictures")
    facts = {"settings": {"prompt": prompt}, "more": facts}
    path = save_picture(folder, 3, Image.new("RGB", (2, 2)), facts)
    with Image.open(path) as picture:
        assert json.loads(picture.text["mifo"]) == facts
        assert picture.text["prompt"] == prompt
    assert json.loads(path.with_suffix(".json").read_text()) == facts


def test_written_files_hold_no_absolute_paths():
    settings = {
        "prompt": "/home/ada is no path", "folder_path": "/home/ada/photos", "model_path": "toybox",
        "output_dir": "Model_ours", "class_images": None, "tokens": ("/tmp/asset0.safetensors",),
    }  # fmt: skip
    facts = {"settings": settings, "base_model": {"source": "toybox"}}
    assert portable(facts) == {
        "settings": settings | {"folder_path": "photos", "tokens": ["asset0.safetensors"]},
        "base_model": {"source": "toybox"},
    }
    assert settings["folder_path"] == "/home/ada/photos"


def test_a_failure_leaves_the_earlier_folder(tmp_path):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys/mine").write_text("mine")
    with pytest.raises(RuntimeError), replacing(tmp_path / "toys") as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["toys", "mine"]
