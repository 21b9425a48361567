"""Synthesis equals the arrays computed with the authors' release (tests/golden)."""

import numpy as np
import pytest
import torch
from conftest import load_golden
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from imagelab.boxes import Box
from mifo.method.guidance import GuidanceConfig
from mifo.method.losses import box_alpha, box_loss
from mifo.method.regions import (
    RegionSet,
    assign_clusters,
    box_regions,
    normalise_columns,
    soft_masks,
)
from mifo.method.sampling import box_control, ddim_scheduler, denoise
from mifo.tokens import add_asset_tokens, find_assets, lend_rows, token_roles
from imagelab.prompts import encode_ids

PROMPT = "a photo of <asset0> and <asset1> on the grass"


@pytest.fixture(scope="module")
def golden():
    return load_golden("golden_synthesis")


@pytest.fixture(scope="module")
def run(golden, tiny_sd):
    """The whole run of 20 steps, everything it computed by name."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet").requires_grad_(False).eval()
    scheduler = ddim_scheduler(DDIMScheduler.from_pretrained(tiny_sd / "scheduler"))
    ids = add_asset_tokens(tokenizer, text_encoder, 3)
    with lend_rows(text_encoder, ids, golden["asset_embeddings"]), torch.no_grad():
        both = torch.stack([encode_ids(tokenizer, text) for text in ("", PROMPT)])
        text = text_encoder(both).last_hidden_state
    subjects = [[at] for _, at in find_assets(tokenizer, PROMPT, range(3))]
    tokens = token_roles(tokenizer, PROMPT, subjects)
    boxes = [Box(*map(float, box)) for box in golden["boxes"]]
    latents = golden["initial_latents"]
    control = box_control(unet, tokens, boxes, latents, seeds=[0])
    steps, guided, regions = [], [], []

    def on_step(step, computed):
        steps.append(computed)
        regions.append(control.regions)

    denoise(
        unet, scheduler, latents, text, 20, 7.5, control, GuidanceConfig(), on_step, guided.append
    )
    return {
        "ids": both[1],
        "tokens": tokens,
        "boxes": boxes,
        "steps": steps,
        "guided": guided,
        "regions": regions,
        "control": control,
    }


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs() / theirs.abs().clamp_min(1e-12)).max().item()


def hidden(golden, name: str) -> torch.Tensor:
    shape = golden[f"shape_{name}"].tolist()
    return torch.from_numpy(np.unpackbits(golden[name].numpy(), axis=-1)[..., : shape[-1]]).bool()


def test_prompt(golden, run):
    assert torch.equal(run["ids"], golden["input_ids"][0])
    assert [list(s) for s in run["tokens"].subjects] == golden["subject_token_indices"].tolist()
    assert list(run["tokens"].filtered) == sorted(golden["filter_token_indices"].tolist())
    assert run["tokens"].end == golden["eos_token_index"]


@pytest.mark.parametrize("side", [32, 16, 8, 4])
def test_box_masks(golden, run, side):
    regions = RegionSet(run["boxes"], run["tokens"])
    assert torch.equal(regions.self_mask(side, side), hidden(golden, f"mask_self_{side}"))
    for phase, guidance in (("guidance", True), ("denoise", False)):
        ours = regions.cross_mask(side, side, guidance)
        assert torch.equal(ours, hidden(golden, f"mask_cross_{phase}_{side}"))


@pytest.mark.parametrize("side", [32, 16, 8, 4])
def test_refined_masks_given_the_golden_regions(golden, run, side):
    refined = golden["subject_masks"][0].unflatten(-1, (8, 8))
    regions = RegionSet(refined, run["tokens"])
    for step in range(15, 20):
        theirs = hidden(golden, f"mask_cross_refined_{side}_step{step}")
        assert torch.equal(regions.cross_mask(side, side, guidance=False), theirs)
        if side < 32:
            theirs = hidden(golden, f"mask_self_{side}_refined_step{step}")
            assert torch.equal(regions.self_mask(side, side), theirs)


def test_masses_and_losses(golden, run):
    names = {
        "cross_foreground": lambda g: g.cross[0],
        "cross_background": lambda g: g.cross[1],
        "self_foreground": lambda g: g.self_[0],
        "self_background": lambda g: g.self_[1],
    }
    for name, of in names.items():
        ours = torch.stack([of(g) for g in run["guided"]])
        assert relative(ours, golden[name]) < 1e-5, name
    ours = torch.stack([g.loss for g in run["guided"]]).double()
    assert relative(ours[:, 0], golden["loss"]) < 1e-5
    assert relative(ours[:, 0] / 2, golden["normalized_loss"]) < 1e-5


def test_loss_given_the_golden_masses(golden):
    for call in range(75):
        masses = [
            golden[f"{k}_{m}"][call]
            for k in ("cross", "self")
            for m in ("foreground", "background")
        ]
        ours = box_loss(tuple(masses[:2]), tuple(masses[2:]), box_alpha(call // 5))
        assert relative(ours.double(), golden["loss"][call, None]) < 1e-6


def test_alpha(golden):
    # Two of the release's calls of a step's five iterations read alpha: ten a step.
    ours = torch.tensor([box_alpha(call // 10) for call in range(150)], dtype=torch.float64)
    assert torch.allclose(ours, golden["alpha_per_call"], atol=1e-7)


def test_latents_of_guided_steps(golden, run):
    for step in range(15):
        computed = run["steps"][step]
        for ours, theirs in (
            ("guided", "latents_after_guidance"),
            ("latents", "latents_after_step"),
        ):
            assert torch.allclose(computed[ours], golden[theirs][step], atol=1e-4, rtol=1e-4)
        scale = golden["noise_prediction"][step].abs().max()
        error = (computed["predicted"] - golden["noise_prediction"][step]).abs().max()
        assert error < 1e-4 * scale


def test_refined_regions_given_the_golden_clusters(golden, run):
    cross = golden["mean_cross_map"][0, 0]
    boxes = box_regions(run["boxes"], 8, 8)[0].flatten(1)
    soft = soft_masks(normalise_columns(cross), boxes)
    ours = assign_clusters(golden["cluster_labels"][0, 0], soft, boxes, clusters=6)
    assert torch.equal(ours, golden["subject_masks"][0, 0])
