"""Base models from strangers: a folder, a single file, the settings that a model brings.

ATTACKS=all in the environment tries all cases.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hostile import (
    CANARY,
    Bomb,
    join_header,
    json_changes,
    outcome,
    some,
    split_header,
    tensor_changes,
)
from safetensors.torch import save_file
from thin import thin_pipeline, thin_scheduler, thin_unet

from imagelab.models.stable_diffusion import load_base
from mifo.defaults import read_own

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
#: Config files, a key of each that is read, and one that is a number.
CONFIGS = {
    "unet/config.json": ("block_out_channels", "layers_per_block"),
    "vae/config.json": ("block_out_channels", "latent_channels"),
    "text_encoder/config.json": ("hidden_size", "num_hidden_layers"),
    "scheduler/scheduler_config.json": ("beta_schedule", "num_train_timesteps"),
    "tokenizer/tokenizer_config.json": ("unk_token", "model_max_length"),
    "model_index.json": ("unet", None),
}


@pytest.fixture(scope="module")
def good(tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    thin_pipeline(tiny_sd / "tokenizer", thin_unet(2), thin_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy to make hostile; the canary module can be imported by whoever tries to."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{CANARY}.py").write_text("class X: pass\nXPipeline = X\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return shutil.copytree(good, tmp_path / "model")


def use(folder: Path) -> None:
    """Load a model and ask each of its parts for something small."""
    model = load_base(str(folder), offline=True)
    text = model.encode_text(["a photo of an unheard-of thing, zzq"])
    latents = torch.zeros(1, model.latent_channels, 8, 8)
    model.predict(latents, torch.tensor(10), text)
    model.scheduler.set_timesteps(2)
    model.decode(latents)


def test_a_good_folder_is_read(folder):
    assert outcome(lambda: use(folder)) == ""


@pytest.mark.parametrize(
    ("file", "change"),
    some([(file, change) for file, keys in CONFIGS.items() for change in json_changes(*keys)]),
)
def test_configs(folder, file, change):
    json_changes(*CONFIGS[file])[change](folder / file)
    told = outcome(lambda: use(folder))
    assert not told or folder.name in told


@pytest.mark.parametrize(
    ("part", "change"), some([(part, change) for part in WEIGHTS for change in tensor_changes()])
)
def test_weights(folder, part, change):
    tensor_changes()[change](folder / WEIGHTS[part])
    told = outcome(lambda: use(folder))
    assert folder.name in told


# ----------------------------------------------------------------------------------------------
# code


def put_json(path: Path, **facts) -> None:
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | facts))


def put_code(folder: Path, name: str) -> None:
    (folder / name).write_text(f"import {CANARY}\nclass X: pass\n")


def put_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def code_attacks() -> dict:
    """What makes a careless loader run code, or take other weights, by name."""

    def index(**facts):
        return lambda f: put_json(f / "model_index.json", **facts)

    def config(part, **facts):
        name = {"scheduler": "scheduler_config", "tokenizer": "tokenizer_config"}.get(
            part, "config"
        )
        return lambda f: put_json(f / part / f"{name}.json", **facts)

    def both(*changes):
        return lambda f: [change(f) for change in changes]

    remote = {"AutoModel": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"]}
    return {
        "a class of a strange module": index(unet=[CANARY, "X"]),
        "a dotted path": index(text_encoder=[f"os.path.{CANARY}", "X"]),
        "a class of diffusers that is another": index(vae=["diffusers", "AutoencoderTiny"]),
        "a scheduler of one's own": index(scheduler=[CANARY, "X"]),
        "a further part": index(safety_checker=[CANARY, "X"], extra=[CANARY, "X"]),
        "a pipeline of one's own": both(
            index(_class_name=["pipeline", "X"]), lambda f: put_code(f, "pipeline.py")
        ),
        "a pipeline by a path": index(_class_name=f"../modules/{CANARY}"),
        "a part with a file": both(
            index(unet=["evil", "X"]), lambda f: put_code(f / "unet", "evil.py")
        ),
        "the class of a config": config("unet", _class_name=f"{CANARY}.X"),
        "the class of a scheduler": config("scheduler", _class_name=f"{CANARY}.X"),
        "auto_map of the text encoder": both(
            config("text_encoder", auto_map=remote),
            lambda f: put_code(f / "text_encoder", "evil.py"),
        ),
        "auto_map of the tokenizer": both(
            config("tokenizer", auto_map=remote, tokenizer_class="X"),
            lambda f: put_code(f / "tokenizer", "evil.py"),
        ),
        "a kernel of the hub": config(
            "text_encoder", _attn_implementation="kernels-community/flash-attn",
            attn_implementation="kernels-community/flash-attn",
        ),
        "quantized by a strange library": config(
            "text_encoder", quantization_config={"quant_method": "aqlm", "modules": [CANARY]}
        ),
        "quantized, in diffusers": config(
            "unet", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "a name of another model": config("text_encoder", _name_or_path="nobody/else"),
        "another model type": config("text_encoder", model_type=CANARY),
        "an activation of one's own": config("text_encoder", hidden_act=f"{CANARY}.X"),
        "a block of one's own": config("unet", down_block_types=[f"{CANARY}.X", "DownBlock2D"]),
        "an adapter beside the text encoder": both(
            lambda f: put_json(
                f / "text_encoder" / "adapter_config.json",
                peft_type="LORA", base_model_name_or_path="nobody/else", task_type=CANARY,
            ),
            lambda f: put_pickle(f / "text_encoder" / "adapter_model.bin"),
        ),
        "a template of the tokenizer": config(
            "tokenizer", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
        ),
        "a generation config": lambda f: put_json(
            f / "text_encoder" / "generation_config.json", custom_generate=CANARY
        ),
    }  # fmt: skip


@pytest.mark.parametrize("attack", code_attacks())
def test_code_never_runs(folder, attack):
    code_attacks()[attack](folder)
    outcome(lambda: use(folder))


def test_a_strange_class_is_named(folder):
    put_json(folder / "model_index.json", unet=[CANARY, "X"])
    told = outcome(lambda: use(folder))
    assert f"unet is {CANARY}.X" in told and "diffusers.UNet2DConditionModel alone" in told


def shards(kind: str, part: str):
    """An index that leads a careless loader to a pickle, or to weights that nobody hashed."""
    stem = {"text_encoder": "model"}.get(part, "diffusion_pytorch_model")

    def apply(folder: Path) -> None:
        if kind == "pickle":
            put_pickle(folder / part / "other.bin")
            target = "other.bin"
        else:
            header, data = split_header(folder / WEIGHTS[part])
            path = folder / part / "other.safetensors"
            path.touch()
            join_header(path, header, bytes(len(data)))
            target = "other.safetensors"
        header, _ = split_header(folder / WEIGHTS[part])
        names = {name: target for name in header if name != "__metadata__"}
        put_json(folder / part / f"{stem}.safetensors.index.json", metadata={}, weight_map=names)

    return apply


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("kind", ["pickle", "other"])
def test_only_the_hashed_weights_are_loaded(folder, good, part, kind):
    shards(kind, part)(folder)
    (folder / part / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert outcome(lambda: use(folder)) == ""
    ours, theirs = load_base(str(folder)), load_base(str(good))
    assert ours.digest == theirs.digest
    state, known = (getattr(model, part).state_dict() for model in (ours, theirs))
    assert all(state[name].equal(known[name]) for name in known)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("scheduler", "prediction_type", "v_prediction"),
        ("scheduler", "beta_end", 0.02),
        ("vae", "scaling_factor", 0.5),
        ("unet", "norm_eps", 1e-3),
        ("text_encoder", "hidden_act", "relu"),
    ],
)
def test_configs_that_change_a_model_change_what_it_is_known_by(folder, good, part, key, value):
    name = "scheduler_config" if part == "scheduler" else "config"
    put_json(folder / part / f"{name}.json", **{key: value})
    ours, theirs = load_base(str(folder)), load_base(str(good))
    assert ours.digest == theirs.digest and ours.configs != theirs.configs


# ----------------------------------------------------------------------------------------------
# the tokenizer, single files, the settings of a model


def tokenizer_attacks() -> dict:
    def vocabulary(change):
        def apply(folder: Path) -> None:
            for name in ("tokenizer.json", "vocab.json"):
                path = folder / "tokenizer" / name
                if path.is_file():
                    facts = json.loads(path.read_text())
                    change(facts["model"]["vocab"] if name == "tokenizer.json" else facts)
                    path.write_text(json.dumps(facts))

        return apply

    return {
        "ids beyond the table": vocabulary(lambda v: v.update({k: 10**6 for k in list(v)[:300]})),
        "negative ids": vocabulary(lambda v: v.update({k: -1 for k in list(v)[:3]})),
        "no end token": vocabulary(lambda v: v.pop("<|endoftext|>", None)),
        "ids that are text": vocabulary(lambda v: v.update({k: "x" for k in list(v)[:3]})),
        "an expression that never ends": lambda f: put_json(
            f / "tokenizer/tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                           "invert": False},
        ),
        "merges that are noise": lambda f: (f / "tokenizer/merges.txt").write_bytes(b"\xff" * 99),
        "texts longer than the positions": lambda f: put_json(
            f / "tokenizer/tokenizer_config.json", model_max_length=500
        ),
        "added tokens beyond the table": lambda f: put_json(
            f / "tokenizer/tokenizer_config.json",
            added_tokens_decoder={"999999": {"content": "thing", "special": True}},
        ),
        "no padding": lambda f: put_json(f / "tokenizer/tokenizer_config.json", pad_token=None),
    }  # fmt: skip


@pytest.mark.parametrize("attack", tokenizer_attacks())
def test_tokenizers(folder, attack):
    tokenizer_attacks()[attack](folder)
    told = outcome(lambda: use(folder))
    assert not told or folder.name in told


def test_a_lora_is_no_base_model(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, path)
    told = outcome(lambda: use(path))
    assert "is a LoRA" in told and "--lora" in told


@pytest.mark.parametrize("change", tensor_changes())
def test_single_files(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3)}, path)
    tensor_changes()[change](path)
    told = outcome(lambda: use(path))
    assert "model" in told


@pytest.mark.parametrize("change", json_changes("guidance_scale", "num_class_images"))
def test_settings_that_a_model_brings(folder, change):
    path = folder / "mifo_config.json"
    put_json(path, guidance_scale=3.0, num_class_images=16)
    json_changes("guidance_scale", "num_class_images")[change](path)
    told = outcome(lambda: read_own(str(folder)))
    assert not told or "mifo_config.json" in told
