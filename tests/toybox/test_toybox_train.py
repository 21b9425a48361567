"""Training toybox, very small: it learns, and an interruption changes nothing."""

import copy
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from thin import free_port
from tiny_toybox import CONFIG, SHAPE, SHORT, assert_same, ctrl_c_in_step, pictures_of

from imagelab.processes import Processes
from imagelab.training.checkpoint import read_checkpoint, read_curves
from imagelab.training.interrupt import Interrupted
from toybox.scenes.scenes import caption
from toybox.stable_diffusion import data as toybox_data
from toybox.stable_diffusion.architecture import build_pipeline, build_tokenizer
from toybox.stable_diffusion.batches import generator
from toybox.stable_diffusion.data import MAX_TOYS, encode_scenes, scene_of
from toybox.stable_diffusion.folders import check_work
from toybox.stable_diffusion.loss import grounding_loss, timestep_weights
from toybox.stable_diffusion.stages import lr_factor
from toybox.stable_diffusion.training import Run, train_decoder, train_unet, train_vae

pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the UNet learns from: latents, their scale, a tokenizer and the autoencoder."""
    folder = tmp_path_factory.mktemp("data")
    run = Run(CONFIG, SHAPE, folder)
    vae, course = train_vae(run, pictures_of(run))
    rng = np.random.default_rng(0)
    texts = [caption(scene_of(CONFIG, index), rng).text for index in range(400)]
    tokenizer = build_tokenizer(texts, folder)
    encoded = encode_scenes(vae, CONFIG, SHAPE, folder / "latents.safetensors", tokenizer)
    return folder, vae, course, encoded, 1 / encoded["latents"].float().std().item(), tokenizer


def fall(losses: list[float]) -> float:
    """The mean of the last five losses over that of the first five."""
    return float(np.mean(losses[-5:]) / np.mean(losses[:5]))


def test_20_steps_lower_the_autoencoders_loss(data):
    _, vae, course, *_ = data
    assert len(course.losses) == 20
    assert fall(course.losses) < 0.8
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_20_steps_of_the_decoder_lower_its_loss_and_leave_the_latents(data, tmp_path):
    vae, run = copy.deepcopy(data[1]), Run(CONFIG, SHAPE, tmp_path)
    course = train_decoder(run, vae, pictures_of(run))
    assert len(course.losses) == 20
    assert fall(course.losses) < 0.9
    assert_same(vae.encoder, data[1].encoder)
    assert_same(vae.quant_conv, data[1].quant_conv)
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_20_steps_lower_the_unets_loss(data, tmp_path):
    _, vae, _, encoded, scale, tokenizer = data
    trained = train_unet(Run(CONFIG, SHAPE, tmp_path), encoded, scale, tokenizer)
    assert len(trained.course.losses) == 20
    assert fall(trained.course.losses) < 0.8
    pipeline = build_pipeline(vae, trained.text_encoder, tokenizer, trained.unet)
    [picture] = pipeline("a red car", num_inference_steps=2, output_type="np").images
    assert picture.shape == (32, 32, 3)
    assert np.isfinite(picture).all()


def test_timestep_weights_are_min_snr_s_and_spare_the_noisiest_steps():
    weights = timestep_weights(torch.tensor([20.0, 5.0, 2.0, 1.0, 0.25, 0.01]), most=5.0)
    expected = torch.tensor([0.25, 1, 1, 1, 2, 10])
    assert torch.allclose(weights, expected / expected.mean())


def test_an_interrupted_autoencoder_ends_as_an_unbroken_one(tmp_path):
    alone, broken = Run(SHORT, SHAPE, tmp_path / "alone"), Run(SHORT, SHAPE, tmp_path / "broken")
    unbroken, whole = train_vae(alone, pictures_of(alone))
    with ctrl_c_in_step(2):
        train_vae(broken, pictures_of(broken))
    assert read_curves(broken.work / "autoencoder.safetensors") == {"loss": whole.losses[:3]}
    resumed, course = train_vae(broken, pictures_of(broken))
    assert course.losses == whole.losses
    assert_same(resumed, unbroken)


def test_an_interrupted_decoder_ends_as_an_unbroken_one(data, tmp_path):
    alone, run = Run(SHORT, SHAPE, tmp_path / "alone"), Run(SHORT, SHAPE, tmp_path / "broken")
    unbroken, broken, resumed = (copy.deepcopy(data[1]) for _ in range(3))
    whole = train_decoder(alone, unbroken, pictures_of(alone))
    with ctrl_c_in_step(2):
        train_decoder(run, broken, pictures_of(run))
    assert train_decoder(run, resumed, pictures_of(run)).losses == whole.losses
    assert_same(resumed, unbroken)


def test_an_interrupted_unet_ends_as_an_unbroken_one(data, tmp_path):
    *_, encoded, scale, tokenizer = data
    whole = train_unet(Run(SHORT, SHAPE, tmp_path / "alone"), encoded, scale, tokenizer)
    broken = Run(SHORT, SHAPE, tmp_path / "broken")
    with ctrl_c_in_step(2):
        train_unet(broken, encoded, scale, tokenizer)
    resumed = train_unet(broken, encoded, scale, tokenizer)
    assert resumed.course.losses == whole.course.losses
    assert_same(resumed.unet, whole.unet)
    assert_same(resumed.text_encoder, whole.text_encoder)
    assert [path.name for path in broken.work.iterdir()] == ["unet.safetensors"]


def test_a_loss_that_is_not_finite_ends_the_training_and_spoils_nothing(tmp_path):
    run = Run(replace(SHORT, vae_steps=3), SHAPE, tmp_path)
    train_vae(run, pictures_of(run))
    before = (tmp_path / "autoencoder.safetensors").read_bytes()
    run = Run(replace(SHORT, kl_weight=float("nan")), SHAPE, tmp_path)
    with pytest.raises(FloatingPointError, match="not finite at step 3 of autoenc.*learning rate"):
        train_vae(run, pictures_of(run))
    assert (tmp_path / "autoencoder.safetensors").read_bytes() == before


def test_a_work_folder_keeps_to_its_settings(tmp_path):
    def check(start=None, **settings):
        check_work(Run(replace(CONFIG, **settings), SHAPE, tmp_path / "work"), start)

    check()
    check(steps=40)
    with pytest.raises(ValueError, match=r"other settings \(lr\); give another --work"):
        check(lr=1e-4)
    with pytest.raises(ValueError, match="begin_from"):
        check(tmp_path)


# ----------------------------------------------------------------------------------------------
# two processes


def train_in_process(index, port, data_folder, folder):
    """One of two processes that train together; in the second one Ctrl-C is pressed once."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(
        WORLD_SIZE="2", RANK=str(index), LOCAL_RANK=str(index),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    run = Run(SHORT, SHAPE, folder, Processes("cpu"))
    vae, _ = train_vae(run, pictures_of(run))
    train_decoder(run, vae, pictures_of(run))
    tokenizer = build_tokenizer([], data_folder)
    encoded = encode_scenes(vae, CONFIG, SHAPE, data_folder / "latents.safetensors", tokenizer)
    scale = 1 / encoded["latents"].float().std().item()
    with ctrl_c_in_step(1) if index == 1 else pytest.raises(Interrupted):
        train_unet(run, encoded, scale, tokenizer)
    run.processes.gather(None)  # until the first one has saved
    assert read_checkpoint(folder / "unet.safetensors").step == 2
    train_unet(run, encoded, scale, tokenizer)
    run.processes.leave()


def test_two_processes_train_as_one_and_stop_together(data, tmp_path):
    """With the grounding loss, which is a mean over the nouns of the whole batch."""
    data_folder, *_, encoded, scale, tokenizer = data
    assert SHORT.grounding_weight > 0
    one, two = tmp_path / "one", tmp_path / "two"
    shared = (free_port(), data_folder, two)
    torch.multiprocessing.start_processes(train_in_process, shared, nprocs=2, start_method="fork")
    run = Run(SHORT, SHAPE, one)
    vae, _ = train_vae(run, pictures_of(run))
    train_decoder(run, vae, pictures_of(run))
    train_unet(run, encoded, scale, tokenizer)
    for name in ("autoencoder", "decoder", "unet"):
        alone, shared = (read_curves(folder / f"{name}.safetensors") for folder in (one, two))
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)


# ----------------------------------------------------------------------------------------------
# its pieces


def test_every_seed_has_a_generator():
    assert generator(3, 2).initial_seed() == 3_000_011
    seeds = {generator(seed, step).initial_seed() for seed in (0, 2**63 - 1) for step in (0, 1)}
    assert len(seeds) == 4


def test_latents_are_encoded_once(data, monkeypatch):
    folder, vae, _, encoded, _, tokenizer = data
    assert encoded["latents"].shape == (24, 4, 8, 8)
    assert encoded["coverage"].shape == (24, MAX_TOYS, 8, 8)
    monkeypatch.setattr(toybox_data, "render", None)
    again = encode_scenes(vae, CONFIG, SHAPE, folder / "latents.safetensors", tokenizer)
    assert all(torch.equal(again[key], encoded[key]) for key in encoded)


def test_every_word_of_a_caption_is_one_token(data):
    tokenizer = data[-1]
    worded = caption(scene_of(CONFIG, 3), np.random.default_rng(0))
    ids = tokenizer(worded.text, padding="max_length").input_ids
    words = worded.text.split()
    assert tokenizer.convert_ids_to_tokens(ids)[1 : 1 + len(words)] == [w + "</w>" for w in words]
    assert len(ids) == 77
    assert ids[-1] == 0


def test_grounding_loss_by_hand():
    maps = torch.tensor([[[0.0, 0.6], [0.0, 0.2], [0.0, 0.1], [0.0, 0.1]]])  # [1, 4 pixels, 2]
    coverage = torch.tensor([[[[1.0, 0.0], [0.0, 0.5]]]])  # [1, 1 toy, 2, 2]
    # token 1 has 0.6·1 + 0.1·0.5 of its total of 1.0 on the toy, which covers 1.5 pixels
    expected = -np.log(0.65) - np.log(2 * 0.65 / 1.5)
    first, toy, one = torch.tensor([[1]]), torch.ones(1, 1), torch.tensor(1.0)
    assert grounding_loss([maps], coverage, first, toy, one).item() == pytest.approx(expected)
    assert grounding_loss([maps], coverage, first, toy, 4 * one).item() == pytest.approx(
        expected / 4
    )
    assert grounding_loss([maps], coverage, first, 0 * toy, one).item() == 0
    # token 0 reigns on the second pixel; more than half is not asked for
    maps[0, 1, 0] = 0.9
    coverage = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    start = torch.tensor([[0]])
    assert grounding_loss([maps], coverage, start, toy, one).item() == pytest.approx(0, abs=1e-6)


def test_learning_rate_warms_up_and_cools_down():
    factors = [lr_factor(step, 100, 10, 0.25) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:76] == pytest.approx([1.0] * 66)
    assert factors[87] == pytest.approx(0.01 + 0.99 * (0.5 - 0.5 * np.cos(np.pi * 13 / 25)))
    assert factors[76:] == sorted(factors[76:], reverse=True)
    assert factors[-1] < 0.02
