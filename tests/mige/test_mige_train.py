"""Training by numbers: what a step reads, how weights are changed, what learns, what comes out."""

import hashlib
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from thin import contents
from training_data import PLAIN, RECORDS, SHAPE, posterior, save_data, usual

from imagelab.errors import UserError
from imagelab.processes import Processes
from mige import train as command
from mige.data.features import Kind, open_features
from mige.data.records import RecordList, parse_record
from mige.folder import load_parts
from mige.method.loss import Diffusion, Terms
from mige.pipeline import MigePipeline
from mige.sizes import build
from mige.train import parse_args
from mige.training import run
from mige.training import samples as reading
from mige.training.config import Recipe, TrainingConfig
from mige.training.memory import batch_bytes, blank_batch, empty_model, estimate
from mige.training.model import TrainedModel, choose_trained, learned_whole, trained_parameters
from mige.training.plan import CHECKPOINT, make_plan
from mige.training.result import _take_over
from mige.training.run import Tally, make_model, make_samples, make_stage
from mige.training.samples import Facts, Reader, Samples, shifted

SEED = 5
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
#: What the tokenizer gets of each record, divided at its marks.
TEXTS = [
    ["paint: \na", "on the beach"],
    ["edit: \nmake the cup in", "red"],
    ["put: \nreplace the cup in", "with", ""],
    ["put: \nput", "in", ""],
    ["paint: \na", "beside a", ""],
    ["edit: \nmake it snow in", ""],
]
PARTS_OF_WEIGHTS = ("transformer", "vae", "text_encoder", "vision_encoder", "qformer", "fusion")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """They take longer than the updates here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "plot_losses", lambda path, _: path.write_bytes(b"curves"))
        yield


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> Path:
    """A folder with a list of six records; tests only read it."""
    return save_data(tmp_path_factory.mktemp("data") / "data", model)


@pytest.fixture
def work(data, monkeypatch) -> Path:
    monkeypatch.chdir(data)
    return data


def options_of(model: Path, *options: str) -> TrainingConfig:
    """The config of a command."""
    _, given = parse_args(usual(model, "unused", *options))
    names = TrainingConfig().settings()
    found = {name: getattr(given, name) for name in names}
    return TrainingConfig.from_settings(**found | {"root": found["root"] or "."})


class Begun:
    """A training that has been made ready."""

    def __init__(self, model: Path, *options: str):
        self.plan = make_plan(options_of(model, *options), Processes("cpu"))
        self.model = make_model(self.plan, load_parts(self.plan.folder))
        self.stage = make_stage(self.plan, self.model)

    def gradients(self, step: int = 0) -> dict[str, torch.Tensor]:
        """By name, those that a step makes; ``losses`` has its losses then."""
        with self.stage.losses(step) as self.losses:
            pass
        return {k: p.grad.clone() for k, p in trained_parameters(self.model).items()}


# ----------------------------------------------------------------------------------------------
# what a step reads


def generator(*labels: str | int) -> torch.Generator:
    """By the formula of labelled seeds: 63 bits of a sha256 over seed and labels."""
    text = "\x1f".join(["5", *(f"{type(each).__name__}:{each}" for each in labels)])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") // 2
    return torch.Generator().manual_seed(number)


def order(epoch: int) -> list[int]:
    seed = generator("order", epoch).initial_seed()
    return np.random.default_rng(seed).permutation(6).tolist()


def drawn(path: str, *labels: str | int) -> torch.Tensor:
    """Latents out of a picture's posterior, unscaled."""
    mean, deviation = posterior(path)
    return mean + deviation * torch.randn(SHAPE, generator=generator(*labels))


def make(data: Path, model: Path, total=4, share=None, first=0, micro=8) -> Samples:
    return Samples(
        RecordList(data / "d.json"), np.arange(6), open_features(data / "F", model), data,
        Facts.of(model), SEED, total, share or total, first, micro,
    )  # fmt: skip


def test_what_a_step_reads(data, model):
    """Step 1 of four samples is of the places 4 to 7, and goes over from one epoch to the next."""
    batches = make(data, model, micro=3)[1]
    assert [len(batch) for batch in batches] == [3, 1]
    numbers = [*order(0), *order(1)][4:8]
    tokenizer = load_parts(model, left_out=list(PARTS_OF_WEIGHTS))["tokenizer"]
    seen = 0
    for at, place in enumerate(range(4, 8)):
        batch, index = batches[at // 3], at % 3
        if not index:
            seen = 0
        record = RECORDS[numbers[at]]
        count = len(record["entity_path"])
        assert batch.tasks[index] == parse_record(record).task
        assert batch.segments[index] == [
            tokenizer(text, add_special_tokens=False).input_ids if text else []
            for text in TEXTS[numbers[at]]
        ]
        assert batch.counts[index] == count
        assert torch.equal(batch.clean[index], drawn(record["image"], "target", place, 0) * 0.18215)
        assert torch.equal(
            batch.noise[index], torch.randn(SHAPE, generator=generator("noise", place))
        )
        source = torch.zeros(SHAPE)
        if record["source_path"]:
            source = drawn(record["source_path"][0], "source", place, 0) * 0.18215
        assert torch.equal(batch.source[index], source)
        time_of = torch.randint(1000, (), generator=generator("timestep", place))
        assert batch.timesteps[index] == time_of
        assert batch.draws[index] == torch.rand((), generator=generator("dropout", place))
        for number, path in enumerate(record["entity_path"]):
            assert torch.equal(batch.latents[seen], drawn(path, "entity", place, number))
            with Image.open(data / path) as image:
                small = image.convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)
            pixels = np.array(small, dtype=np.float64) / 255
            wanted = (pixels - MEAN) / DEVIATION  # squeezed, not cropped
            found = batch.vision[seen].permute(1, 2, 0).numpy()
            assert np.allclose(found, wanted, atol=1e-6)
            seen += 1
    assert sum(len(batch.vision) for batch in batches) == sum(
        len(RECORDS[number]["entity_path"]) for number in numbers
    )


def test_a_shift_draws_noisier_timesteps(model, work):
    """By a shift of 3 u = ½ becomes 3/4; a shift of 1 changes nothing."""
    drawn = torch.tensor([0, 499, 500, 999])
    assert shifted(drawn, 1000, 3.0).tolist() == [1, 749, 750, 999]
    assert shifted(drawn, 1000, 1.0).tolist() == drawn.tolist()
    plan = make_plan(options_of(model, "--timestep_shift", "3"), Processes("cpu"))
    (batch,) = make_samples(plan)[0]
    wanted = [torch.randint(1000, (), generator=generator("timestep", p)) for p in range(4)]
    assert batch.timesteps.tolist() == [
        int(3000 * (t + 0.5) / (1000 + 2 * (t + 0.5))) for t in map(int, wanted)
    ]


def test_all_records_are_seen_once_an_epoch(data, model):
    samples = make(data, model)
    for epoch in range(3):
        found = [samples.record(6 * epoch + at).target for at in range(6)]
        assert found == [RECORDS[number]["image"] for number in order(epoch)]
        assert sorted(found) == sorted(each["image"] for each in RECORDS)
    assert order(0) != order(1) != order(2)


def test_records_that_are_too_wide_are_never_read(model, tmp_path, monkeypatch):
    """More than 4 : 1, as in the release."""
    wide = [RECORDS[0] | {"width": 401, "height": 100}, RECORDS[1] | {"width": 400, "height": 100}]
    monkeypatch.chdir(save_data(tmp_path, model, [*wide, *RECORDS[2:]]))
    samples = make_samples(make_plan(options_of(model), Processes("cpu")))
    found = {samples.record(place).target for place in range(12)}
    assert found == {each["image"] for each in RECORDS[1:]}


def rows(batches) -> list[tuple]:
    """What each sample of some batches is, one after the other."""
    found = []
    for batch in batches:
        vision, latents = batch.vision.split(batch.counts), batch.latents.split(batch.counts)
        for index in range(len(batch)):
            drawn_of = (batch.clean, batch.noise, batch.source, batch.timesteps, batch.draws)
            tensors = (each[index].tolist() for each in (*drawn_of, vision, latents))
            found.append((batch.segments[index], *tensors))
    return found


def test_neither_batches_nor_processes_change_samples(data, model):
    """Twelve samples: in steps of four and of six, in micro batches, and over two processes."""
    wanted = rows(batch for step in range(3) for batch in make(data, model)[step])
    assert len(wanted) == 12
    ours = make(data, model, total=6, micro=2)
    assert rows(batch for step in range(2) for batch in ours[step]) == wanted
    two = [make(data, model, total=6, share=3, first=first, micro=2) for first in (0, 3)]
    assert rows(b for step in range(2) for each in two for b in each[step]) == wanted


def test_workers_and_resuming_change_nothing(data, model):
    samples = make(data, model)
    for workers in (0, 1):
        reader = Reader(samples, 4, workers)
        for step in (2, 3):  # as a run does that goes on
            assert rows(reader.read(step)) == rows(samples[step])


def test_no_picture_is_opened_twice_a_step(data, model, monkeypatch):
    opened, read = [], reading.open_picture

    def count(path):
        opened.append(path)
        return read(path)

    monkeypatch.setattr(reading, "open_picture", count)
    samples = make(data, model, total=12, micro=2)  # every record twice
    samples[0]
    pictures = {data / path for each in RECORDS for path in each["entity_path"]}
    assert sorted(opened) == sorted(pictures)


def test_a_picture_that_has_gone_is_told_in_its_own_step(model, tmp_path):
    """What is read ahead does not stop the steps before."""
    folder = save_data(tmp_path, model)
    samples = make(folder, model, total=1)
    gone = RECORDS[order(0)[2]]["entity_path"][0]
    steps = [
        step for step in range(3) if gone in RECORDS[order(0)[step]]["entity_path"]
    ]  # the first that reads it
    (folder / gone).unlink()
    reader = Reader(samples, 6, 1)
    for step in range(steps[0]):
        assert len(reader.read(step)) == 1
    with pytest.raises(UserError) as told:
        reader.read(steps[0])
    missing = f"there is no picture {folder / gone}; give a JPEG, PNG or WebP file that is there"
    assert str(told.value) == missing  # though it comes from another process


def test_workers_leave_being_asked_to_end_to_the_one_that_learns(data, model):
    """A batch system whose time is up tells all processes, a closed terminal likewise."""
    before = set(active_children())
    reader = Reader(make(data, model), 6, 1)
    reader.read(0)
    (worker,) = set(active_children()) - before
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(worker.pid, each)
    time.sleep(0.2)
    for step in range(1, 6):
        assert len(reader.read(step)) == 1
    assert worker.is_alive() or worker.exitcode == 0


def test_workers_end_with_the_one_that_learns(data, model, monkeypatch):
    """Where something still holds the reader at the end, as an error's traceback does."""
    before, at_end = set(active_children()), []
    monkeypatch.setattr(reading, "atexit", SimpleNamespace(register=at_end.append))
    reader = Reader(make(data, model), 60, 1)
    reader.read(0)
    (worker,) = set(active_children()) - before
    (end,) = at_end
    end()
    worker.terminate()  # as Python does, before it waits for ever
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("waiting", "first", "workers", "steps", "told"),
    [
        (3, 0, 2, 21, "waiting for samples took 30% of the time so far: a --workers above 2"),
        (3, 0, 0, 500, "reading samples took 30% of the time so far: a --workers above 0"),
        (2, 0, 2, 500, None),
        (3, 4, 2, 500, None),  # not the first process
        (3, 0, 2, 20, None),  # too few steps
    ],
)
def test_long_waiting_for_samples_is_told(
    monkeypatch, caplog, waiting, first, workers, steps, told
):
    """Once; what comes before the first step is not counted."""
    now, at = SimpleNamespace(time=0.0), []

    def batches(reader, step):
        now.time += 1000
        while True:
            now.time += waiting
            yield []

    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: now.time))
    monkeypatch.setattr(Reader, "_read_from", batches)
    reader = Reader(SimpleNamespace(first=first), steps, workers)
    for step in range(steps):
        assert reader.read(step) == []
        now.time += 10 - waiting
        at += [step] * (len(caplog.records) - len(at))
    assert [record.getMessage() for record in caplog.records] == (
        [f"{told} may be faster"] if told else []
    )
    assert at == ([min(steps - 1, 200)] if told else [])


# ----------------------------------------------------------------------------------------------
# how weights are changed


def test_the_optimiser_is_the_release_s(work, model):
    begun = Begun(model, "--warmup_steps", "1000", "--learning_rate", "3.54e-6")
    (group,) = begun.stage.optimizer.param_groups
    assert type(begun.stage.optimizer) is torch.optim.AdamW
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-10
    assert group["weight_decay"] == 0.03 and not group["amsgrad"]
    assert len(group["params"]) == len(trained_parameters(begun.model)) == 192
    rates = []
    for _ in range(1200):
        rates.append(group["lr"])
        begun.stage.optimizer.step()
        begun.stage.schedule.step()
    assert rates[0] == 0
    assert rates[1] == pytest.approx(3.54e-9, rel=1e-9)
    assert rates[999] == pytest.approx(3.54e-6 * 0.999, rel=1e-9)
    assert rates[1000:] == [3.54e-6] * 200


@pytest.mark.parametrize(
    "recipe, rate",
    [
        (Recipe(), 3.54e-6),
        (Recipe(learning_rate=1e-5, batch_size=32, scale_rate=True), 3.5355339e-6),
        (Recipe(learning_rate=1e-5, batch_size=2048, scale_rate=True), 2.8284271e-5),
        (Recipe(learning_rate=1e-5, batch_size=2048), 1e-5),
        (Recipe(batch_size=32, scale_rate=True), 3.5355339e-6),
        (Recipe(batch_size=64, scale_rate=True), 5e-6),
        (Recipe(lora_rank=4), 1e-4),
        (Recipe(lora_rank=4, batch_size=64, scale_rate=True), 5e-5),
    ],
)
def test_the_rule_of_the_rate(recipe, rate):
    assert recipe.rate == pytest.approx(rate, rel=1e-6)


def test_the_defaults_are_the_release_s():
    """mige.md, section 1, "Optimisation"."""
    recipe = Recipe()
    assert (recipe.batch_size, recipe.epochs, recipe.warmup_steps) == (32, 20, 1000)
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.ema) == (0.03, 0.01, 0)
    assert recipe.lora_rank == 0 and recipe.dropout is None
    assert TrainingConfig().seed == 43


def test_steps_of_epochs(work, model):
    """20 epochs of six records in batches of four are 30 updates."""
    config = options_of(model).with_settings(steps=None)
    assert make_plan(config, Processes("cpu")).steps == 30
    assert make_plan(config.with_settings(epochs=1), Processes("cpu")).steps == 1


def test_a_first_update(work, model, tmp_path):
    """By hand: the gradient is clipped to a norm of 0.01, moments are 0.1 g and 0.001 g²."""
    begun = Begun(model)
    gradients = begun.gradients()
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    assert norm > 0.05
    before = {name: p.detach().clone() for name, p in trained_parameters(begun.model).items()}
    command.main([*usual(model, str(tmp_path / "O")), "--steps", "1", "--learning_rate", "0.01"])
    saved = load_file(tmp_path / "O" / CHECKPOINT)
    clipped, total = 0.01 / norm, 0.0
    for index, (name, gradient) in enumerate(gradients.items()):
        g = gradient.double() * clipped
        first, second = (saved[f"optimizer.{index}.{k}"] for k in ("exp_avg", "exp_avg_sq"))
        assert torch.allclose(first.double(), 0.1 * g, rtol=1e-3, atol=1e-9), name
        assert torch.allclose(second.double(), 0.001 * g**2, rtol=2e-3, atol=1e-12), name
        total += first.double().square().sum().item()
        # m / 0.1 = g, and √(v / 0.001) = |g|
        g = first.double() / 0.1
        wanted = before[name].double() * (1 - 0.01 * 0.03) - 0.01 * g / (g.abs() + 1e-10)
        assert torch.allclose(saved[f"trained.{name}"].double(), wanted, atol=2e-5), name
    assert math.sqrt(total) / 0.1 == pytest.approx(0.01, rel=1e-3)


def test_micro_batches_add_up_to_the_mean_over_the_batch(work, model):
    begun = Begun(model, "--micro_batch_size", "3")
    found = begun.gradients(1)
    whole = make(work, model)[1]
    begun.model.zero_grad()
    terms = begun.model(whole[0])
    terms.loss.mean().backward()
    for name, parameter in trained_parameters(begun.model).items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name], wanted, rtol=1e-4, atol=1e-6), name
    assert begun.losses["loss"].item() == pytest.approx(terms.loss.mean().item(), rel=1e-5)
    assert begun.losses["mse"].item() == pytest.approx(terms.mse.mean().item(), rel=1e-5)


def test_a_batch_without_pictures(model, tmp_path, monkeypatch):
    """The vision side has gradients of zero, so decay alone changes it."""
    monkeypatch.chdir(save_data(tmp_path, model, [PLAIN]))
    begun = Begun(model)
    before = begun.model.parts["qformer"].state_dict()["layernorm.weight"].clone()
    for name, gradient in begun.gradients().items():
        if name.split(".")[1] in ("qformer", "vision_encoder", "fusion"):
            assert not gradient.any(), name
    begun.stage.optimizer.step()
    after = begun.model.parts["qformer"].state_dict()["layernorm.weight"]
    assert torch.allclose(after, before * (1 - 0.001 * 0.03), rtol=1e-6)
    assert begun.losses["loss"].isfinite()
    assert begun.losses["subject"] == begun.losses["loss"]
    assert begun.losses["edit"].isnan() and begun.losses["subject_edit"].isnan()


def test_losses_by_task():
    tally = Tally("cpu")
    numbers = torch.tensor([[1.0, 0.5, 1.5], [3.0, 0.0, 3.0], [5.0, 1.0, 6.0]])
    tally.add(("edit", "subject"), Terms(*numbers[:2].T))
    tally.add(("edit",), Terms(*numbers[2:].T))
    found = {name: value.item() for name, value in tally.means(Processes("cpu")).items()}
    assert found["loss"] == 3.5 and found["mse"] == 3 and found["bound"] == 0.5
    assert found["edit"] == 3.75 and found["subject"] == 3 and math.isnan(found["subject_edit"])


# ----------------------------------------------------------------------------------------------
# what learns


#: Of the release (mige.md, section 6, and what it trained from).
FULL = {
    "transformer": {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 8, "out_channels": 8,
        "num_layers": 28, "cross_attention_dim": 1152, "sample_size": 64, "patch_size": 2,
        "caption_channels": 4096, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6, "attention_bias": True,
        "activation_fn": "gelu-approximate", "use_additional_conditions": False,
    },
    "vision_encoder": {
        "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "qkv_bias": True,
    },
    "qformer": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
        "use_qformer_text_input": False,
    },
    "text_encoder": {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
        "num_heads": 64, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
    },
    "fusion": {
        "queries": 32, "width": 768, "heads": 8, "patch_width": 1152, "text_width": 4096,
        "text_length": 256,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def full() -> TrainedModel:
    """The released model's shapes."""
    parts = {name: build(name, config) for name, config in FULL.items()}
    return TrainedModel(parts, Diffusion(), end=1, round_timesteps=True)


def test_what_learns_of_the_released_model(full):
    choose_trained(full, Recipe(), 0)
    counts: dict[str, int] = {}
    for name, parameter in trained_parameters(full).items():
        part, rest = name.split(".")[1:3]
        key = f"{part}.{rest}" if part in ("fusion", "vision_encoder") else part
        counts[key] = counts.get(key, 0) + parameter.numel()
    assert counts == {
        "transformer": 610_874_528,
        "fusion.features": 6_501_120,
        "fusion.projection": 3_149_824,
        "fusion.query_tokens": 24_576,
        "qformer": 105_137_664,
        "text_encoder": 4_762_310_656,
        "vision_encoder.post_layernorm": 2_816,
    }


def test_what_a_lora_teaches_of_the_released_model(full):
    """Rank 4 of all attention: 28 blocks of eight layers 1152 × 1152, 24 of four 4096 × 4096."""
    choose_trained(full, Recipe(lora_rank=4, parts=("transformer", "text_encoder")), 0)
    counts = {"transformer": 0, "text_encoder": 0}
    for name, parameter in trained_parameters(full).items():
        assert name.endswith(("lora_A", "lora_B"))
        counts[name.split(".")[1]] += parameter.numel()
    assert counts["transformer"] == 28 * 8 * 4 * (1152 + 1152)
    assert counts["text_encoder"] == 24 * 4 * 4 * (4096 + 4096)


@pytest.fixture(scope="module")
def trained(data, model, tmp_path_factory) -> Path:
    """The output of two updates of all parts; tests only read it."""
    output = tmp_path_factory.mktemp("trained") / "O"
    before = Path.cwd()
    os.chdir(data)
    try:
        command.main(usual(model, str(output), "--learning_rate", "0.01", "--max_grad_norm", "10"))
    finally:
        os.chdir(before)
    return output


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((folder / part).glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_what_has_moved(trained, model):
    """All but the vision encoder below its norm, the null text, and the autoencoder."""
    still = set()
    for part in PARTS_OF_WEIGHTS:
        before, after = weights(model, part), weights(trained / "model", part)
        assert before.keys() == after.keys()
        still |= {f"{part}.{name}" for name in before if torch.equal(before[name], after[name])}
    vision = {f"vision_encoder.{k}" for k in weights(model, "vision_encoder")}
    norm = {f"vision_encoder.post_layernorm.{kind}" for kind in ("weight", "bias")}
    assert norm < vision
    autoencoder = {f"vae.{name}" for name in weights(model, "vae")}
    fixed = {name for name in still if name.endswith("pos_embed")}  # positions, where stored
    assert still == (vision - norm) | autoencoder | fixed | {"fusion.null_text"}


def test_the_result_is_the_checkpoint_s_weights(trained):
    """Those of a text encoder have two names for its table, of which the file may hold either."""
    saved, compared = load_file(trained / CHECKPOINT), 0
    for part in ("transformer", "fusion", "qformer", "text_encoder"):
        found = weights(trained / "model", part)
        for name in found.keys() & {
            key.removeprefix(f"trained.parts.{part}.") for key in saved if f".parts.{part}." in key
        }:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], saved[f"trained.parts.{part}.{name}"])
            compared += 1
    assert compared >= 185
    norm = weights(trained / "model", "vision_encoder")["post_layernorm.weight"]
    assert torch.equal(norm, saved["trained.parts.vision_encoder.post_layernorm.weight"])


def test_the_result_s_other_files_are_the_same(trained, model, data):
    before, after = contents(model), contents(trained / "model")
    assert before.keys() == after.keys()
    learned = {f"{part}/" for part in PARTS_OF_WEIGHTS if part != "vae"}
    for name, content in before.items():
        if not (name.endswith(".safetensors") and name.startswith(tuple(learned))):
            assert after[name] == content, name
        if name.endswith(".json"):  # which people edit
            assert not (trained / "model" / name).samefile(model / name), name
    assert Kind.of_model(trained / "model") == Kind.of_model(model)
    features = open_features(data / "F", trained / "model")
    assert not list(features.missing(RecordList(data / "d.json"), range(6)))


def test_the_result_paints(trained, model):
    ours, before = (MigePipeline.from_pretrained(each) for each in (trained / "model", model))
    settings = {"steps": 2, "seed": 1}
    pictures = [Image.new("RGB", (40, 30), "red")]
    painted = [
        p("a<imagehere>on the beach", pictures, **settings).images[0] for p in (ours, before)
    ]
    assert painted[0].size == (32, 32) and painted[0].tobytes() != painted[1].tobytes()


def test_files_that_may_not_be_written_are_copied(tmp_path):
    """A link of such a file could not be flushed, and the result would never be there."""
    for name in ("own", "kept"):
        (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "kept").chmod(0o444)
    for name in ("own", "kept"):
        _take_over(tmp_path / name, tmp_path / f"{name}2")
        assert (tmp_path / f"{name}2").read_bytes() == b"weights"
    assert (tmp_path / "own").samefile(tmp_path / "own2")
    assert not (tmp_path / "kept").samefile(tmp_path / "kept2")
    assert (tmp_path / "kept2").stat().st_mode & 0o200


def test_a_table_of_words_that_is_stored_twice(work, model, tmp_path):
    """T5's has two names, of which files hold one or both: both are what learned."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (file,) = (base / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    names = ("shared.weight", "encoder.embed_tokens.weight")
    (table,) = (tensors[name] for name in names if name in tensors)
    save_file(tensors | {name: table.clone() for name in names}, file, {"format": "pt"})
    command.main(usual(base, str(tmp_path / "O"), "--parts", "text_encoder", "--steps", "1"))
    found = weights(tmp_path / "O/model", "text_encoder")
    assert torch.equal(*(found[name] for name in names))
    assert not torch.equal(found[names[0]], table)


def split_into_shards(folder: Path, part: str, dtype: torch.dtype) -> None:
    """Divide a part's only file of weights into two, in another precision, with their index."""
    (file,) = (folder / part).glob("*.safetensors")
    stem, tensors = file.name.removesuffix(".safetensors"), load_file(file)
    file.unlink()
    places = {
        name: f"{stem}-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(tensors)
    }
    for shard in set(places.values()):
        mine = {k: t.to(dtype) for k, t in tensors.items() if places[k] == shard}
        save_file(mine, folder / part / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def test_a_lora_of_a_model_in_bf16_shards(work, model, tmp_path):
    """W + B A in the precision and the files that W had; what it computes is what learned."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    for part in ("transformer", "text_encoder"):
        split_into_shards(base, part, torch.bfloat16)
    options = ("--lora_rank", "2", "--learning_rate", "0.05", "--parts")
    command.main(usual(base, str(tmp_path / "O"), *options, "transformer", "text_encoder"))
    before, after = contents(base), contents(tmp_path / "O/model")
    assert before.keys() == after.keys()
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"transformer", "text_encoder"}
    saved = load_file(tmp_path / "O" / CHECKPOINT)
    layers = {
        name.removeprefix("trained.parts.").removesuffix(".lora_A")
        for name in saved
        if name.startswith("trained.") and name.endswith(".lora_A")
    }
    assert len(layers) == 2 * 8 + 2 * 4
    for part in ("transformer", "text_encoder"):
        old, new = weights(base, part), weights(tmp_path / "O/model", part)
        for name in old:
            assert new[name].dtype == torch.bfloat16
            layer = f"{part}.{name.removesuffix('.weight')}"
            if name.endswith(".weight") and layer in layers:
                a, b = (saved[f"trained.parts.{layer}.lora_{kind}"] for kind in "AB")
                assert a.dtype == b.dtype == torch.float32 and b.any()
                assert torch.equal(new[name], (old[name].float() + b @ a).bfloat16()), name
                assert not torch.equal(new[name], old[name])
            else:
                assert torch.equal(new[name], old[name]), name


def test_a_merged_lora_is_what_learned(work, model, tmp_path):
    options = ("--lora_rank", "2", "--learning_rate", "0.05")
    command.main(usual(model, str(tmp_path / "O"), *options))
    saved = load_file(tmp_path / "O" / CHECKPOINT)
    begun = Begun(model, *options)
    begun.stage.load_state(
        {k.removeprefix("trained."): t for k, t in saved.items() if k.startswith("trained.")}
    )
    merged = Begun(tmp_path / "O/model")
    (batch,) = make(work, model)[3]
    with torch.no_grad():
        found, wanted = merged.model(batch), begun.model(batch)
        fresh = Begun(model).model(batch)
    assert torch.allclose(found.loss, wanted.loss, rtol=1e-5)
    assert (fresh.loss - wanted.loss).abs().max() > 1e-3


def test_the_average_is_the_result(work, model, tmp_path):
    """w̄ ← m w̄ + (1 − m) w, m being 1/10, 2/11 and 3/12 after three updates; 0.2 is the most."""
    output = tmp_path / "O"
    options = ("--ema", "0.2", "--learning_rate", "0.01")
    name = "parts.fusion.projection.weight"
    average = weights(model, "fusion")["projection.weight"].double()
    for steps, kept in ((1, 0.1), (2, 2 / 11), (3, 0.2)):
        more = ["--steps", str(steps)] + ["--resume"] * (steps > 1)
        command.main([*usual(model, str(output), *options), *more])
        now = load_file(output / CHECKPOINT)[f"trained.{name}"].double()
        average = kept * average + (1 - kept) * now
        found = weights(output / "model", "fusion")["projection.weight"].double()
        assert torch.allclose(found, average, atol=1e-6)
        assert (found - now).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------
# what is left out, dropout and precision


def test_what_is_left_out_of_a_sample(work, model):
    """By its draw: text and pictures, of which the mask stays; the source; both; or nothing."""
    batch = make(work, model, total=6)[0][0]
    begun = Begun(model)
    other = replace(batch, vision=-batch.vision, latents=-batch.latents)
    bare = replace(batch, source=torch.zeros_like(batch.source))
    edits = torch.tensor([task != "subject" for task in batch.tasks])
    assert 0 < edits.sum() < 6

    def loss(of, draw: float) -> torch.Tensor:
        return loss_of(begun.model, replace(of, draws=torch.full((6,), draw)), 1)

    for draw, has_text, has_source in (
        (0.02, False, True), (0.07, True, False), (0.12, False, False), (0.2, True, True),
    ):  # fmt: skip
        found = loss(batch, draw)
        assert ((loss(other, draw) - found).abs() > 1e-6).all() == has_text
        assert torch.equal(loss(other, draw), found) != has_text
        assert torch.equal(loss(bare, draw), found) != has_source
        assert torch.equal(loss(bare, draw)[~edits], found[~edits])


def loss_of(model: TrainedModel, batch, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(batch).loss


def test_dropout_where_parts_train(work, model):
    (batch,) = make(work, model)[0]
    usual_dropout = options_of(model).with_settings(dropout=None)
    for parts, drops in (
        (("qformer",), True), (("text_encoder",), True), (("transformer", "fusion"), False),
    ):  # fmt: skip
        config = usual_dropout.with_settings(parts=parts)
        ours = make_model(make_plan(config, Processes("cpu")), load_parts(model))
        one, same, other = (loss_of(ours, batch, seed) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert torch.equal(one, other) != drops, parts
    begun = Begun(model, "--dropout", "0")
    assert torch.equal(loss_of(begun.model, batch, 1), loss_of(begun.model, batch, 2))
    strong = Begun(model, "--dropout", "0.9")
    rates = {m.p for p in ("qformer", "text_encoder") for m in strong.model.parts[p].modules()
             if isinstance(m, torch.nn.Dropout)}  # fmt: skip
    assert rates == {0.9}


def test_dropout_is_a_step_s_own(work, model):
    """What a step drops neither depends on the steps before, nor is that of another step."""
    config = options_of(model).with_settings(dropout=0.5, batch_size=6)
    found = []
    for steps in ((0, 1), (1,)):
        plan = make_plan(config, Processes("cpu"))
        stage = make_stage(plan, make_model(plan, load_parts(model)))
        torch.manual_seed(len(steps))
        for step in steps:
            with stage.losses(step) as losses:
                found.append(losses["loss"].item())
    assert found[1] == found[2]


def test_each_batch_of_a_step_drops_by_a_seed_of_its_own(work, model):
    """Labelled by step, process and place among the batches of a step."""
    begun, seeds = Begun(model, "--micro_batch_size", "2", "--steps", "4"), []
    begun.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for step in (0, 3):
        begun.gradients(step)
    places = [(0, 0, 0), (0, 0, 1), (3, 0, 0), (3, 0, 1)]
    assert seeds == [generator("layers", *place).initial_seed() for place in places]


def test_bf16_is_near_float32(work, model):
    (batch,) = make(work, model)[0]
    exact = Begun(model).model(batch).loss
    begun = Begun(model, "--mixed_precision", "bf16")
    assert begun.plan.dtype == torch.bfloat16
    found = begun.model(batch).loss
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert torch.allclose(found, exact, rtol=0.05)
    assert {p.dtype for p in trained_parameters(begun.model).values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "is_fused"), [("bf16", False), ("no", True)])
def test_attention_is_not_fused_where_the_cpu_trains_in_bf16(
    work, model, tmp_path, monkeypatch, precision, is_fused
):
    """There the fused kernel is slower than all of the rest."""
    seen = []

    def stop(self, stages, saved):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Trainer, "run", stop)
    config = options_of(model, "--mixed_precision", precision, "--output", str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        run.train(make_plan(config, Processes("cpu")))
    assert seen == [is_fused]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_checkpointed_gradients_are_the_same(work, model):
    exact, found = (Begun(model, *more).gradients() for more in ((), ("--gradient_checkpointing",)))
    for name, gradient in exact.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("parts", [("transformer", "text_encoder"), ("fusion",)])
def test_checkpointed_blocks_are_computed_twice(work, model, parts):
    """Also those of parts that do not learn, through which others do; nothing is dropped there."""
    more = ("--gradient_checkpointing", "--dropout", "0.5", "--parts", *parts)
    begun, calls = Begun(model, *more), []
    trunk, text = begun.model.parts["transformer"], begun.model.parts["text_encoder"]
    for inner in (trunk.transformer_blocks[0].ff, text.encoder.block[0].layer[1]):
        inner.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    begun.gradients()
    assert sorted(calls) == ["FeedForward"] * 2 + ["T5LayerFF"] * 2
    drops = {m.training for m in text.modules() if isinstance(m, torch.nn.Dropout)}
    assert drops == {"text_encoder" in parts}


# ----------------------------------------------------------------------------------------------
# memory


def test_memory_by_hand(model):
    """195,504 weights learn and 29,512 do not: 4 bytes each, or 2 where frozen ones are bf16."""
    config = options_of(model).with_settings(ema=0.9, batch_size=4, micro_batch_size=8)
    one = estimate(model, config, 1, torch.bfloat16, "cuda")
    assert (one.trained, one.frozen) == (195_504, 29_512)
    assert one.weights == 195_504 * 4 + 29_512 * 2
    assert one.gradients == one.average == one.moments // 2 == 195_504 * 4
    assert one.total == one.weights + 4 * one.gradients + one.activations
    split = config.with_settings(shard=True)
    two = estimate(model, split, 2, torch.bfloat16, "cuda")
    assert two.weights == (195_504 + 29_512) * 4 // 2 and two.moments == one.moments // 2
    samples = config.with_settings(batch_size=2)
    same = estimate(model, samples.with_settings(shard=True), 1, torch.bfloat16, "cuda")
    assert two.activations == same.activations  # of two samples each
    assert two.activations < one.activations
    assert one.activations < estimate(model, config, 1, torch.bfloat16, "cpu").activations  # maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_real_pass_keeps(model, dtype):
    """Bytes of all that is saved for the backward pass but weights, each storage once."""
    recipe = Recipe(dropout=0.0)
    fixed, each = batch_bytes(empty_model(model, recipe, dtype, dtype), model, False)
    parts = load_parts(model, dtype, learned_whole(recipe), ["vae"])
    ours = TrainedModel(parts, Diffusion(), end=0, round_timesteps=False, autocast=dtype)
    choose_trained(ours, recipe, 0)
    for count in (1, 3):
        wanted = kept_bytes(ours, blank_batch(model, count))
        assert fixed + count * each == pytest.approx(
            wanted, rel=0 if dtype == torch.float32 else 1e-3
        )
    whole = sum(p.numel() for p in trained_parameters(ours).values() if p.ndim > 1)
    if dtype == torch.float32:
        assert fixed < 10_000  # of positions, which all samples share
    else:  # all weights that multiply, but for tables, are kept as copies of two bytes
        assert whole * 2 * 0.8 < fixed < whole * 2


def kept_bytes(model: TrainedModel, batch) -> int:
    weights_at = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    return sum(
        tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights_at
    )


def test_no_copies_of_weights_are_held_beside_what_is_kept(work, model):
    begun, cached = Begun(model, "--mixed_precision", "bf16"), []
    begun.model.parts["transformer"].register_forward_pre_hook(
        lambda *_: cached.append(
            (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())
        )
    )
    begun.gradients()
    assert set(cached) == {(True, False)}
