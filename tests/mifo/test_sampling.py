"""The sampler: equal to diffusers where boxes play no part, and no image depends on another."""

from weakref import WeakSet

import pytest
import torch
from diffusers import StableDiffusionPipeline
from thin import BOXES, TOKENS, thin_pipeline, thin_scheduler, thin_unet

from imagelab.attention import attention_layers
from mifo.method import sampling
from mifo.method.guidance import GuidanceConfig
from mifo.method.regions import TokenRoles
from mifo.method.sampling import (
    box_control,
    ddim_scheduler,
    denoise,
    guide,
    initial_noise,
    scaled_gradient,
    step_size,
)

#: guidance in steps 0 and 1, refined regions from step 2 and anew from step 4
CONFIG = GuidanceConfig(guidance_steps=2, guidance_iterations=2, refine_every=2, loss_threshold=0)
UNREFINED = GuidanceConfig(guidance_steps=1, guidance_iterations=1, refine_every=0)
STEPS = 6
SHAPE, GRID = (4, 8, 12), (4, 6)


@pytest.fixture(scope="module")
def unet():
    """Three levels: the decoder's first block works at 4×6 for latents of 8×12.

    Its queries are enlarged, so that attention depends on the image, and refined regions with it.
    """
    unet = thin_unet(3, seed=3)
    for layer in attention_layers(unet).values():
        layer.to_q.weight.mul_(6)
    return unet


@pytest.fixture(scope="module")
def text():
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def paint(unet, text, seeds, config=CONFIG, boxes=BOXES, tokens=TOKENS, watch=None, **more):
    latents = initial_noise(SHAPE, seeds)
    control = box_control(unet, tokens, boxes, latents, seeds)
    scheduler = ddim_scheduler(thin_scheduler())
    return denoise(unet, scheduler, latents, text, STEPS, 7.5, control, config, watch=watch, **more)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, in parts of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- pieces ----------------------------------------------------------------------------------


class Kept:
    """What autograd saves for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # else an output would keep its own graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_graph_outlives_its_update(unet, text, dtype, monkeypatch):
    """In fp16, whose backward may be done again with another scale, neither."""
    alive, counts = WeakSet(), []

    def pack(tensor):
        alive.add(kept := Kept(tensor))
        return kept

    def backward(loss, latents, _):
        counts.append(len(alive))
        return scaled_gradient(loss, latents, dtype)

    monkeypatch.setattr(sampling, "scaled_gradient", backward)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        paint(unet, text, [0], watch=lambda _: counts.append(len(alive)))
    assert len(counts) == 8  # before and after two updates in each of two steps
    assert counts[0] > 100 and counts == [counts[0], 0] * 4


def test_noise_of_an_image_is_its_seeds_alone():
    both = initial_noise((4, 6, 10), [5, 6])
    assert both.shape == (2, 4, 6, 10)
    torch.manual_seed(6)
    assert torch.equal(both[1], torch.randn(4, 6, 10))
    assert torch.equal(both[:1], initial_noise((4, 6, 10), [5]))


def test_step_size_falls_toward_its_final_value():
    config = GuidanceConfig()
    sizes = [step_size(step, config) for step in (0, 5, 14)]
    assert sizes == pytest.approx([8, 6, 2.4])


def test_sampler_keeps_the_models_noise_schedule_and_prediction():
    theirs = thin_scheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler = ddim_scheduler(theirs)
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))


# --- without boxes ---------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_without_boxes_it_is_diffusers_pipeline(unet, tiny_sd, prediction):
    scheduler = ddim_scheduler(thin_scheduler(prediction_type=prediction))
    pipeline: StableDiffusionPipeline = thin_pipeline(tiny_sd / "tokenizer", unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(4))
    noise = initial_noise(SHAPE, [5, 6])
    theirs = pipeline(
        prompt_embeds=text[1:].expand(2, -1, -1),
        negative_prompt_embeds=text[:1].expand(2, -1, -1),
        latents=noise.clone(),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        height=64,
        width=96,
        output_type="latent",
    ).images
    ours = denoise(unet, scheduler, noise, text, STEPS, 3.0)
    assert difference(ours, theirs) <= 1e-5
    assert difference(ours, noise) > 0.1


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(unet, text):
    """Images of the seeds 5 and 6, each painted by itself, and how often each was guided."""
    images, guided = [], []
    for seed in (5, 6):
        seen = []
        images.append(paint(unet, text, [seed], watch=seen.append))
        guided.append(seen)
    return torch.cat(images), guided


def test_a_batch_paints_what_its_images_are_alone(unet, text, alone):
    seen, regions = [], []
    latents = initial_noise(SHAPE, [5, 6])
    control = box_control(unet, TOKENS, BOXES, latents, [5, 6])
    together = denoise(
        unet, ddim_scheduler(thin_scheduler()), latents, text, STEPS, 7.5, control, CONFIG,
        on_step=lambda *_: regions.append(control.regions.at(*GRID)), watch=seen.append,
    )  # fmt: skip
    assert difference(together, alone[0]) <= 1e-5
    assert len(seen) == 4  # two steps of two iterations
    # The regions are the boxes first, and each image's own afterwards.
    assert [len(r) for r in regions] == [1, 1, 2, 2, 2, 2]
    assert not torch.equal(regions[2][0], regions[2][1])
    assert not torch.equal(regions[2][0], regions[0][0])


def test_an_image_that_stops_early_does_not_change_another(unet, text, alone):
    """A threshold between the two images' first losses stops one of them at once."""
    first = [seen[0].loss.item() / 2 for seen in alone[1]]
    assert abs(first[0] - first[1]) > 1e-3
    config = GuidanceConfig(
        guidance_steps=2, guidance_iterations=3, refine_every=2, loss_threshold=sum(first) / 2
    )
    seen, apart = [], [[], []]
    together = paint(unet, text, [5, 6], config, watch=seen.append)
    separate = [paint(unet, text, [5 + i], config, watch=apart[i].append) for i in (0, 1)]
    assert difference(together, torch.cat(separate)) <= 1e-5
    stopped = int(first[1] < first[0])
    guided = [[g.step for g in seen if i in g.images] for i in (0, 1)]
    assert guided == [[g.step for g in own] for own in apart]
    assert guided[stopped].count(0) == 1 < guided[1 - stopped].count(0)


def test_the_order_of_subjects_does_not_matter(unet, text, alone):
    swapped = TokenRoles(
        subjects=TOKENS.subjects[::-1],
        filtered=(1, 3),
        end=6,
        length=8,
        leading=TOKENS.leading[::-1],
    )
    assert (
        difference(paint(unet, text, [5], boxes=BOXES[::-1], tokens=swapped), alone[0][:1]) < 1e-5
    )
    crossed = paint(unet, text, [5], boxes=BOXES[::-1])
    assert difference(crossed, alone[0][:1]) > 1e-3


# --- control ---------------------------------------------------------------------------------


def test_boxes_change_the_picture(unet, text, alone):
    scheduler, noise = ddim_scheduler(thin_scheduler()), initial_noise(SHAPE, [5])
    free = denoise(unet, scheduler, noise, text, STEPS, 7.5)
    assert difference(alone[0][:1], free) > 1e-3


def test_guidance_lowers_the_loss_at_every_iteration(unet, text):
    latents = initial_noise(SHAPE, [5, 6])
    control = box_control(unet, TOKENS, BOXES, latents, [5, 6])
    config = GuidanceConfig(guidance_iterations=5, loss_threshold=0)
    seen = []
    before = latents.clone()
    moved = guide(unet, control, latents, torch.tensor(901), text[1:], 0, config, seen.append)
    losses = torch.stack([guided.loss for guided in seen])
    assert losses.shape == (5, 2)
    assert (losses.diff(dim=0) < 0).all()
    assert torch.equal(latents, before) and difference(moved, before) > 0


@pytest.mark.parametrize("slope", [1e-9, 1e-3, 1.0, 3e4])
def test_small_and_large_gradients_survive_fp16(slope):
    """Unscaled, fp16 would make zero of the first; scaled by 2**14, infinity of the last two."""
    latents = torch.tensor([1.0, -2.0], requires_grad=True)
    loss = slope * latents.half().float().sum()
    gradient = scaled_gradient(loss, latents, torch.float16)
    assert gradient == pytest.approx(torch.full((2,), slope), rel=1e-2)
    assert torch.autograd.grad(1e-9 * latents.half().float().sum(), latents)[0].eq(0).all()


def test_a_gradient_beyond_fp16_stays_infinite():
    latents = torch.tensor([1.0], requires_grad=True)
    assert scaled_gradient(1e6 * latents.half().float().sum(), latents, torch.float16).isinf()


def test_guidance_follows_the_gradient_by_its_step_size(unet, text):
    """One iteration twice: a step half as long moves the latents half as far."""
    latents = initial_noise(SHAPE, [5])
    control = box_control(unet, TOKENS, BOXES, latents, [5])
    moves = []
    for size in (8.0, 4.0):
        config = GuidanceConfig(guidance_iterations=1, step_size=size)
        moves.append(
            guide(unet, control, latents, torch.tensor(901), text[1:], 0, config) - latents
        )
    assert moves[0].abs().max() > 1e-3
    assert difference(2 * moves[1], moves[0]) < 1e-3


def test_boxes_stay_the_regions_without_refinement(unet, text):
    latents = initial_noise(SHAPE, [5])
    control = box_control(unet, TOKENS, BOXES, latents, [5])
    regions = control.regions
    scheduler = ddim_scheduler(thin_scheduler())
    denoise(unet, scheduler, latents, text, STEPS, 7.5, control, UNREFINED)
    assert control.regions is regions


def test_nothing_is_left_in_the_unet(unet, text):
    before = [layer.processor for layer in attention_layers(unet).values()]
    paint(unet, text, [5], UNREFINED)
    after = [layer.processor for layer in attention_layers(unet).values()]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_latents_that_are_not_finite_end_the_run(unet, text):
    broken = text.clone()
    broken[0, 0, 0] = torch.nan
    scheduler, noise = ddim_scheduler(thin_scheduler()), initial_noise(SHAPE, [5])
    with pytest.raises(FloatingPointError, match="after step 0; try --mixed_precision no"):
        denoise(unet, scheduler, noise, broken, STEPS, 7.5)
    control = box_control(unet, TOKENS, BOXES, noise, [5])
    regions = control.regions
    with pytest.raises(FloatingPointError, match="no finite gradient at step 0"):
        denoise(unet, scheduler, noise, broken.flip(0), STEPS, 7.5, control, CONFIG)
    assert control.regions is regions
