"""The one command that trains toybox's MIGE: its parts, where it goes on, and what it writes."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_toy_mige import TINY, the_tokenizer, the_vae, tiny_parts

from imagelab.training.checkpoint import Checkpoint, write_checkpoint
from mige.folder import load_parts
from toybox.mige import train
from toybox.mige.architecture import VAE, build_pipeline, save
from toybox.mige.packing import LAST, pack

PARTS = ["toybox.triplets", "toybox.mige.begin", "mige.features", "mige.train"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A work folder in which all is trained: 600 updates whose losses are their numbers."""
    work = tmp_path_factory.mktemp("work")
    pipeline = build_pipeline(tiny_parts(), the_vae(), the_tokenizer(), TINY.slots)
    save(pipeline, work / "begin", {"begin.json": {"held_out": {"kind": 0.98}}})
    save(pipeline, work / "run" / "model")
    losses = torch.arange(600.0).double()
    curves = {"loss": losses, "edit": torch.where(losses % 2 == 0, losses, float("nan"))}
    facts = {
        "settings": {"steps": 600, "batch_size": 16},
        "schedule": {},
        "scaler": {},
        "curves": [*curves],
    }
    tensors = {f"curves.{name}": values for name, values in curves.items()}
    write_checkpoint(
        work / "run" / "checkpoint.safetensors", Checkpoint("training", 600, tensors, facts)
    )
    return work


def given(work: Path, *more: str):
    return train.parse_args(["--work", str(work), "--output", "M", "--steps", "7", *more])[1]


def test_each_part_is_a_command_of_its_own(tmp_path):
    """All that they are told, they take."""
    more = ("--triplets", "9", "--seed", "4", "--device", "cpu", "--mixed_precision", "bf16")
    found = train.commands(given(tmp_path, *more))
    assert [module for module, _ in found] == PARTS
    read = {m: importlib.import_module(m).parse_args(words)[1] for m, words in found}
    assert (read["toybox.triplets"].count, read["toybox.triplets"].seed) == (9, 4)
    assert read["toybox.mige.begin"].output == tmp_path / "begin"
    learning, features = read["mige.train"], read["mige.features"]
    for one in (learning, features):
        assert Path(one.data) == tmp_path / "triplets/triplets.json"
        assert Path(one.model) == tmp_path / "begin"
    assert Path(learning.features) == features.output == tmp_path / "features"
    assert (learning.steps, learning.resume, learning.device) == (7, False, "cpu")
    assert learning.batch_size == learning.micro_batch_size == 16
    assert (learning.mixed_precision, given(tmp_path).mixed_precision) == ("bf16", "no")
    told = {name: getattr(learning, name) for name in train.RECIPE}
    assert told == train.RECIPE


def test_what_is_done_is_not_done_again(tmp_path, run):
    modules = [module for module, _ in train.commands(given(tmp_path, "--begin_from", "N"))]
    assert modules == [PARTS[0], *PARTS[2:]]
    shutil.copytree(run / "begin", tmp_path / "begin")
    assert [module for module, _ in train.commands(given(tmp_path))] == [PARTS[0], *PARTS[2:]]
    (tmp_path / "run").mkdir()  # of a training that was stopped before its first checkpoint
    assert "--resume" not in train.commands(given(tmp_path))[-1][1]
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    assert train.commands(given(tmp_path))[-1][1][-1] == "--resume"
    learning = train.commands(given(tmp_path, "--begin_from", "N"))[-1][1]
    assert learning[learning.index("--model") + 1] == "N"
    (tmp_path / "run" / "model").mkdir()
    assert [module for module, _ in train.commands(given(tmp_path))] == [PARTS[0], PARTS[2]]


def test_the_parts_run_in_order_and_the_model_is_written(run, tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(train, "main_of", lambda module: lambda words: ran.append(module))
    train.main(["--work", str(run), "--output", str(tmp_path / "M"), "--steps", "600"])
    assert ran == ["toybox.triplets", "mige.features"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python -m toybox.triplets --output ")
    assert lines[-1] == str(tmp_path / "M") and (tmp_path / "M" / "model_index.json").is_file()


def test_nothing_is_replaced_unasked(run, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(train, "main_of", None)
    told = fails(train.main, ["--work", "W", "--output", str(run / "begin")]).err
    assert "begin holds a model; replace it with --overwrite, or give another --output" in told
    (tmp_path / "thesis.txt").touch()
    told = fails(train.main, ["--work", "W", "--output", str(tmp_path), "--overwrite"]).err
    assert "is no model folder of MIGE, so it is not replaced; give another --output" in told
    pack(run / "run", run / "begin", tmp_path / "N")
    again = ["--work", str(run), "--output", str(tmp_path / "N"), "--overwrite", "--steps", "600"]
    (tmp_path / "N" / "notes.txt").touch()
    assert "N holds notes.txt, which would be removed" in fails(train.main, again).err
    (tmp_path / "N" / "notes.txt").unlink()
    monkeypatch.setattr(train, "main_of", lambda module: lambda words: None)
    train.main(again)
    argv = ["--work", "W", "--output", str(tmp_path / "M"), "--begin_from"]
    told = fails(train.main, [*argv, str(run / "run" / "model")]).err
    assert "is no toy MIGE: it has no begin.json; give a folder that toybox.mige.begin or" in told
    assert "there is no model folder nowhere" in fails(train.main, [*argv, "nowhere"]).err
    told = fails(train.main, ["--work", str(run), "--output", "M", "--steps", "700"]).err
    assert "run was trained with --steps 600; give that, or another --work" in told


def test_a_model_ships_in_half_precision(run, tmp_path):
    pack(run / "run", run / "begin", tmp_path / "M")
    name = "transformer/diffusion_pytorch_model.safetensors"
    half, whole = load_file(tmp_path / "M" / name), load_file(run / "run" / "model" / name)
    assert half.keys() == whole.keys()
    for key, value in half.items():
        assert value.dtype == torch.float16 and torch.equal(value, whole[key].half())
    vae = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "M" / "vae" / vae).read_bytes() == (VAE / vae).read_bytes()
    parts = load_parts(tmp_path / "M")
    assert {p.dtype for p in parts["transformer"].parameters()} == {torch.float32}
    assert json.loads((tmp_path / "M" / "begin.json").read_text()) == {"held_out": {"kind": 0.98}}
    told = json.loads((tmp_path / "M" / "training.json").read_text())
    assert told["settings"] == {"steps": 600, "batch_size": 16} and told["steps"] == 600
    assert LAST == 500  # from 100 to 599, and of those the even ones
    assert told["last"] == {"loss": 349.5, "edit": 349.0} and told["began_from"] is None
    pack(run / "run", tmp_path / "M", tmp_path / "N")  # which went on from M
    again = json.loads((tmp_path / "N" / "training.json").read_text())
    assert again == told | {"began_from": told}
