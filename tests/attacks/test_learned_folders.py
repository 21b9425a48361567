"""What was learned, from strangers: folders, LoRA and token files, checkpoints, class images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hostile import CANARY, join_header, json_changes, outcome, some, split_header, tensor_changes

from imagelab.io.tensors import read_tensors, write_tensors
from imagelab.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from mifo.learned import LORA, MANIFEST, read_learned_folder
from mifo.learned_files import read_learned_files
from mifo.learning.classes import read_classes
from mifo.learning.priors import _read_cache


@pytest.fixture
def folder(learned_dir, tmp_path):
    """A copy of a learned folder, to make hostile."""
    return shutil.copytree(learned_dir / "toys", tmp_path / "toys")


def use(folder: Path) -> None:
    """Read a learned folder and put what it holds into its base model."""
    model, ids = read_learned_folder(folder).load(offline=True)
    text = model.encode_text(["a photo of <asset0> and <asset1>"])
    model.predict(torch.zeros(1, model.latent_channels, 16, 16), torch.tensor(10), text)
    assert len(ids) == 2


def put_manifest(folder: Path, change) -> None:
    path = folder / MANIFEST
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_a_good_folder_is_read(folder):
    assert outcome(lambda: use(folder)) == ""


@pytest.mark.parametrize("change", json_changes("tokens", "format"))
def test_manifests(folder, change):
    json_changes("tokens", "format")[change](folder / MANIFEST)
    assert MANIFEST in outcome(lambda: use(folder)) or change.startswith("a number")


@pytest.mark.parametrize(
    ("file", "change"),
    some([(file, change) for file in (LORA, "asset0.safetensors") for change in tensor_changes()]),
)
def test_tensors(folder, file, change):
    tensor_changes()[change](folder / file)
    assert file in outcome(lambda: use(folder))


def manifest_attacks() -> dict:
    """What a manifest may lead a reader to."""

    def settings(**facts):
        return lambda m: m["settings"].update(facts)

    def base(**facts):
        return lambda m: m["base_model"].update(facts)

    return {
        "a base model elsewhere": base(source="/etc"),
        "a base model above": base(source="../../secret"),
        "a pickle as base model": base(source="model.ckpt"),
        "a base model of the hub": base(source=f"nobody/{CANARY}"),
        "a base model with a zero byte": base(source="a\\0b"),
        "an endless base model": base(source="x" * 100_000),
        "another digest": base(sha256="0" * 64),
        "other configs": base(configs="0" * 64),
        "configs that are a list": base(configs=[]),
        "tokens that are others": lambda m: m.update(tokens=["<asset0>", "<asset7>"]),
        "ten thousand tokens": lambda m: m.update(tokens=[f"<asset{i}>" for i in range(10_000)]),
        "a token that is a path": lambda m: m.update(tokens=["../../asset0", "<asset1>"]),
        "fine-tuning by another name": settings(finetune=CANARY),
        "a whole model that is not there": settings(finetune="full"),
        "proportions of nothing": lambda m: m.update(proportions=[0, -1]),
        "proportions of more": lambda m: m.update(proportions=[1.0] * 50),
        "another format": lambda m: m.update(format=99),
    }


@pytest.mark.parametrize("attack", manifest_attacks())
def test_what_a_manifest_leads_to(folder, attack):
    put_manifest(folder, manifest_attacks()[attack])
    assert outcome(lambda: use(folder))


def test_the_base_model_that_moved_is_told_with_the_folder(folder):
    put_manifest(folder, lambda m: m["base_model"].update(source="./models/gone"))
    told = outcome(lambda: use(folder))
    assert str(folder) in told and "./models/gone" in told


# ----------------------------------------------------------------------------------------------
# single files


def lora_attacks() -> dict:
    """Metadata and keys of a LoRA file."""

    def metadata(**facts):
        def apply(path: Path) -> None:
            header, data = split_header(path)
            header["__metadata__"] = header.get("__metadata__", {}) | facts
            join_header(path, header, data)

        return apply

    def keys(change):
        def apply(path: Path) -> None:
            header, data = split_header(path)
            header = {change(k) if k != "__metadata__" else k: v for k, v in header.items()}
            join_header(path, header, data)

        return apply

    pattern = {"r": 2, "lora_alpha": 2, "target_modules": ["to_k"]}
    adapters = {
        "an expression that never ends": pattern | {"alpha_pattern": {"(a+)+$": 2}},
        "an expression that is broken": pattern | {"rank_pattern": {"(": 2}},
        "a pattern that is a list": pattern | {"alpha_pattern": []},
        "a pattern that is null": pattern | {"alpha_pattern": None},
        "an alpha beyond floats": pattern | {"lora_alpha": 10**30},
        "a rank of nothing": pattern | {"r": 0},
        "a strange class": pattern | {"peft_type": CANARY, "auto_mapping": {"parent": CANARY}},
    }
    return {
        **{k: metadata(lora_adapter_metadata=json.dumps({f"unet.{n}": v for n, v in each.items()}))
           for k, each in adapters.items()},
        "metadata that is no JSON": metadata(lora_adapter_metadata="{"),
        "metadata that is deep": metadata(lora_adapter_metadata="[" * 100_000),
        "a manifest that is no JSON": metadata(mifo="{"),
        "a manifest of another form": metadata(mifo="[]"),
        "keys of nobody": keys(lambda k: f"{CANARY}.{k}"),
        "keys that are paths": keys(lambda k: f"../../{k}"),
        "keys of a pickle": keys(lambda k: k.replace("unet", "__reduce__")),
        "very long keys": keys(lambda k: k + "x" * 10_000),
    }  # fmt: skip


@pytest.mark.parametrize("attack", lora_attacks())
def test_lora_files(folder, small_sd, attack):
    path = folder / LORA
    lora_attacks()[attack](path)
    tokens = [str(folder / f"asset{i}.safetensors") for i in range(2)]

    def read():
        read_learned_files(str(path), tokens, str(small_sd)).load(str(small_sd), offline=True)

    told = outcome(read)
    assert not told or LORA in told


@pytest.mark.parametrize("change", tensor_changes())
def test_token_files(folder, small_sd, change):
    path = folder / "asset0.safetensors"
    tensor_changes()[change](path)

    def read():
        read_learned_files(None, [str(path)], str(small_sd)).load(str(small_sd), offline=True)

    told = outcome(read)  # the name of the file says which asset it is, whatever the key
    assert path.name in told or change == "one tensor is away"


# ----------------------------------------------------------------------------------------------
# what a run leaves, and what a folder says of itself


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    facts = {"schedule": {}, "scaler": {}, "curves": ["loss"], "settings": {}, "inputs": {}}
    write_checkpoint(path, Checkpoint("stage 1", 3, {"curves.loss": torch.ones(3)}, facts))
    return path


@pytest.mark.parametrize("change", tensor_changes())
def test_checkpoints(checkpoint, change):
    tensor_changes()[change](checkpoint)
    told = outcome(lambda: read_checkpoint(checkpoint))
    assert checkpoint.name in told or change == "not finite"


@pytest.mark.parametrize("change", tensor_changes())
def test_class_images(tmp_path, change):
    path = tmp_path / "cache.safetensors"
    write_tensors(path, {"latents": torch.ones(2, 4, 8, 8)})
    tensor_changes()[change](path)
    told = outcome(lambda: _read_cache(path))
    assert not told or path.name in told


@pytest.mark.parametrize("change", json_changes("class"))
def test_instances_that_say_what_they_are(tmp_path, change):
    path = tmp_path / "instance.json"
    path.write_text('{"class": "car"}')
    json_changes("class")[change](path)
    told = outcome(lambda: read_classes(tmp_path, 2))
    assert "instance.json" in told or change == "one key is text"


def test_a_good_file_of_tensors_survives_the_joining(tmp_path):
    """The attacks change what they mean to change: nothing changed reads as before."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(6.0).view(2, 3)}, {"key": "value"})
    join_header(path, *split_header(path))
    tensors, metadata = read_tensors(path, "")
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and metadata == {"key": "value"}
