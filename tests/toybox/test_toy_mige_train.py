"""The one command that trains toybox's MIGE: its parts, where it goes on, and what it writes."""

import hashlib
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_toy_mige import TINY, the_tokenizer, the_vae, tiny_parts

from imagelab.errors import UserError
from imagelab.training.checkpoint import Checkpoint, write_checkpoint
from mige.folder import find_folder, load_parts, model_digest
from toybox.mige import train
from toybox.mige.architecture import VAE, build_pipeline, save
from toybox.mige.packing import LAST, pack

PARTS = ["toybox.triplets", "toybox.mige.begin", "mige.features", "mige.train"]
#: What a checkpoint says of 600 updates of the recipe.
SETTINGS = {
    "steps": 600, "batch_size": 16, "optimizer": "muon", "warmup_steps": 100,
    "learning_rate": 1e-3, "conditioning_rate": 3e-5, "timestep_shift": 3.0, "cooldown": 0.3,
    "max_grad_norm": 1.0, "weight_decay": 0.01, "ema": 0.999,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A work folder in which all is trained: 600 updates whose losses are their numbers."""
    work = tmp_path_factory.mktemp("work")
    pipeline = build_pipeline(tiny_parts(), the_vae(), the_tokenizer(), TINY.slots)
    save(pipeline, work / "begin", {"begin.json": {"held_out": {"kind": 0.98}}})
    save(pipeline, work / "run" / "model")
    note_training(work, work / "begin")
    return work


def note_training(work: Path, start: Path, **inputs: str) -> None:
    """The checkpoint of a training from a model."""
    losses = torch.arange(600.0).double()
    curves = {"loss": losses, "edit": torch.where(losses % 2 == 0, losses, float("nan"))}
    facts = {
        "settings": SETTINGS,
        "inputs": {"--model": model_digest(start), **inputs},
        "schedule": {},
        "scaler": {},
        "curves": [*curves],
    }
    tensors = {f"curves.{name}": values for name, values in curves.items()}
    write_checkpoint(
        work / "run" / "checkpoint.safetensors", Checkpoint("training", 600, tensors, facts)
    )


def given(work: Path, *more: str):
    return train.parse_args(["--work", str(work), "--output", "M", "--steps", "7", *more])[1]


def refusal(*more) -> str:
    """What is told of options before anything is done."""
    with pytest.raises(UserError) as told:
        train.check(train.parse_args([*map(str, more)])[1])
    return str(told.value)


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
    larger = train.recipe_for(128)
    grown = {"batch_size": 128, "learning_rate": 2e-3, "conditioning_rate": 6e-5}
    assert larger == train.RECIPE | {name: pytest.approx(each) for name, each in grown.items()}


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


def test_a_work_folder_is_the_command_s_own(tmp_path):
    def told(work: Path) -> str:
        return refusal("--work", work, "--output", tmp_path / "M")

    study, samples = tmp_path / "study", tmp_path / "W"
    study.mkdir()
    (study / "settings.json").write_text('{"pictures": 4}')
    assert told(study) == f"{study / 'settings.json'} is not of this command; give another --work"
    (study / "rows.jsonl").touch()
    assert told(study) == f"{study} holds other files (rows.jsonl); give another --work"
    (samples / "run" / "samples").mkdir(parents=True)  # kept of a training that was removed
    assert told(samples) == f"{samples / 'run'} holds other files (samples); give another --work"


def test_the_output_is_apart_from_what_it_is_made_of(run, tmp_path):
    def told(output: Path, *more) -> str:
        options = ["--work", run, "--overwrite", "--steps", "600", *more]
        return refusal("--output", output, *options)

    assert told(run) == f"--output {run} is {run}; give another folder"
    assert told(run / "M") == f"--output {run / 'M'} lies in {run}; give another folder"
    assert told(run / "begin").startswith(f"--output {run / 'begin'} lies in {run}; ")
    assert told(run.parent) == f"--output {run.parent} holds {run}; give another folder"
    new = tmp_path / "new"  # of which nothing is there yet
    for output, work in ((new, new), (new / "M", new), (new, new / "W")):
        assert refusal("--output", output, "--work", work).endswith("; give another folder")
    other = tmp_path / "other"
    shutil.copytree(run / "begin", other)
    assert told(other, "--begin_from", other) == f"--output {other} is {other}; give another folder"
    assert f"M lies in {other}; " in told(other / "M", "--begin_from", other)
    assert f"holds {other}; give" in told(tmp_path, "--begin_from", other)
    (tmp_path / "W").mkdir()
    (tmp_path / "W" / "begin").symlink_to(other)  # on another disk, say
    options = "--output", other, "--work", tmp_path / "W", "--overwrite"
    assert f"other is {tmp_path / 'W' / 'begin'}; give another folder" in refusal(*options)


def test_what_came_to_the_output_while_it_trained_stays(run, tmp_path, monkeypatch, fails):
    output = tmp_path / "M"

    def main(words):
        output.mkdir(exist_ok=True)
        (output / "thesis.txt").touch()

    monkeypatch.setattr(train, "main_of", lambda module: main)
    told = fails(train.main, ["--work", str(run), "--output", str(output), "--steps", "600"]).err
    assert "M is no model folder of MIGE, so it is not replaced; give another --output" in told
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_a_run_is_that_of_another_training(run, tmp_path, monkeypatch):
    """None is written with a record that is not its own, nor gone on with otherwise."""
    options = "--work", run, "--output", tmp_path / "M", "--steps", "600"
    train.check(train.parse_args([*map(str, options)])[1])
    where = f"{run / 'run'} was trained "
    assert refusal(*options, "--batch_size", "8") == (
        f"{where}with --batch_size 16; give that, or another --work"
    )
    pipeline = build_pipeline(tiny_parts(1), the_vae(), the_tokenizer(), TINY.slots)
    save(pipeline, tmp_path / "other", {"begin.json": {}})
    assert refusal(*options, "--begin_from", tmp_path / "other") == (
        f"{where}from another model than {tmp_path / 'other'}; give that one as --begin_from, or "
        "another --work"
    )
    with monkeypatch.context() as patch:
        patch.setitem(train.RECIPE, "ema", 0.99)
        patch.setitem(train.RECIPE, "cooldown", 0)
        told = refusal(*options)
        assert told == (
            f"{where}by an earlier recipe (cooldown 0.3, ema 0.999); go on with `python -m "
            "mige.train --resume` and its numbers, or give another --work"
        )
    work = tmp_path / "work"
    shutil.copytree(run / "run" / "model", work / "run" / "model")
    data = hashlib.sha256(b"[]").hexdigest()
    note_training(work, run / "begin", **{"--data": data})
    options = "--work", work, "--output", tmp_path / "M", "--steps", "600"
    assert f"from another model than {work / 'begin'}; " in refusal(*options)  # it is gone
    shutil.copytree(run / "begin", work / "begin")
    (work / "triplets").mkdir()
    (work / "triplets" / "triplets.json").write_text("[]")
    train.check(train.parse_args([*map(str, options)])[1])
    (work / "triplets" / "triplets.json").write_text("[{}]")
    assert "was trained on other triplets than those of " in refusal(*options)


def test_a_training_goes_on_in_the_precision_that_it_had(run, tmp_path):
    options = ["--work", str(tmp_path / "W"), "--output", str(tmp_path / "M"), "--steps", "600"]
    for precision in ("no", "bf16"):  # the later one counts while nothing is trained
        train.note(train.parse_args([*options, "--mixed_precision", precision])[1])
    shutil.copytree(run / "begin", tmp_path / "W" / "begin")
    (tmp_path / "W" / "run").mkdir()
    note_training(tmp_path / "W", run / "begin")
    told = refusal(*options)
    assert told.endswith("was trained with --mixed_precision bf16; give that, or another --work")
    train.note(train.parse_args(options)[1])
    longer = ["--steps", "700", "--mixed_precision", "bf16"]  # mige.train tells if it may
    train.check(train.parse_args([*options, *longer])[1])


def test_it_goes_on_from_the_one_that_ships(run, tmp_path, monkeypatch):
    """By its name: the commands and the record have its folder."""
    work, told, toybox = tmp_path / "W", [], find_folder("toybox")

    def main_of(module):
        def main(words):
            told.extend(words)
            if module == "mige.train":
                shutil.copytree(run / "run" / "model", work / "run" / "model")
                note_training(work, toybox)

        return main

    monkeypatch.setattr(train, "main_of", main_of)
    options = ["--work", str(work), "--output", str(tmp_path / "M"), "--steps", "600"]
    train.main([*options, "--begin_from", "toybox"])
    assert told.count(str(toybox)) == 2  # for features and training
    found = json.loads((tmp_path / "M" / "training.json").read_text())
    assert found["began_from"] == json.loads((toybox / "training.json").read_text())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--steps", "0"), "--steps is 0; give a whole number from 1 to 100000000"),
        (("--batch_size", "-3"), "--batch_size is -3; give a whole number from 1 to 100000"),
        (("--workers", "-2"), "--workers is -2; give a whole number from 0 to 256"),
        (("--triplets", "-1"), "--triplets is -1; give a whole number from 1 to 10000000"),
        (("--seed", "-1"), "the seed is -1; give a whole number from 0"),
        (("--device", "nonsense"), "--device nonsense is not available here"),
    ],
)
def test_options_that_make_no_sense(tmp_path, monkeypatch, fails, more, told):
    monkeypatch.setattr(train, "main_of", None)
    argv = ["--work", str(tmp_path / "W"), "--output", str(tmp_path / "M"), *more]
    assert told in fails(train.main, argv).err
    assert not any(tmp_path.iterdir())


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
    assert told["settings"] == SETTINGS and told["steps"] == 600
    assert LAST == 500  # from 100 to 599, and of those the even ones
    assert told["last"] == {"loss": 349.5, "edit": 349.0} and told["began_from"] is None
    pack(run / "run", tmp_path / "M", tmp_path / "N")  # which went on from M
    again = json.loads((tmp_path / "N" / "training.json").read_text())
    assert again == told | {"began_from": told}
