"""The command that trains toybox: what it writes, goes on from, and refuses."""

import json
import signal
from dataclasses import asdict, replace

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_toybox import CONFIG, SHAPE, assert_same

from imagelab.training.checkpoint import read_checkpoint
from toybox.stable_diffusion import options as train_options
from toybox.stable_diffusion import train
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
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--work", str(tmp_path / "work"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


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
