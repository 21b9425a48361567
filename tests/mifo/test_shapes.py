"""Every shape of Stable Diffusion 1 and 2 learns and synthesises, as thin random models."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from thin import batch_loss, thin_pipeline, thin_scheduler, thin_unet

from imagelab.boxes import Box
from imagelab.errors import UserError
from imagelab.models.stable_diffusion import load_base
from imagelab.prompts import encode_ids
from imagelab.sampling import denoise, initial_noise
from mifo.learning.views import Views
from mifo.method.control import BoxControl
from mifo.method.guidance import GuidanceConfig
from mifo.method.layers import decoder_block, supervised_layers
from mifo.method.sampling import BoxSampling
from mifo.tokens import add_asset_tokens, embed_as, find_assets, initial_rows, token_roles


def sd_1() -> tuple:
    """Stable Diffusion 1.x: as many heads at every level, 1×1 convolutions as projections."""
    unet = thin_unet(attention_head_dim=8, use_linear_projection=False, cross_attention_dim=24)
    return unet, PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def sd_2_base() -> tuple:
    """Stable Diffusion 2.1 base: heads of one width, linear projections, 512 px scaled to 128."""
    return thin_unet(attention_head_dim=[1, 2, 4, 4], cross_attention_dim=32), thin_scheduler()


def sd_2_768() -> tuple:
    """Stable Diffusion 2.1: predicts the velocity, 768 px scaled to 192."""
    unet = thin_unet(
        attention_head_dim=[1, 2, 4, 4], cross_attention_dim=32, sample_size=24,
        upcast_attention=True,
    )  # fmt: skip
    return unet, thin_scheduler(prediction_type="v_prediction")


@pytest.fixture(scope="module", params=[sd_1, sd_2_base, sd_2_768])
def shape(request, tiny_sd, tmp_path_factory):
    """A loaded model of one shape with two assets, and their ids."""
    folder = tmp_path_factory.mktemp("shapes") / request.param.__name__
    thin_pipeline(tiny_sd / "tokenizer", *request.param()).save_pretrained(folder)
    base = load_base(str(folder))
    return base, add_asset_tokens(base.tokenizer, base.text_encoder, 2)


#: How many cross layers of which blocks each stage supervises, by levels of the UNet and stage.
SUPERVISED = {
    (2, 1): {"up_blocks.1": 2},
    (2, 2): {"down_blocks.0": 1, "up_blocks.1": 2},
    (3, 1): {"up_blocks.1": 2, "up_blocks.2": 2},
    (3, 2): {"down_blocks.1": 1, "up_blocks.1": 2},
    (4, 1): {"up_blocks.1": 2, "up_blocks.2": 2},
    (4, 2): {"down_blocks.2": 1, "up_blocks.1": 2},
}


def blocks(layers) -> dict[str, int]:
    assert all(name.endswith("attn2") for name in layers)
    return Counter(".".join(name.split(".")[:2]) for name in layers)


def test_decoder_block():
    assert decoder_block(thin_unet()) == "up_blocks.1."


def test_a_unet_without_attention_in_its_decoder_is_refused():
    plain = thin_unet(2, up_block_types=("UpBlock2D",) * 2)
    with pytest.raises(UserError, match=r"no attention in up_blocks\.1.*Stable Diffusion 1 or 2"):
        decoder_block(plain)


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_supervised_layers_by_depth(levels, stage):
    assert (
        blocks(supervised_layers(thin_unet(levels), (12, 20), stage)) == SUPERVISED[levels, stage]
    )


def views_of(base, ids) -> Views:
    side = base.resolution
    draw = np.random.default_rng(0)
    masks = np.zeros((2, side, side), dtype=bool)
    masks[0, : side // 2, : side // 2] = masks[1, side // 2 :, side // 2 :] = True
    image = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Views(base, SimpleNamespace(image=image, masks=masks), ids, "cpu", seed=0)


@pytest.mark.parametrize(("stage", "loss"), [(1, "reward"), (1, "penalty"), (2, "penalty")])
def test_every_shape_learns(shape, stage, loss):
    base, ids = shape
    side = base.unet.config.sample_size
    layers = supervised_layers(base.unet, (side, side), stage)
    assert blocks(layers) == SUPERVISED[4, stage]
    draw = torch.Generator().manual_seed(0)
    prior = torch.randn(1, 4, side, side, generator=draw) if stage == 2 else None
    batch = views_of(base, ids).draw(stage, 0, prior, "a photo of a chair")
    batch.timesteps[-1] = 300
    rows = torch.nn.Parameter(initial_rows(base.tokenizer, base.text_encoder, ids, (), seed=0))
    with embed_as(base.text_encoder, ids, rows):
        result = batch_loss(base, batch, layers, loss)
        result.total.backward()
    assert result.total.isfinite() and rows.grad.isfinite().all()
    assert len(result.attention) == len(layers) * len(batch.positions)
    assert (result.prior is not None) == (stage == 2)
    in_prompt = {int(batch.input_ids[-1, at]) for at in batch.positions}
    assert rows.grad.any(dim=1).tolist() == [token in in_prompt for token in ids]


def test_the_target_is_what_the_model_predicts(shape):
    """Noise, or the velocity √ᾱ·ε − √(1−ᾱ)·x of a v-prediction model."""
    base, ids = shape
    batch = views_of(base, ids).draw(1, 1)
    batch.masks = torch.ones_like(batch.masks)
    with torch.no_grad():
        loss = batch_loss(base, batch, [])
        kept = base.scheduler.alphas_cumprod[batch.timesteps[0]]
        noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
        text = base.text_encoder(batch.input_ids).last_hidden_state
        predicted = base.unet(noisy, batch.timesteps, text).sample
    velocity = kept.sqrt() * batch.noise - (1 - kept).sqrt() * batch.latents
    predicts_velocity = base.scheduler.config.prediction_type == "v_prediction"
    target = velocity if predicts_velocity else batch.noise
    assert loss.total.item() == pytest.approx((predicted - target).square().mean().item(), rel=1e-5)


def test_every_shape_synthesises(shape):
    base, ids = shape
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, (), seed=0)
    prompt = "a photo of <asset0> and <asset1> on the grass"
    with torch.no_grad(), embed_as(base.text_encoder, ids, rows):
        both = torch.stack([encode_ids(base.tokenizer, words) for words in ("", prompt)])
        text = base.text_encoder(both).last_hidden_state
    subjects = [[at] for _, at in find_assets(base.tokenizer, prompt, range(2))]
    tokens = token_roles(base.tokenizer, prompt, subjects)
    side = base.unet.config.sample_size
    noise = initial_noise((4, side, side), [5])
    boxes = [Box(0, 0.25, 0.5, 0.75), Box(0.5, 0.25, 1, 0.75)]
    control = BoxControl(base.unet, tokens, boxes, (side, side), [5])
    config = GuidanceConfig(guidance_steps=2, guidance_iterations=1, refine_every=1)
    steps, guided = [], []
    sampling = BoxSampling(base, control, text[1:], 3, config, guided.append)

    def on_step(step):
        steps.append((step.number, control.regions.at(*control.map_grid)))

    latents = denoise(base, noise, text, 3, 7.5, sampling, on_step)
    assert latents.isfinite().all() and latents.shape == noise.shape
    assert [step for step, _ in steps] == [0, 1, 2]
    assert [seen.step for seen in guided] == [0, 1]
    assert all(seen.loss.isfinite().all() and seen.loss > 0 for seen in guided)
    assert control.map_grid == (side // 4, side // 4)
    assert steps[-1][1].any(dim=-1).all()  # every subject has a region after refinement
