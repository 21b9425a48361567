"""Where learned assets look, and how well they part: on maps by hand and a second computation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import attention_of
from thin import thin_pipeline, thin_scheduler, thin_unet
from torch.nn import functional as F

from imagelab.models.stable_diffusion import load_base
from mifo.learning.inspection import asset_maps, separation
from mifo.learning.views import Views
from mifo.tokens import add_asset_tokens, write_rows

#: What works at decoder-1's resolution in a UNet of three levels.
LAYERS = [
    f"{block}.transformer_blocks.0.attn2"
    for block in (
        "down_blocks.1.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
]


def test_separation_is_the_share_of_an_assets_attention_on_its_own_instance():
    maps = torch.tensor([[[3.0, 3.0, 1.0, 9.0]], [[0.0, 0.0, 2.0, 9.0]]])
    masks = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 0]]], dtype=bool)  # the last pixel is background
    # asset 0: a mean of 3 on its own, 1 on the other; asset 1: 0 on the other, 2 on its own
    assert separation(maps, masks) == pytest.approx([3 / 4, 1.0])


def test_separation_goes_by_density_not_by_size():
    """Even attention is worth ½, however small the instance."""
    masks = np.array([[[1, 0, 0, 0]], [[0, 1, 1, 1]]], dtype=bool)
    assert separation(torch.ones(2, 1, 4), masks) == pytest.approx([0.5, 0.5])


def test_attention_on_no_instance_is_no_separation():
    masks = np.array([[[1, 0]], [[1, 0]]], dtype=bool)
    assert separation(torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]), masks) == [0.0, 0.5]


@pytest.fixture(scope="module")
def views(tiny_sd, tmp_path_factory) -> Views:
    """Views of three assets, whose rows are in the table, over a picture of 192×128 pixels."""
    folder = tmp_path_factory.mktemp("inspection")
    pipeline = thin_pipeline(tiny_sd / "tokenizer", thin_unet(3), thin_scheduler())
    pipeline.save_pretrained(folder)
    model = load_base(str(folder))
    ids = add_asset_tokens(model.tokenizer, model.text_encoder, 3)
    write_rows(model.text_encoder, ids, torch.eye(16)[:3])
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    masks = np.ones((3, 128, 192), dtype=bool)
    return Views(model, SimpleNamespace(image=image, masks=masks), ids, "cpu", seed=0)


def test_the_map_of_an_asset_is_its_own_tokens_attention(views):
    """Over the picture as it is, unmirrored, noised to timestep 300; mean over the layers."""
    model = views.model
    latents = views.moments[0, 0][None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    kept = model.scheduler.alphas_cumprod[300]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    prompt = "a photo of <asset0> and <asset1> and <asset2>"
    ids = model.tokenizer(
        prompt, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad(), attention_of(model.unet, LAYERS) as seen:
        text = model.text_encoder(ids).last_hidden_state
        model.unet(noisy, torch.tensor([300]), text)
    mean = sum(seen[name][0] for name in LAYERS) / 3
    wanted = mean[:, [4, 6, 8]].T.reshape(1, 3, 8, 12)
    wanted = F.interpolate(wanted, (128, 192), mode="bilinear")[0]
    maps = asset_maps(model, views, 3)
    torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-6)
    assert (maps[0] - maps[1]).abs().max() > 1e-3 and (maps[1] - maps[2]).abs().max() > 1e-3


def test_inspecting_twice_gives_the_same_and_leaves_no_processor(views):
    before = dict(views.model.unet.attn_processors)
    first = asset_maps(views.model, views, 3)
    torch.manual_seed(3)
    assert torch.equal(asset_maps(views.model, views, 3), first)
    assert views.model.unet.attn_processors == before
