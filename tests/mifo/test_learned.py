"""What is written beside learned assets and pictures is read back as it was."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thin import GOLDEN, load_golden

from imagelab.errors import UserError
from imagelab.io.tensors import write_tensors
from imagelab.models.stable_diffusion import load_base
from mifo.export import predict_noise
from mifo.learned import (
    FORMAT,
    MANIFEST,
    learned_names,
    portable,
    read_learned_folder,
    write_learned,
    write_pipeline,
)
from mifo.learned_files import read_learned_files

TEXT = st.text(st.characters(), max_size=20)  # any, as a path may hold bytes that are no letters
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
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
        "image_sha256": sha256,
        "mask_sha256": [sha256] * count,
        "settings": {
            **more,
            "instance": "toys",
            "folder_path": source,
            "finetune": "none",
            "finetune_steps": 0,
        },
        "separation": [0.5] * count,
    }
    path = tmp_path_factory.mktemp("learned") / "toys"
    rows = torch.randn(count, 4)
    path.mkdir()
    write_learned(path, None, rows, False, manifest)
    learned = read_learned_folder(path)
    assert learned.manifest == manifest
    assert learned.assets == list(range(count)) and learned.tokens == manifest["tokens"]
    files = [path / f"asset{i}.safetensors" for i in range(count)]
    found = read_learned_files(None, [str(file) for file in files])
    assert [base.file for base in found.bases] == files
    assert all((base.source, base.sha256) == (source, sha256) for base in found.bases)
    for each in (learned, found):
        assert torch.equal(torch.stack([each.rows[i] for i in range(count)]), rows)


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
        read_learned_folder(folder)


@pytest.mark.parametrize("name", ["lora", "none"])
def test_golden_folders_predict_what_they_did(name, tiny_sd):
    """Folders learned and predictions computed by an earlier version; the digest has to fit."""
    model, ids = read_learned_folder(GOLDEN / "learned" / name).load(str(tiny_sd))
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["<asset0>", "<asset1>"]
    golden = load_golden("golden_learned")
    for index, prompt in enumerate(["a photo of <asset0> and <asset1>", "<asset1> on the grass"]):
        wanted = golden[f"{name}_{index}"]
        assert (predict_noise(model, prompt) - wanted).abs().max() <= 1e-5


BAD_MANIFESTS = [
    ({"tokens": ["<asset1>"]}, "tokens is ['<asset1>']"),
    ({"tokens": []}, "tokens is []"),
    ({"tokens": {}}, "tokens is an object and not a list"),
    ({"settings": []}, "settings is a list and not an object"),
    ({"separation": [None, 1]}, "separation[0] is None and not a number"),
    ({"format": "1"}, "format is '1' and not a whole number"),
    ({"proportions": 1.5}, "proportions is 1.5 and not a list"),
    ({"proportions": [1, None]}, "proportions[1] is None and not a number"),
    ({"proportions": [1.5]}, "proportions is [1.5]"),
    ({"proportions": [1, 2, 3]}, "proportions is [1, 2, 3]"),
    ({"proportions": [1.5, 0]}, "proportions is [1.5, 0]"),
    ({"proportions": [-1, 2]}, "proportions is [-1, 2]"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_MANIFESTS)
def test_a_manifest_of_wrong_types(change, sentence, tmp_path):
    folder = shutil.copytree(GOLDEN / "learned" / "none", tmp_path / "toys")
    manifest = json.loads((folder / MANIFEST).read_text()) | change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=re.escape(f"{folder / MANIFEST}: {sentence}; learn")):
        read_learned_folder(folder)


@pytest.mark.parametrize(
    ("change", "known"),
    [({}, {}), ({"proportions": [1.5, 2]}, {"<asset0>": 1.5, "<asset1>": 2})],
)
def test_proportions_are_known_by_asset(change, known, tmp_path):
    """The folder was learned before they were kept."""
    folder = shutil.copytree(GOLDEN / "learned" / "none", tmp_path / "toys")
    manifest = json.loads((folder / MANIFEST).read_text()) | change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert read_learned_folder(folder).proportions == known


def test_rows_of_another_width_or_name(tmp_path, tiny_sd):
    folder = shutil.copytree(GOLDEN / "learned" / "none", tmp_path / "toys")
    row = folder / "asset1.safetensors"
    write_tensors(row, {"<asset1>": torch.ones(1, 3)})
    with pytest.raises(UserError, match="asset1.safetensors holds 3 numbers, and a token of .* 32"):
        read_learned_folder(folder).load(str(tiny_sd))
    for tensors in ({"<asset0>": torch.ones(1, 32)}, {"<asset1>": torch.ones(32)}):
        write_tensors(row, tensors)
        with pytest.raises(UserError, match="holds no embedding of <asset1>; learn the instance"):
            read_learned_folder(folder)


def test_a_killed_writer_leaves_the_folder_readable(tmp_path, tiny_sd):
    shutil.copytree(GOLDEN / "learned" / "none", tmp_path / ".toys.old")
    assert learned_names(tmp_path) == ["toys"]
    learned = read_learned_folder(tmp_path / "toys")
    assert learned.where == str(tmp_path / "toys")
    learned.load(str(tiny_sd))
    assert [path.name for path in tmp_path.iterdir()] == [".toys.old"]


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


@pytest.mark.parametrize(
    "name",
    ["folder_path", "output_dir", "class_images", "models_dir", "output_path", "lora", "tokens"],
)
def test_no_path_in_the_settings_names_a_person(name):
    absolute = "/home/ada/photos"
    shown = portable({"settings": {name: [absolute] if name == "tokens" else absolute}})
    assert shown["settings"][name] == (["photos"] if name == "tokens" else "photos")
