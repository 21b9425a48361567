"""Exports: diffusers reads each of them back as the learned model; a wrong one never stays."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from thin import contents

import semantic_export
from benchmarks.cases import full_size_model
from imagelab.io.atomic import folder_lock
from imagelab.models.stable_diffusion import load_base
from mifo import export
from mifo.cli.export import FORMATS
from mifo.learned import (
    FORMAT,
    Learned,
    portable,
    read_learned_folder,
    write_learned,
    write_pipeline,
)
from mifo.learning.config import LearningConfig
from mifo.learning.stages import TEXT_TARGETS, UNET_TARGETS
from mifo.tokens import add_asset_tokens, write_rows
from mifo_lora import from_kohya, inject, lora_parameters, lora_state_dict, read_lora, save_lora

PROMPT = "a photo of <asset0> and <asset1>"
FILES = {
    "kohya": "toys.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "embeddings": "embeddings",
    "pipeline": "pipeline",
}
LORA_RANK = 2


def make_learned(folder: Path, model: Path, finetune: str, seed: int = 0) -> Path:
    """A learned folder of two tokens, as if trained: no factor of its LoRA is zero."""
    draw = torch.Generator().manual_seed(seed)
    base = load_base(str(model))
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, 2)
    rows = torch.randn(2, base.text_encoder.config.hidden_size, generator=draw) * 0.5
    if finetune == "lora":
        inject(base.unet, UNET_TARGETS, LORA_RANK, alpha=1.0, generator=draw)
        inject(base.text_encoder, TEXT_TARGETS, LORA_RANK, alpha=1.0, generator=draw)
        for parameter in lora_parameters(base.unet) + lora_parameters(base.text_encoder):
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    manifest = {
        "format": FORMAT,
        "base_model": {"source": str(model), "sha256": base.digest},
        "tokens": ["<asset0>", "<asset1>"],
        "image_sha256": "",
        "mask_sha256": ["", ""],
        "settings": {
            "instance": "toys",
            "folder_path": "example",
            "finetune": finetune,
            "finetune_steps": 1,
        },
        "separation": [1.0, 1.0],
    }
    folder.mkdir(parents=True)
    write_learned(folder, base, rows, finetune == "lora", manifest)
    if finetune == "full":
        write_rows(base.text_encoder, ids, rows)
        with torch.no_grad():
            base.unet.conv_out.weight.mul_(1.5)
        write_pipeline(folder / "pipeline", base)
    return folder


@pytest.fixture(scope="module")
def models_dir(small_sd, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("Model_ours")
    make_learned(folder / "toys", small_sd, "lora")
    make_learned(folder / "tokens", small_sd, "none")
    make_learned(folder / "whole", small_sd, "full")
    return folder


def run(models_dir: Path, output: Path, *options: str, model_id: str = "toys") -> Path:
    """The command; returns the folder of exports."""
    where = ["--models_dir", str(models_dir), "--output_path", str(output)]
    semantic_export.main(["--model_id", model_id, *where, *options])
    return output / model_id


def plain_pipeline(small_sd: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        small_sd, safety_checker=None, local_files_only=True
    )


def learned_prediction(models_dir: Path, model_id: str = "toys") -> torch.Tensor:
    base, _ = read_learned_folder(models_dir / model_id).load()
    return export.predict_noise(base, PROMPT)


# ----------------------------------------------------------------------------------------------
# what is written


@pytest.fixture(scope="module")
def exported(models_dir, tmp_path_factory) -> Path:
    return run(models_dir, tmp_path_factory.mktemp("exports"), "--format", *FORMATS)


def test_every_format_has_its_name(exported):
    assert {path.name for path in exported.iterdir()} == set(FILES.values())
    tokens = {path.name for path in (exported / "embeddings").iterdir()}
    assert tokens == {"asset0.safetensors", "asset1.safetensors"}


@pytest.mark.parametrize("lora", ["kohya", "diffusers"])
def test_lora_and_embeddings_in_plain_diffusers(lora, exported, models_dir, small_sd):
    pipeline = plain_pipeline(small_sd)
    for name in ("asset0", "asset1"):
        pipeline.load_textual_inversion(str(exported / "embeddings" / f"{name}.safetensors"))
    wanted = learned_prediction(models_dir)
    without = export.predict_noise(pipeline, PROMPT)
    assert export.relative_difference(without, wanted) > 1e-2
    pipeline.load_lora_weights(exported, weight_name=FILES[lora])
    found = export.predict_noise(pipeline, PROMPT)
    assert export.relative_difference(found, wanted) <= 1e-4


@pytest.mark.parametrize("model_id", ["toys", "tokens", "whole"])
def test_pipeline_in_plain_diffusers(model_id, models_dir, tmp_path):
    folder = run(models_dir, tmp_path, "--format", "pipeline", model_id=model_id) / "pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    found = export.predict_noise(pipeline, PROMPT)
    wanted = learned_prediction(models_dir, model_id)
    assert export.relative_difference(found, wanted) <= 1e-4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == read_learned_folder(models_dir / model_id).manifest


def test_kohya_holds_the_learned_factors(exported, models_dir):
    learned = read_learned_folder(models_dir / "toys")
    base, _ = learned.load()
    file, metadata = read_lora(exported / FILES["kohya"])
    for part in ("unet", "text_encoder"):
        module = getattr(base, part)
        found, wanted = from_kohya(file, module, part), lora_state_dict(module)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == str(LORA_RANK)
    assert metadata["ss_v2"] == "True"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert metadata["modelspec.title"] == "toys"


@pytest.mark.parametrize(
    "channels, linear, predicts, architecture",
    [
        (4, False, "epsilon", "stable-diffusion-v1"),
        (4, True, "epsilon", "stable-diffusion-v2-512"),
        (4, True, "v_prediction", "stable-diffusion-v2-768-v"),
        (12, True, "epsilon", "latent-diffusion-of-12-channels"),
    ],
)
def test_architectures(channels, linear, predicts, architecture):
    parts = {
        "latent_channels": channels,
        "unet": SimpleNamespace(config=SimpleNamespace(use_linear_projection=linear)),
        "scheduler": SimpleNamespace(config=SimpleNamespace(prediction_type=predicts)),
    }
    assert export.architecture(SimpleNamespace(**parts)) == architecture


def test_manifest_travels_in_every_file(exported, models_dir):
    manifest = portable(read_learned_folder(models_dir / "toys").manifest)
    tokens = [f"embeddings/asset{i}.safetensors" for i in range(2)]
    for name in (FILES["kohya"], FILES["diffusers"], *tokens):
        with safe_open(exported / name, framework="pt") as file:
            assert json.loads(file.metadata()["mifo"]) == manifest


@pytest.mark.parametrize("form", ["kohya", "pipeline"])
def test_no_export_tells_the_users_folders(form, small_sd, tmp_path):
    folder = make_learned(tmp_path / "learned" / "toys", small_sd, "lora")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["folder_path"] = str(tmp_path / "photos")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = run(folder.parent, tmp_path / "exports", "--format", form) / FILES[form]
    if form == "kohya":
        found = json.loads(read_lora(path)[1]["mifo"])
    else:
        found = json.loads((path / "manifest.json").read_text())
    assert found["settings"]["folder_path"] == "photos"


def test_default_formats_and_printed_differences(models_dir, tmp_path, capsys):
    folder = run(models_dir, tmp_path)
    assert {path.name for path in folder.iterdir()} == {FILES["kohya"], FILES["embeddings"]}
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.partition(": ")[0]).name for line in lines] == [
        "toys.safetensors",
        "embeddings",
    ]
    for line in lines:
        assert 0 <= float(line.split()[3]) <= 1e-4


def test_script_offers_every_format():
    assert tuple(export.WRITERS) == tuple(export.LEARNED_AS) == FORMATS


# ----------------------------------------------------------------------------------------------
# the comparison


CORRUPTED = {
    "embeddings": "asset1.safetensors",
    "pipeline": "unet/diffusion_pytorch_model.safetensors",
}


def corrupt(path: Path) -> None:
    """Change one factor of a LoRA, one weight of a pipeline or the row of one token."""
    tensors, metadata = read_lora(path)
    key = next(key for key in tensors if tensors[key].ndim == 2 and ("attn2" in key or "<" in key))
    save_lora(path, {**tensors, key: 1.5 * tensors[key]}, metadata)


@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_export_is_refused(form, models_dir, tmp_path, monkeypatch, fails):
    write = export.WRITERS[form]

    def write_wrongly(path, learned, base):
        write(path, learned, base)
        corrupt(path / CORRUPTED.get(form, ""))

    monkeypatch.setitem(export.WRITERS, form, write_wrongly)
    message = fails(run, models_dir, tmp_path, "--format", form, code=1).err
    assert f"the {form} export, read back by diffusers, differs from the learned model" in message
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_leaves_the_former_ones(models_dir, exported, tmp_path, monkeypatch, fails):
    shutil.copytree(exported, tmp_path / "toys")
    before = contents(tmp_path / "toys")
    found = iter((0.0, 0.0, 0.0, 1.0))  # the last one is wrong
    monkeypatch.setattr(export, "relative_difference", lambda *_: next(found))
    options = ("--overwrite", "--format", *FORMATS)
    fails(run, models_dir, tmp_path, *options, code=1)
    assert contents(tmp_path / "toys") == before
    assert [path.name for path in tmp_path.iterdir()] == ["toys"]


def test_a_prediction_that_is_no_number_is_refused(models_dir, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(export, "relative_difference", lambda found, wanted: float("nan"))
    fails(run, models_dir, tmp_path, code=1)
    assert list(tmp_path.iterdir()) == []


def test_relative_difference():
    wanted = torch.tensor([[1.0, -4.0]])
    assert export.relative_difference(torch.tensor([[1.5, -4.2]]), wanted) == 0.125


# ----------------------------------------------------------------------------------------------
# exporting again, and bad input


def test_existing_exports_are_kept_without_overwrite(models_dir, tmp_path, fails):
    (tmp_path / "toys" / "embeddings").mkdir(parents=True)
    (tmp_path / "toys" / "embeddings" / "mine.txt").write_text("mine")
    message = fails(run, models_dir, tmp_path).err
    assert "embeddings is there already; give --overwrite" in message
    assert contents(tmp_path) == {"toys/embeddings/mine.txt": b"mine"}


def test_only_one_at_a_time_exports_to_a_folder(models_dir, tmp_path, fails):
    with folder_lock(tmp_path / "toys"):
        message = fails(run, models_dir, tmp_path).err
    assert "toys is being written by another process; wait for it or give another --o" in message
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_its_formats_alone(small_sd, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "toys")
    first = contents(tmp_path / "toys")
    other = make_learned(tmp_path / "other" / "toys", small_sd, "lora", seed=1)
    (tmp_path / "toys" / "embeddings" / "asset2.safetensors").write_bytes(b"of a third instance")
    options = ("--overwrite", "--format", "embeddings", "kohya")
    second = contents(run(other.parent, tmp_path, *options))
    assert second.keys() == first.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {FILES["kohya"], *(name for name in first if name.startswith("embeddings"))}


@pytest.mark.parametrize("form", ["embeddings", "pipeline"])
def test_overwrite_replaces_no_files_of_the_users(
    form, models_dir, exported, tmp_path, monkeypatch, fails
):
    shutil.copytree(exported, tmp_path / "toys")
    mine = tmp_path / "toys" / form / "asset0 best of March.safetensors"
    mine.write_bytes(b"years")
    before = contents(tmp_path)
    monkeypatch.delattr(Learned, "load")  # it is told before the work
    message = fails(run, models_dir, tmp_path, "--overwrite", "--format", *FORMATS).err
    assert f"{form} holds {mine.name}, which would be removed with the folder; move it" in message
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["toys"]


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_overwrite_replaces_no_folder_by_a_file(
    form, models_dir, exported, tmp_path, monkeypatch, fails
):
    shutil.copytree(exported, tmp_path / "toys")
    target = tmp_path / "toys" / FILES[form]
    target.unlink()
    target.mkdir()
    monkeypatch.delattr(Learned, "load")
    message = fails(run, models_dir, tmp_path, "--overwrite", "--format", *FORMATS).err
    assert f"{target} is a folder, where a file is to be; move it elsewhere" in message
    assert target.is_dir()


@pytest.mark.parametrize("form", ["embeddings", "pipeline"])
def test_overwrite_replaces_no_file_that_was_put_there_meanwhile(
    form, models_dir, exported, tmp_path, monkeypatch, fails
):
    shutil.copytree(exported, tmp_path / "toys")
    before = contents(tmp_path)

    def write(learned, paths, *_):
        for path in paths.values():
            path.write_bytes(b"new") if path.suffix else path.mkdir()
        (tmp_path / "toys" / form / "notes.txt").write_bytes(b"years")
        return dict.fromkeys(paths, 0.0)

    monkeypatch.setattr(export, "_write_and_compare", write)
    message = fails(run, models_dir, tmp_path, "--overwrite", "--format", *FORMATS).err
    assert f"{form} holds notes.txt, which would be removed with the folder" in message
    assert contents(tmp_path) == before | {f"toys/{form}/notes.txt": b"years"}
    assert [path.name for path in tmp_path.iterdir()] == ["toys"]


@pytest.mark.parametrize(
    ("model_id", "form", "words"),
    [
        ("tokens", "kohya", "has no LoRA"),
        ("tokens", "diffusers", "give --format embeddings pipeline"),
        ("whole", "kohya", "is a whole fine-tuned model"),
        ("whole", "embeddings", "give --format pipeline"),
        ("missing", "kohya", "there is no learned folder"),
        ("../toys", "kohya", "is not the plain name of a folder"),
    ],
)
def test_formats_that_do_not_fit(model_id, form, words, models_dir, tmp_path, fails):
    options = ("--format", "pipeline", form)
    message = fails(run, models_dir, tmp_path, *options, model_id=model_id).err
    assert words in message
    assert list(tmp_path.iterdir()) == []


def test_tokens_without_lora(models_dir, tmp_path):
    folder = run(models_dir, tmp_path, "--format", "embeddings", model_id="tokens")
    assert contents(folder).keys() == {f"embeddings/asset{i}.safetensors" for i in range(2)}


def test_another_base_model_is_refused(models_dir, small_sd, tmp_path, fails):
    shutil.copytree(small_sd, tmp_path / "other")
    path = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, metadata = read_lora(path)
    save_lora(path, {**tensors, "conv_out.bias": tensors["conv_out.bias"] + 1}, metadata)
    options = ("--model_path", str(tmp_path / "other"))
    message = fails(run, models_dir, tmp_path / "exports", *options).err
    assert "is another model" in message


def test_peft_is_asked_for_before_anything_is_loaded(models_dir, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    monkeypatch.delattr(Learned, "load")
    message = fails(run, models_dir, tmp_path).err
    assert "pip install peft" in message


def test_output_path_that_is_no_folder(models_dir, tmp_path, fails):
    (tmp_path / "file").write_text("mine")
    message = fails(run, models_dir, tmp_path / "file").err
    assert "is a file, not a folder; give another --output_path" in message
    assert contents(tmp_path) == {"file": b"mine"}


# ----------------------------------------------------------------------------------------------
# size


def test_lora_of_stable_diffusion_2_is_below_20_megabytes():
    base = full_size_model("meta")
    rank = LearningConfig().recipe.lora_rank
    inject(base.unet, UNET_TARGETS, rank)
    inject(base.text_encoder, TEXT_TARGETS, rank)
    # A layer from i to o features has r·(i + o) numbers. attn2 of the UNet: 5, 5 and 6 blocks of
    # 320, 640 and 1280 channels c, with q and out from c to c, k and v from 1024 to c; the text
    # encoder: 23 layers of four projections from 1024 to 1024.
    channels = [320] * 5 + [640] * 5 + [1280] * 6
    numbers = sum(rank * (6 * c + 2 * 1024) for c in channels) + rank * 23 * 4 * 2 * 1024
    parameters = lora_parameters(base.unet) + lora_parameters(base.text_encoder)
    assert sum(p.numel() for p in parameters) == numbers
    assert all(p.dtype == torch.float32 for p in parameters)
    assert 4 * numbers < 19e6
