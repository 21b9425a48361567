"""The plain order of MIGE equals the authors' arrays and the pipeline, and costs what is said."""

import json
from pathlib import Path

import pytest
import torch
from pretend_device import pretend

from benchmarks import mige as command
from benchmarks import mige_plain, mige_training
from benchmarks.measure import operations
from benchmarks.mige_cases import (
    MODELS,
    SEED,
    Row,
    build_parts,
    count_operations,
    guidance_of,
    load_model,
    make_work,
    request_of,
)
from mige.config import Guidance
from mige.method.instruction import segment_ids
from mige.method.sampler import ContinuousDPMSolver
from mige.pipeline import MigePipeline
from mige.request import make_request

SUBJECTS, EDIT = [Row("subject", count) for count in (1, 2, 4)], Row("edit", 1)
STEPS = 3


@pytest.fixture(scope="module")
def pipeline() -> MigePipeline:
    return load_model("tiny", "cpu", torch.float32)


@pytest.fixture
def golden(monkeypatch):
    """What the tests of :mod:`mige` read the golden arrays with."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "mige")
    import golden_mige

    return golden_mige


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ----------------------------------------------------------------------------------------------
# what the plain order computes


@pytest.mark.parametrize("name", ["sample_subject_6", "sample_edit_6"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_plain_order_gives_the_authors_latents(golden, name, index):
    """Of a batch of two, whose samples do not touch each other; from pixels on."""
    given = golden.arrays(name)
    tokenizer = golden.WordTokenizer()
    pipeline = MigePipeline(
        **golden.golden_parts(), vae=None, tokenizer=tokenizer, scheduler=ContinuousDPMSolver()
    )
    is_edit = "source" in given
    text_scale, image_scale = given["scales"].tolist()
    inputs = mige_plain.Inputs(
        segment_ids(tokenizer, golden.PROMPTS[index]),
        given["ref_clip"][index],
        given["ref_vae"][index],
        given.get("source", torch.zeros_like(given["z"]))[index],
        mige_plain.EDIT if is_edit else mige_plain.SUBJECT,
    )
    guidance = Guidance(6, text_scale, image_scale if is_edit else 1.0)
    found = mige_plain.denoise(pipeline, inputs, given["z"][index], guidance)
    assert_equal(found, given["latents"][6, index : index + 1])


@pytest.mark.parametrize("row", [*SUBJECTS, EDIT], ids=str)
def test_the_pipeline_gives_the_plain_order_s_latents(pipeline, row):
    ours, theirs = (make_work(pipeline, row, STEPS, is_plain)() for is_plain in (False, True))
    assert_equal(ours, theirs)


def test_an_edit_with_a_subject(pipeline):
    """Its source is the second picture, and is drawn twice; the image scale is not 1."""
    subject, source = request_of(SUBJECTS[1]).pictures
    request = make_request("a <image> on <image>", (subject,), source, source_place=1, name=5)
    inputs, condition = mige_plain.prepare(pipeline, request, 7), pipeline.encode(request, 7)
    assert torch.equal(inputs.source, condition.source)
    scale = pipeline.vae.config.scaling_factor
    assert not torch.equal(inputs.source, scale * inputs.latents[1])
    noise, guidance = pipeline.noise(request, 7), Guidance(STEPS, 5.0, 1.5)
    ours = pipeline.denoise([condition], noise[None], guidance)
    assert_equal(ours, mige_plain.denoise(pipeline, inputs, noise, guidance))


@pytest.mark.parametrize("blank", ["seen", "latents"])
def test_the_random_model_looks_at_its_pictures(pipeline, blank):
    """Else equal latents would say little: without one of their two forms they are others."""
    inputs = mige_plain.prepare(pipeline, request_of(SUBJECTS[0]), SEED)
    others = mige_plain.Inputs(**{**vars(inputs), blank: torch.zeros_like(vars(inputs)[blank])})
    noise, guidance = pipeline.noise(request_of(SUBJECTS[0]), SEED), guidance_of(SUBJECTS[0], STEPS)
    with_pictures, without = (
        mige_plain.denoise(pipeline, each, noise, guidance) for each in (inputs, others)
    )
    assert command.apart(with_pictures, without) > 10 * command.TOLERANCE


# ----------------------------------------------------------------------------------------------
# what it costs


@pytest.mark.parametrize(
    ("row", "is_plain", "pictures", "texts", "samples"),
    [
        (SUBJECTS[1], True, [4, 4, 4], [1, 1, 1], [2, 2, 2]),
        (SUBJECTS[1], False, [2], [1], [2, 2, 2]),
        (EDIT, True, [4, 4, 4], [1, 1, 1], [3, 3, 3]),
        (EDIT, False, [1], [1], [2, 2, 2]),
    ],
    ids=str,
)
def test_how_often_parts_run(pipeline, row, is_plain, pictures, texts, samples):
    """Sizes of the batches that go through each part, in three steps."""
    wanted = {
        "vision_encoder": pictures, "qformer": pictures, "text_encoder": texts,
        "transformer": samples,
    }  # fmt: skip
    found = {name: [] for name in wanted}
    hooks = [
        getattr(pipeline, name).register_forward_hook(
            lambda _, args, out, name=name: found[name].append(len(out[0]))
        )
        for name in wanted
    ]
    try:
        make_work(pipeline, row, 3, is_plain)()
    finally:
        for hook in hooks:
            hook.remove()
    assert found == wanted


@pytest.mark.parametrize("row", [SUBJECTS[2], EDIT], ids=str)
def test_operations_are_those_of_a_run(pipeline, row):
    counted = count_operations(MODELS["tiny"], row, STEPS)
    for side in ("plain", "ours"):
        assert operations(make_work(pipeline, row, STEPS, side == "plain")) == counted[side]


def test_the_full_size_is_the_released_one():
    """Parameters by part; the fusion has its features, the projection and the queries."""
    parts = build_parts(MODELS["full"], "meta")
    wanted = {
        "transformer": 610_874_528,
        "vision_encoder": 985_952_256,
        "qformer": 105_137_664,
        "text_encoder": 4_762_310_656,
        "fusion": 6_501_120 + 3_149_824 + 32 * 768,
    }
    for name, count in wanted.items():
        assert all(each.is_meta for each in parts[name].parameters())
        assert sum(each.numel() for each in parts[name].parameters()) == count


def test_operations_of_a_denoising_step_at_full_size():
    """Two branches, each with 1024 tokens of width 1152 and 256 of text."""
    w, n, k, text, inner = 1152, 1024, 256, 4096, 4608
    block = 2 * n * 4 * w * w + 4 * n * n * w  # self-attention
    block += 2 * (n * 2 * w * w + k * 2 * w * w) + 4 * n * k * w  # cross-attention
    block += 2 * n * 2 * w * inner
    ends = 2 * n * (8 * 2 * 2) * w + 2 * n * w * 32  # patches in and out
    times = 2 * (256 * w + w * w + w * 6 * w)
    caption = 2 * k * (text * w + w * w)
    one, two = (count_operations(MODELS["full"], EDIT, steps)["ours"] for steps in (1, 2))
    assert two - one == 2 * (28 * block + ends + times + caption)


def test_the_middle_size_has_the_proportions_of_the_full_one():
    """So that what it shows holds for the full one: the share of work that is saved."""
    mid, full = (count_operations(MODELS[name], EDIT, 60) for name in ("mid", "full"))
    assert mid["plain"] / mid["ours"] == pytest.approx(full["plain"] / full["ours"], rel=0.1)


# ----------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    threads = str(torch.get_num_threads())
    asked = ["--device", "cpu", "--model", "tiny", "--references", "2", "--steps", "2"]
    command.main([*asked, "--repeats", "1", "--threads", threads])
    numbers = json.loads((tmp_path / "latest.json").read_text())
    assert [(row["task"], row["references"]) for row in numbers["rows"]] == [
        ("subject", 2), ("edit", 1)
    ]  # fmt: skip
    assert numbers["clock"] == "cpu" and numbers["precision"] == "fp32"
    for row in numbers["rows"]:
        assert 0 < row["apart"] <= 1e-5
        for side in ("plain", "ours"):
            assert row[side]["bytes"] > numbers["weights"] > 0
            assert row[side]["seconds"] > 0
        assert row["plain"]["operations"] > row["ours"]["operations"] > 1e7
    shown = capsys.readouterr().out
    assert "| subject | 2 |" in shown and "| edit | 1 |" in shown
    assert shown.startswith("Made by `python -m benchmarks.mige --device cpu --model tiny")


def test_unequal_latents_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    right = mige_plain.denoise
    monkeypatch.setattr(mige_plain, "denoise", lambda *given: 1.0001 * right(*given))
    asked = ["--device", "cpu", "--model", "tiny", "--what", "edit", "--steps", "2"]
    with pytest.raises(AssertionError, match="the latents of .*edit.* are 0.0001 apart"):
        command.main([*asked, "--threads", str(torch.get_num_threads())])
    assert not list(tmp_path.iterdir())


def test_offloaded_on_a_pretend_gpu():
    """The latents are those of the same weights on the CPU."""
    wanted = make_work(load_model("tiny", "cpu", torch.float32), EDIT, STEPS, False)()
    with pretend("cuda"):
        pipeline = load_model("tiny", "cuda", torch.float32, offload=True)
        assert pipeline.transformer.device.type == "cpu"
        found = make_work(pipeline, EDIT, STEPS, False)()
        assert found.device.type == "cuda"
        assert pipeline.transformer.device.type == "cpu"
        assert_equal(found.cpu(), wanted)


def test_both_sides_on_a_pretend_gpu():
    """In bf16, where sums are rounded in other places."""
    with pretend("cuda"):
        pipeline = load_model("tiny", "cuda", torch.bfloat16)
        assert pipeline.text_encoder.dtype == torch.bfloat16 != pipeline.vae.dtype
        assert pipeline.config.round_timesteps
        ours, plain = (make_work(pipeline, EDIT, STEPS, side)() for side in (False, True))
        assert ours.device.type == plain.device.type == "cuda"
        ours, plain = ours.cpu(), plain.cpu()
    assert ours.isfinite().all() and ours.any()
    assert command.apart(ours, plain) < 0.02


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "full"], "--model full needs a CUDA device; give mid or tiny"),
        (["--offload"], "--offload needs a CUDA device; leave it out"),
        (["--references", "1", "5"], "--references has [1, 5]; give numbers from 1 to 4"),
        (["--references", "0"], "--references has [0]; give numbers from 1 to 4"),
        (["--steps", "0"], "numbers of steps, repeats and threads start at 1"),
    ],
)
def test_what_cannot_be_measured(arguments, told, fails):
    found = fails(command.main, ["--device", "cpu", *arguments])
    assert told in found.err


def test_a_training_of_full_size_is_for_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        mige_training.parse_args(["--model", "full", "--device", "cpu"])
    assert stop.value.code == 2
    assert "--model full needs a CUDA device; give mid or tiny" in capsys.readouterr().err


def test_unequal_losses_of_a_training_are_an_error(tmp_path, monkeypatch):
    """On the CPU; and equal ones are written down."""
    monkeypatch.setattr("benchmarks.table.RESULTS", tmp_path)
    asked = ["--device", "cpu", "--model", "tiny", "--what", "all weights", "--repeats", "1"]
    asked += ["--threads", str(torch.get_num_threads())]
    mige_training.main(asked)
    (line,) = (tmp_path / "latest_training.md").read_text(encoding="utf-8").splitlines()[6:]
    assert line.startswith("| all weights | ") and float(line.split("|")[-2]) <= 1e-5
    embed = mige_training.PlainModel.embed

    def wrong(self, batch):
        found = embed(self, batch)
        return found._replace(embeddings=found.embeddings.flip(-1))

    monkeypatch.setattr(mige_training.PlainModel, "embed", wrong)
    with pytest.raises(AssertionError, match="the losses of all weights are .* apart"):
        mige_training.main(asked)


FACTS = {
    "command": "the command", "machine": "a machine", "clock": "wall", "steps": 8, "repeats": 3,
    "precision": "bf16", "pixels": 512, "weights": 12 * 2**20, "offload": True,
}  # fmt: skip


def test_a_table_with_and_without_the_plain_order(tmp_path):
    ours = {"seconds": 2.0, "bytes": 20 * 2**20, "operations": 4e9}
    plain = {"seconds": 7.0, "bytes": 30 * 2**20, "operations": 9e9}
    beside = {"task": "subject", "references": 4, "ours": ours, "plain": plain, "apart": 2.5e-6}
    alone = {"task": "edit", "references": 1, "ours": ours}
    command.write_report(tmp_path / "report", FACTS, [beside, alone])
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith("A whole picture of 512×512 pixels, 8 steps, in bf16; median wall")
    assert lines[2].endswith("12 MB of weights, fetched from the CPU in turn.")
    assert lines[-2:] == [
        "| subject | 4 | 7.00 | 2.00 | 3.50 | 30 | 20 | 1.50 | 9.0 | 4.0 | 2.25 | 2.5e-06 |",
        "| edit | 1 | – | 2.00 | – | – | 20 | – | – | 4.0 | – | – |",
    ]
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == [beside, alone]
