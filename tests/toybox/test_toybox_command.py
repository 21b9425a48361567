"""The command that trains toybox: what it writes, goes on from, and refuses."""

import json
import re
import shutil
import signal
from dataclasses import asdict, replace

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_toybox import CONFIG, SHAPE, assert_same

from imagelab.training.checkpoint import read_checkpoint
from toybox.stable_diffusion import folders, train
from toybox.stable_diffusion import options as train_options
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import BOUNDS, TrainConfig
from toybox.stable_diffusion.folders import OWN
from toybox.stable_diffusion.measures import psnr

pytestmark = pytest.mark.usefixtures("interruptible")

OPTIONS = (
    "--device", "cpu", "--seed", "3", "--vae_scenes", "24", "--vae_batch", "4", "--vae_crop", "16",
    "--decoder_batch", "4", "--scenes", "24", "--batch", "4", "--warmup", "2",
)  # fmt: skip
STEPS = ("--vae_steps", "4", "--decoder_steps", "3", "--steps", "6", "--sample_steps", "4")


@pytest.fixture(scope="module")
def command():
    """Runs ``toybox.stable_diffusion.train`` on the tiny shape; the pipeline that it writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_options, "ToyboxConfig", lambda: SHAPE)

        def run(work, *options):
            train.main(["--work", str(work), *OPTIONS, *options])
            return work / "model"

        yield run


@pytest.fixture(scope="module")
def model(command, tmp_path_factory):
    """A pipeline that the command has trained without a break."""
    return command(tmp_path_factory.mktemp("trained") / "work", *STEPS)


def record_of(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_the_command_writes_a_pipeline_its_record_samples_and_curves(model):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    [picture] = pipeline("a red car", num_inference_steps=1, output_type="np").images
    assert picture.shape == (32, 32, 3)
    latents = load_file(model.parent / "latents.safetensors")["latents"].float()
    assert pipeline.vae.config.scaling_factor == pytest.approx(1 / latents.std().item())
    record = record_of(model)
    assert (record["train"]["steps"], record["processes"], record["began_from"]) == (6, 1, None)
    assert record["psnr_db"] == pytest.approx(
        psnr(pipeline.vae, replace(CONFIG, seed=3), SHAPE), abs=0.1
    )
    assert (model / "training.png").is_file()
    assert [path.name for path in model.parent.glob("samples_*")] == ["samples_000004.png"]


def test_ctrl_c_while_samples_are_drawn_changes_nothing(command, model, tmp_path, monkeypatch):
    """The first is heard after the step, which is saved; the second stops at once."""

    for times, done in ((2, None), (1, 4)):

        def pressed(*_, times=times):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(train, "sample_grid", pressed)
            command(tmp_path, *STEPS)
        path = tmp_path / "unet.safetensors"
        assert (read_checkpoint(path).step if path.is_file() else None) == done
    again = StableDiffusionPipeline.from_pretrained(command(tmp_path, *STEPS))
    unbroken = StableDiffusionPipeline.from_pretrained(model)
    assert_same(again.unet, unbroken.unet)
    assert_same(again.text_encoder, unbroken.text_encoder)


def test_training_goes_on_from_a_model_and_keeps_its_latents(command, model, tmp_path):
    keep = ("--begin_from", str(model), "--vae_steps", "0")
    folder = command(tmp_path / "more", *keep, "--decoder_steps", "2", "--steps", "2")
    then, now = (StableDiffusionPipeline.from_pretrained(path) for path in (model, folder))
    assert_same(now.vae.encoder, then.vae.encoder)
    assert now.vae.config.scaling_factor == then.vae.config.scaling_factor
    assert now.tokenizer.get_vocab() == then.tokenizer.get_vocab()
    for part in ("unet", "text_encoder"):
        weights = getattr(now, part).state_dict()
        change = [(weights[k] - v).abs().max() for k, v in getattr(then, part).state_dict().items()]
        assert 0 < max(change) < 0.05, part  # near where it began, not anew
    assert record_of(folder)["began_from"] == record_of(model)

    folder = command(tmp_path / "same", *keep, "--decoder_steps", "0", "--steps", "0")
    same = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("vae", "unet", "text_encoder"):
        assert_same(getattr(same, part), getattr(then, part))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--vae_steps", "0"), "--begin_from"),
        (("--sample_steps", "0"), "--sample_steps is 0"),
        (("--begin_from", "nowhere"), "nowhere has no readable record.json"),
        (("--seed", "-1"), "the seed is -1; give a whole number from 0 to"),
        (("--vae_steps", "-1"), "--vae_steps is -1; give a whole number from 0 to"),
        (("--vae_crop", "33"), "--vae_crop is 33; give a multiple of 8 up to 128"),
        (("--vae_crop", "136"), "--vae_crop is 136; give a multiple of 8 up to 128"),
        (("--vae_crop", "0"), "--vae_crop is 0; give a multiple of 8 up to 128"),
        (("--workers", "-1"), "--workers is -1; give a whole number from 0 to 256"),
        (("--minutes", "-1"), "--minutes is -1.0; give a number from 0 to 100000"),
        (("--between", "-1"), "--between is -1; give a whole number from 0 to"),
        (("--lr", "nan"), "--lr is nan; give a number from 0 to 1"),
        (("--ema", "3"), "--ema is 3.0; give a number from 0 to 1"),
        (("--caption_dropout", "7"), "--caption_dropout is 7.0; give a number from 0 to 1"),
        (("--warmup", "-4"), "--warmup is -4; give a whole number from 0 to"),
        (("--min_snr", "0"), "--min_snr is 0.0; give a number from 0.001 to 1000000"),
        (("--unet_channels", "16", "20"), "--unet_channels is 16 20; give 2 multiples of 16"),
        (("--unet_channels", "64"), "--unet_channels is 64; give 2 multiples of 16"),
        (
            ("--unet_channels", "64", "128", "128"),
            "--unet_channels is 64 128 128; give 2 multiples of 16 up to 4096",
        ),
        (
            ("--unet_channels", "16", "32"),
            "--unet_channels is 16 32, and an attention head has 32; give more, or --unet_heads",
        ),
        (("--unet_heads", "2"), "--unet_heads is 2; give 2 numbers, each from 1 to"),
        (("--unet_heads", "2", "0"), "--unet_heads is 2 0; give 2 numbers, each from 1 to"),
        (("--unet_heads", "65", "2"), "the channels of its level (64 128)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_options, "ToyboxConfig", ToyboxConfig)  # not that of `command`
    with pytest.raises(SystemExit, match="2"):
        train.main(["--work", str(tmp_path / "work"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_every_number_of_the_training_has_bounds():
    """But the seed and the crop, which have checks of their own."""
    numbers = {k for k, v in asdict(TrainConfig()).items() if type(v) in (int, float)}
    assert numbers - {"seed", "vae_crop"} == set(BOUNDS)


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        (["record.json", "unet/config.json"], [], "is no model that this trainer wrote"),
        (["model_index.json", "unet/config.json"], ["--overwrite"], "is no model that this"),
        (["model_index.json", "record.json"], [], "holds a model; replace it with --overwrite"),
        (["model_index.json", "record.json", "notes.txt"], ["--overwrite"], "holds notes.txt"),
        ([""], [], "is no model that this trainer wrote"),
        (["../work/mine"], ["--output", "."], "holds .*work; give another folder"),
    ],
)
def test_what_is_in_the_way_is_told_before_the_training(
    files, more, message, tmp_path, monkeypatch, fails
):
    monkeypatch.chdir(tmp_path)
    for name in files:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    options = ["--work", "work", *OPTIONS, *STEPS, "--output", "out", *more]
    monkeypatch.setattr(train, "train_vae", None)
    assert re.search(message, fails(train.main, options).err)
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in files)
    assert not (tmp_path / "work/settings.json").exists()


def test_a_finished_model_is_replaced_when_told_or_in_its_own_work_folder(
    command, model, tmp_path, fails
):
    shutil.copytree(model.parent, tmp_path / "work")
    before = (model / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    own, other = tmp_path / "work/model", tmp_path / "other"
    shutil.copytree(model, other)
    assert {path.name for path in own.iterdir()} == set(OWN)
    (own / "record.json").write_text("{}")
    command(tmp_path / "work", *STEPS)  # nothing is left to train
    assert record_of(own)["train"]["steps"] == 6
    assert (own / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before
    (other / "training.png").unlink()
    told = fails(command, tmp_path / "work", *STEPS, "--output", str(other)).err
    assert "other holds a model; replace it with --overwrite" in told
    assert not (other / "training.png").exists()
    command(tmp_path / "work", *STEPS, "--output", str(other), "--overwrite")
    assert (other / "training.png").is_file()
    (own / "notes.txt").write_text("mine")
    assert "holds notes.txt" in fails(command, tmp_path / "work", *STEPS).err
    assert (own / "notes.txt").read_text() == "mine"


def test_a_model_appears_when_it_is_whole(command, model, tmp_path, monkeypatch):
    """Hues between the named ones are measured before, so that its record has all."""
    shutil.copytree(model.parent, tmp_path / "work")
    shutil.rmtree(tmp_path / "work/model")
    monkeypatch.setattr(train, "measure_between", lambda *_: {"noise": 0.5})

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(folders, "plot_losses", fail)
        command(tmp_path / "work", *STEPS, "--between", "1")
    left = [path.name for path in (tmp_path / "work").iterdir() if "model" in path.name]
    assert left == []
    folder = command(tmp_path / "work", *STEPS, "--between", "1")
    assert record_of(folder)["between"] == [{"noise": 0.5}] * 2


@pytest.mark.parametrize("odds", [("1", "-1", "1"), ("0", "0", "0"), ("nan", "1", "1"), ("1", "2")])
def test_odds_that_are_none_are_refused(odds, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--work", str(tmp_path / "work"), "--count_odds", *odds])
    assert "--count_odds" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_new_unet_of_another_width_on_the_same_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(train_options, "ToyboxConfig", lambda: SHAPE)
    options = (
        "--device", "cpu", "--vae_scenes", "4", "--scenes", "8", "--batch", "4", "--captions", "2",
        "--decoder_steps", "0", "--steps", "2",
    )  # fmt: skip
    train.main(["--work", str(tmp_path / "first"), "--vae_steps", "1", *options])
    wider = ("--unet_channels", "32", "48", "--unet_heads", "2", "3")
    more = ("--vae_steps", "0", "--begin_from", str(tmp_path / "first/model"), *options)
    train.main(["--work", str(tmp_path / "wide"), *more, *wider, "--fresh", "unet"])
    first, wide = (
        StableDiffusionPipeline.from_pretrained(tmp_path / name / "model")
        for name in ("first", "wide")
    )
    assert_same(first.vae, wide.vae)
    assert wide.unet.config.block_out_channels == [32, 48]
    record = json.loads((tmp_path / "wide/model/record.json").read_text())
    assert record["shape"] == json.loads(
        json.dumps(asdict(replace(SHAPE, unet_channels=(32, 48), unet_heads=(2, 3))))
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (("--placeholders", "0.8", "--mixed", "0.4"), "shares of all captions"),
        (("--look_noise", "1.5"), "--look_noise is 1.5"),
        (("--minutes", "1", "--cooldown", "0.6"), "cool-down"),
        (("--cuda_graph",), "are for CUDA"),
    ],
)
def test_settings_of_looks_that_make_no_sense_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--work", str(tmp_path / "work"), "--device", "cpu", *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
