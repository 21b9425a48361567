"""What MIFO computes equals the plain path (benchmarks/plain.py), within 1e-4 in float32."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from thin import batch_loss
from transformers import CLIPTokenizer

import mifo.method.control
from benchmarks import cases, plain, run
from imagelab.boxes import Box
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from imagelab.prompts import encode_ids
from imagelab.sampling import ddim_scheduler, denoise, initial_noise
from mifo.learning.stages import TEXT_TARGETS, UNET_TARGETS
from mifo.learning.views import Batch
from mifo.method.control import BoxControl
from mifo.method.guidance import GuidanceConfig
from mifo.method.layers import supervised_layers
from mifo.method.regions import TokenRoles
from mifo.method.sampling import BoxSampling, guide
from mifo.tokens import add_asset_tokens, embed_as, find_assets, token_roles
from mifo_lora import inject, lora_parameters
from toybox.stable_diffusion.architecture import (
    ToyboxConfig,
    build_scheduler,
    build_text_encoder,
    build_unet,
)

PROMPT = "a photo of <asset0> and <asset1> on the grass"
BOXES = [Box(0.0, 0.2, 0.55, 0.8), Box(0.45, 0.2, 1.0, 0.9)]  # some pixels are in both
SEEDS = [3, 4]


@dataclass
class Case:
    base: StableDiffusion
    ids: list[int]
    rows: torch.Tensor
    tokens: TokenRoles
    text: torch.Tensor  # 2 k d
    noise: torch.Tensor  # b c h w


def toybox_shaped(tokenizer_folder) -> StableDiffusion:
    """Random weights: two levels, 16×16 latents of 12 channels."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ToyboxConfig()
        unet = build_unet(config)
        text_encoder = build_text_encoder(config, tokenizer)
    for module in (unet, text_encoder):
        module.requires_grad_(False).eval()
    return StableDiffusion(tokenizer, text_encoder, None, unet, build_scheduler(), "random", "")


@pytest.fixture(params=["small_sd", "toybox-shaped"])
def case(request, small_sd) -> Case:
    if request.param == "small_sd":
        base = load_base(str(small_sd))
    else:
        base = toybox_shaped(small_sd / "tokenizer")
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, 2)
    width = base.text_encoder.config.hidden_size
    rows = 0.02 * torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    prompts = torch.stack([encode_ids(base.tokenizer, text) for text in ("", PROMPT)])
    with embed_as(base.text_encoder, ids, rows), torch.no_grad():
        text = base.text_encoder(prompts).last_hidden_state
    subjects = [[at] for _, at in find_assets(base.tokenizer, PROMPT, range(2))]
    tokens = token_roles(base.tokenizer, PROMPT, subjects)
    side = base.unet.config.sample_size
    noise = initial_noise((base.unet.config.in_channels, side, side), SEEDS)
    return Case(base, ids, rows, tokens, text, noise)


@pytest.fixture(params=["groups", "masks"])
def bounds(request, monkeypatch) -> None:
    """Both forms of bounded self-attention, whatever the number of pixels."""
    pixels = {"groups": 1, "masks": 1 << 30}[request.param]
    monkeypatch.setattr(mifo.method.control, "GROUPED_PIXELS", pixels)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def both_controls(case: Case):
    unet, size = case.base.unet, tuple(case.noise.shape[-2:])
    ours = BoxControl(unet, case.tokens, BOXES, size, SEEDS)
    return ours, plain.Control(unet, case.tokens, BOXES, size)


def test_guidance_moves_the_latents_alike(case, bounds):
    config = GuidanceConfig(guidance_iterations=2, loss_threshold=0)
    ours, theirs = both_controls(case)
    timestep = torch.tensor(901)
    guided = guide(case.base, ours, case.noise, timestep, case.text[1:], 1, config)
    plain.require_gradients(case.base)
    expected = plain.guide(theirs, case.noise, timestep, case.text, 1, config)
    assert_equal(guided - case.noise, expected - case.noise)


def test_an_image_whose_loss_is_low_enough_stops_alone(case):
    """The threshold lies between the two images' losses."""
    ours, theirs = both_controls(case)
    timestep, seen = torch.tensor(901), []
    once = GuidanceConfig(guidance_iterations=1, loss_threshold=0)
    guide(case.base, ours, case.noise, timestep, case.text[1:], 1, once, seen.append)
    config = GuidanceConfig(guidance_iterations=2, loss_threshold=seen[0].loss.mean().item() / 2)
    guided = guide(case.base, ours, case.noise, timestep, case.text[1:], 1, config)
    expected = plain.guide(theirs, case.noise, timestep, case.text, 1, config)
    assert_equal(guided - case.noise, expected - case.noise)


def paint_both(case: Case, steps: int, config: GuidanceConfig):
    ours, theirs = both_controls(case)
    given = (case.noise, case.text, steps, 7.5)
    sampling = BoxSampling(case.base, ours, case.text[1:], steps, config)
    scheduler = ddim_scheduler(case.base.scheduler)
    painted = denoise(case.base, *given, sampling)
    return painted, plain.denoise(scheduler, *given, theirs, config, SEEDS)


def test_a_denoising_step(case, bounds):
    assert_equal(*paint_both(case, 1, GuidanceConfig(guidance_steps=0)))


def test_a_synthesis_with_guidance_and_refined_regions(case, monkeypatch):
    """The finest level goes by groups, each image its own; the others by masks."""
    monkeypatch.setattr(mifo.method.control, "GROUPED_PIXELS", 256)
    config = GuidanceConfig(guidance_steps=1, guidance_iterations=1, refine_every=1)
    assert_equal(*paint_both(case, 3, config))


def learning_batch(case: Case, stage: int) -> Batch:
    draw = torch.Generator().manual_seed(5)
    shape = (stage, *case.noise.shape[1:])  # stage 2: a class sample, then the view
    side = 8 * shape[-1]
    masks = torch.zeros(2, side, side)
    masks[0, : side // 2, : side // 3] = 1
    masks[1, side // 3 :, side // 2 :] = 1
    prompts = ["a photo of a chair", "a photo of <asset1> and <asset0>"][-stage:]
    ids = torch.stack([encode_ids(case.base.tokenizer, prompt) for prompt in prompts])
    return Batch(
        latents=torch.randn(shape, generator=draw),
        noise=torch.randn(shape, generator=draw),
        timesteps=torch.tensor([700, 300][-stage:]),
        input_ids=ids,
        masks=masks,
        positions=[ids[-1].tolist().index(case.ids[asset]) for asset in (1, 0)],
    )


@pytest.mark.parametrize(
    ("stage", "attention_loss"), [(1, "reward"), (1, "penalty"), (2, "penalty")]
)
def test_a_learning_step(case, stage, attention_loss):
    base, batch = case.base, learning_batch(case, stage)
    rows = case.rows.clone().requires_grad_()
    trained = [rows]
    if stage == 2:
        for module, targets in ((base.unet, UNET_TARGETS), (base.text_encoder, TEXT_TARGETS)):
            inject(module, targets, 2, generator=torch.Generator().manual_seed(2))
            trained += lora_parameters(module)
    layers = supervised_layers(base.unet, tuple(batch.latents.shape[-2:]), stage)
    with embed_as(base.text_encoder, case.ids, rows):
        ours = batch_loss(base, batch, layers, attention_loss).total
        gradients = torch.autograd.grad(ours, trained)
        plain.require_gradients(base)
        theirs = plain.learning_loss(base, batch, layers, attention_loss)
        expected = torch.autograd.grad(theirs, trained)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert_equal(gradients[0], expected[0])
    assert_equal(*(torch.cat([g.flatten() for g in part]) for part in (gradients, expected)))


def test_the_picture_is_encoded_anew_or_once_alike(small_sd):
    from mifo.learning.instance import Instance
    from mifo.learning.views import Views

    base = load_base(str(small_sd))
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    masks = np.ones((1, 128, 128), bool)
    instance = Instance("random", small_sd, image, masks, (128, 128), ("",), "", ())
    views = Views(base, instance, [0], "cpu", seed=0)
    fresh = plain.FreshMoments(base, image)
    for flip in (0, 1):
        for ours, theirs in zip(views.moments[flip], fresh[flip], strict=True):
            assert_equal(ours, theirs)


def test_the_benchmark_writes_what_it_measured(small_sd, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "TINY_SD", small_sd)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    what = ["--what", "guidance", "learning", "--subjects", "3", "--steps", "1", "--repeats", "1"]
    threads = str(torch.get_num_threads())
    run.main(["--device", "cpu", "--model", "tiny_sd", *what, "--threads", threads])
    numbers = json.loads((tmp_path / "latest.json").read_text())
    assert [row["what"] for row in numbers["rows"]] == ["guidance", "learning"]
    for row in numbers["rows"]:
        assert row["plain"]["bytes"] > row["ours"]["bytes"] > 5e6  # the weights alone are 5 MB
        assert row["ours"]["operations"] > 1e8
        assert row["ours"]["seconds"] > row["floor"] > 0
    assert "| tiny_sd | guidance | 3 | 1 | fp32 |" in capsys.readouterr().out
    assert (tmp_path / "latest.png").stat().st_size > 0
