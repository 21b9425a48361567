"""Base models: chosen, found, read and checked."""

import errno
import json
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file
from thin import thin_pipeline, thin_scheduler, thin_unet

from imagelab.errors import UserError, sentence
from imagelab.models import stable_diffusion
from imagelab.models.device import choose_device, choose_precision
from imagelab.models.sources import DEFAULT_MODEL, MIRRORS, choose_model, locate_model
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from imagelab.processes import Processes

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def thin(tiny_sd, tmp_path_factory):
    """A whole thin model in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("models") / "thin"
    thin_pipeline(tiny_sd / "tokenizer", thin_unet(), thin_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(thin, tmp_path):
    """A copy of the model, to be damaged."""
    return shutil.copytree(thin, tmp_path / "broken")


# --- which model -----------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_default_folder_is_used_where_it_is(here, caplog):
    (here / DEFAULT_MODEL).mkdir(parents=True)
    for device in ("cpu", "cuda"):
        assert choose_model(DEFAULT_MODEL, device) == DEFAULT_MODEL
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("device", "source", "told"),
    [
        ("cuda", MIRRORS[0], (MIRRORS[0],)),
        ("cuda:1", MIRRORS[0], (MIRRORS[0],)),
        ("cpu", "toybox", ("toybox", "very small", "hf download", DEFAULT_MODEL)),
        ("mps", "toybox", ("no CUDA device",)),
    ],
)
def test_the_untouched_default_becomes_another_model_and_says_so(
    here, caplog, device, source, told
):
    with caplog.at_level(logging.WARNING):
        assert choose_model(DEFAULT_MODEL, device) == source
    (message,) = caplog.messages
    assert all(text in message for text in (DEFAULT_MODEL, *told))


@pytest.mark.parametrize("path", ["./models/mine", "org/model", "toybox"])
def test_a_model_that_was_asked_for_is_never_replaced(here, caplog, path):
    for device in ("cpu", "cuda"):
        assert choose_model(path, device) == path
    assert caplog.messages == []


@pytest.mark.parametrize(
    "source", ["./no/such", "a/b/c", "/gone", "~/gone", "models/sd.safetensors", "models/sd.ckpt"]
)
def test_a_missing_path_names_the_mirrors_and_the_command(here, source):
    with pytest.raises(ValueError, match=f"no model at {source}") as error:
        locate_model(source)
    assert all(mirror in str(error.value) for mirror in MIRRORS)
    assert f"hf download {MIRRORS[0]} --include " in str(error.value)


def test_a_home_of_nobody_holds_no_model():
    with pytest.raises(UserError, match="there can be no model at '~nouser_of_this_name/x'; give"):
        locate_model("~nouser_of_this_name/x")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(here, name):
    (here / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*give a \.safetensors file"):
        locate_model(name)


def test_a_single_safetensors_file_is_found(here):
    (here / "model.safetensors").write_bytes(b"")
    assert locate_model("model.safetensors") == Path("model.safetensors")


def test_a_hub_id_offline_that_was_never_fetched():
    with pytest.raises(ValueError, match="nobody/no-such-model is not in the local cache") as error:
        locate_model("nobody/no-such-model", offline=True)
    assert all(mirror in str(error.value) for mirror in MIRRORS)


CONFIGS = {
    "model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "scheduler/scheduler_config.json",
}  # fmt: skip
HALVES = {file.replace(".safetensors", ".fp16.safetensors") for file in WEIGHTS.values()}


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("weights", [set(WEIGHTS.values()), HALVES], ids=["whole", "fp16"])
def test_a_hub_id_is_fetched_and_nothing_beside_it(monkeypatch, tmp_path, offline, weights):
    others = {"unet/diffusion_pytorch_model.bin", "v2-1_512-ema-pruned.ckpt"}
    others |= {"v2-1_512-ema-pruned.safetensors", "text_encoder/model.non_ema.safetensors"}
    others |= HALVES - weights

    def fetch(hub_id, allow_patterns, local_files_only):
        assert hub_id == "org/model" and local_files_only is offline
        for file in CONFIGS | weights | others:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert locate_model("org/model", offline) == tmp_path
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert found == CONFIGS | weights


def test_a_failing_hub_says_what_to_do(monkeypatch):
    def fetch(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    message = r"org/model could not be fetched from the hub \(OSError\).*--model_path toybox"
    with pytest.raises(ValueError, match=message):
        locate_model("org/model")


def test_a_disk_that_fills_up_during_a_download_is_no_failure_of_the_hub(monkeypatch):
    def fetch(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "weights.safetensors")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(OSError, match="No space left") as found:
        locate_model("org/model")
    assert "the disk is full" in sentence(found.value)


# --- devices ---------------------------------------------------------------------------------


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_devices_in_order(cpu_only, monkeypatch):
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == "cuda:1"
    for name in ("cuda:2", "cuda:x", "cuda:", "cpu:foo"):
        message = rf"--device {name} is not available here; available: cuda \(2 GPUs, .*mps, cpu"
        with pytest.raises(ValueError, match=message):
            choose_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "tpu", "cpu:foo"])
def test_a_device_that_is_not_there(cpu_only, name):
    with pytest.raises(ValueError, match=f"--device {name} is not available here; available: cpu"):
        choose_device(name)


class Started:
    """An accelerate.PartialState of so many processes, this one the last; keeps its options."""

    device = "cuda:0"

    def __init__(self, count):
        self.num_processes, self.process_index = count, count - 1

    def __call__(self, **options):
        self.options = options
        return self


def test_processes_wait_for_each_other_for_days(monkeypatch):
    state = Started(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", state)
    processes = Processes("cpu")
    assert (processes.index, processes.count, processes.device) == (1, 2, "cpu")
    assert state.options["cpu"] and state.options["timeout"].days > 7


def test_processes_want_a_gpu_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:1 is one GPU, and there are 2 processes"):
        Processes("cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="which has GPUs for 1; start 1, or give --device cpu"):
        Processes("cuda")
    monkeypatch.setattr("accelerate.PartialState", Started(2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines, one each
    assert Processes("cuda").count == 2


def test_processes_that_do_not_find_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", Started(1))
    with pytest.raises(ValueError, match="WORLD_SIZE says 2 processes but accelerate started 1"):
        Processes("mps")


def test_precision(monkeypatch):
    assert choose_precision("no", "cuda") == torch.float32
    assert choose_precision("bf16", "cpu") == torch.bfloat16
    assert choose_precision("fp16", "cuda:0") == torch.float16
    assert choose_precision("auto", "mps") == torch.float32
    generations = {"cuda": (9, 0), "cuda:0": (9, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", generations.get)
    assert choose_precision("auto", "cuda") == torch.bfloat16
    assert choose_precision("auto", "cuda:1") == torch.float16
    with pytest.raises(ValueError, match="fp16 needs a GPU; use bf16 or no on the CPU"):
        choose_precision("fp16", "cpu")


# --- reading ---------------------------------------------------------------------------------


def test_a_loaded_model_is_frozen_and_in_float32(thin):
    base = load_base(str(thin))
    assert base.source == str(thin) and len(base.digest) == 64
    assert type(base.scheduler) is DDIMScheduler
    for module in (base.unet, base.vae, base.text_encoder):
        assert not module.training
        for parameter in module.parameters():
            assert parameter.dtype == torch.float32 and not parameter.requires_grad
    states = load_file(thin / WEIGHTS["unet"])
    assert states.keys() == base.unet.state_dict().keys()
    assert all(torch.equal(base.unet.state_dict()[name], state) for name, state in states.items())


def test_the_digest_is_of_the_weights_alone(thin, broken):
    (broken / "README.md").write_text("moved")
    digest = load_base(str(thin)).digest
    assert load_base(str(broken)).digest == digest
    edit(broken, "vae", lambda states: next(iter(states.values())).add_(1))
    assert load_base(str(broken)).digest != digest


def edit(folder, part: str, change) -> None:
    """Rewrite the weights of a part after ``change(states)``."""
    path = folder / WEIGHTS[part]
    states = {name: state.clone() for name, state in load_file(path).items()}
    change(states)
    save_file(states, path, {"format": "pt"})


def test_half_precision_files_are_read_where_there_are_no_others(broken):
    for file in WEIGHTS.values():
        states = {name: state.half() for name, state in load_file(broken / file).items()}
        (broken / file).unlink()
        halved = (broken / file).with_suffix(".fp16.safetensors")
        save_file(states, halved, {"format": "pt"})
    base = load_base(str(broken))
    name, weight = next(iter(base.unet.named_parameters()))
    stored = load_file(broken / "unet/diffusion_pytorch_model.fp16.safetensors")[name]
    assert weight.dtype == torch.float32 and torch.equal(weight, stored.float())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_is_missing(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(ValueError, match=f"has no folder '{part}'; fetch it again: `hf download"):
        load_base(str(broken))


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="is no diffusers model: it has no model_index.json"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("part", WEIGHTS)
def test_pickled_weights_do_not_count(broken, part):
    file = broken / WEIGHTS[part]
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=rf"no {part}/\w+\.safetensors \(pickled .* never read"):
        load_base(str(broken))


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_not_finite(broken, part):
    def spoil(states):
        states[max(states)].view(-1)[0] = torch.nan

    edit(broken, part, spoil)
    with pytest.raises(ValueError, match=rf"not finite \({part}: .*fetch it again"):
        load_base(str(broken))


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_lack_a_tensor(broken, part):
    edit(broken, part, lambda states: states.pop(max(states)))
    with pytest.raises(ValueError, match=rf"{part} could not be loaded \(its weights lack \w+"):
        load_base(str(broken))


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_end_early(broken, part):
    file = broken / WEIGHTS[part]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{part}/.*cannot be read as safet.*fetch the model"):
        load_base(str(broken))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"in_channels": 9}, "its UNet reads 9 channels and its latents have 4"),
        ({"cross_attention_dim": 24}, "of width 24, its text encoder makes 16"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
            },
            "its UNet wants more than a text",
        ),
    ],
    ids=["inpainting", "another width", "SDXL"],
)
def test_models_of_another_kind(broken, settings, why):
    thin_unet(**settings).save_pretrained(broken / "unet")
    with pytest.raises(ValueError, match=rf"another kind \(.*{why}\); give a text-to-image"):
        load_base(str(broken))


def test_out_of_memory_is_not_reported_as_a_broken_file(broken, monkeypatch):
    def load(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", load)
    with pytest.raises(MemoryError):
        load_base(str(broken))


def test_a_single_file_that_is_none(here):
    (here / "model.safetensors").write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        load_base("model.safetensors", offline=True)


def test_a_single_file_of_stable_diffusion_2(thin, here, tiny_sd, monkeypatch, caplog):
    """It is taken for the base model of 512 px, and says so; its noise schedule is DDIM's."""
    save_file({"cond_stage_model.model.x": torch.zeros(1)}, here / "sd2.safetensors")
    scheduler = PNDMScheduler.from_config(thin_scheduler(prediction_type="v_prediction").config)
    pipeline = thin_pipeline(tiny_sd / "tokenizer", thin_unet(), scheduler)
    asked = {}

    def from_single_file(path, **options):
        asked.update(options)
        asked["index"] = json.loads((Path(options["config"]) / "model_index.json").read_text())
        return pipeline

    def fetch_configs(hub_id, offline):
        asked["fetched"] = hub_id, offline
        return thin

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    monkeypatch.setattr(stable_diffusion, "fetch_configs", fetch_configs)
    base = load_base("sd2.safetensors", offline=True)
    assert asked["fetched"] == (MIRRORS[0], True)
    assert asked["local_files_only"]  # diffusers itself never asks the hub
    assert asked["index"]["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert "512 px" in caplog.text and "diffusers folder" in caplog.text
    assert type(base.scheduler) is DDIMScheduler
    assert base.scheduler.config.prediction_type == "v_prediction"
    assert base.scheduler.config.beta_end == 0.012 and not base.scheduler.config.clip_sample


# --- facts from configs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample_size", "levels", "vae_levels", "resolution", "multiple"),
    [(64, 4, 4, 512, 64), (96, 4, 4, 768, 64), ([32, 48], 3, 3, 192, 16)],
)
def test_sizes_come_from_the_configs(sample_size, levels, vae_levels, resolution, multiple):
    def part(count, **facts):
        return SimpleNamespace(config=FrozenDict(block_out_channels=(8,) * count, **facts))

    base = StableDiffusion(
        tokenizer=None, text_encoder=None, vae=part(vae_levels),
        unet=part(levels, sample_size=sample_size), scheduler=None, source="", digest="",
    )  # fmt: skip
    assert base.resolution == resolution
    assert base.multiple == multiple
