"""Denoising with boxes: guidance lowers its loss, and no image depends on another."""

from weakref import WeakSet

import pytest
import torch
from thin import BOXES, TOKENS, thin_scheduler, thin_unet

from imagelab.attention import attention_layers
from imagelab.models.stable_diffusion import StableDiffusion
from imagelab.sampling import denoise, initial_noise
from mifo.method import sampling
from mifo.method.control import BoxControl
from mifo.method.guidance import GuidanceConfig
from mifo.method.regions import TokenRoles
from mifo.method.sampling import BoxSampling, guide, scaled_gradient, step_size

#: guidance in steps 0 and 1, refined regions from step 2 and anew from step 4
CONFIG = GuidanceConfig(guidance_steps=2, guidance_iterations=2, refine_every=2, loss_threshold=0)
UNREFINED = GuidanceConfig(guidance_steps=1, guidance_iterations=1, refine_every=0)
STEPS = 6
SHAPE, GRID = (4, 8, 12), (4, 6)


@pytest.fixture(scope="module")
def model():
    """Three levels: the decoder's first block works at 4×6 for latents of 8×12.

    Its queries are enlarged, so that attention depends on the image, and refined regions with it.
    """
    unet = thin_unet(3, seed=3)
    for layer in attention_layers(unet).values():
        layer.to_q.weight.mul_(6)
    return StableDiffusion(None, None, None, unet, thin_scheduler(), "random", "")


@pytest.fixture(scope="module")
def text():
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def box_control(model, seeds, boxes=BOXES, tokens=TOKENS) -> BoxControl:
    return BoxControl(model.unet, tokens, boxes, SHAPE[1:], seeds)


def paint(model, text, control, config=CONFIG, watch=None, on_step=None):
    """The latents that a control's seeds lead to."""
    latents = initial_noise(SHAPE, control.refiner.seeds)
    boxed = BoxSampling(model, control, text[1:], STEPS, config, watch)
    return denoise(model, latents, text, STEPS, 7.5, boxed, on_step)


def paint_seeds(model, text, seeds, config=CONFIG, watch=None, **places):
    return paint(model, text, box_control(model, seeds, **places), config, watch)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, in parts of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- pieces ----------------------------------------------------------------------------------


class Kept:
    """What autograd saves for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # else an output would keep its own graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_graph_outlives_its_update(model, text, dtype, monkeypatch):
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
        paint_seeds(model, text, [0], watch=lambda _: counts.append(len(alive)))
    assert len(counts) == 8  # before and after two updates in each of two steps
    assert counts[0] > 100 and counts == [counts[0], 0] * 4


def test_step_size_falls_toward_its_final_value():
    config = GuidanceConfig()
    sizes = [step_size(step, config) for step in (0, 5, 14)]
    assert sizes == pytest.approx([8, 6, 2.4])


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model, text):
    """Images of the seeds 5 and 6, each painted by itself, and how often each was guided."""
    images, guided = [], []
    for seed in (5, 6):
        seen = []
        images.append(paint_seeds(model, text, [seed], watch=seen.append))
        guided.append(seen)
    return torch.cat(images), guided


def test_a_batch_paints_what_its_images_are_alone(model, text, alone):
    seen, regions = [], []
    control = box_control(model, [5, 6])
    together = paint(
        model, text, control, CONFIG, seen.append,
        lambda _: regions.append(control.regions.at(*GRID)),
    )  # fmt: skip
    assert difference(together, alone[0]) <= 1e-5
    assert len(seen) == 4  # two steps of two iterations
    # The regions are the boxes first, and each image's own afterwards.
    assert [len(r) for r in regions] == [1, 1, 2, 2, 2, 2]
    assert not torch.equal(regions[2][0], regions[2][1])
    assert not torch.equal(regions[2][0], regions[0][0])


def test_an_image_that_stops_early_does_not_change_another(model, text, alone):
    """A threshold between the two images' first losses stops one of them at once."""
    first = [seen[0].loss.item() / 2 for seen in alone[1]]
    assert abs(first[0] - first[1]) > 1e-3
    config = GuidanceConfig(
        guidance_steps=2, guidance_iterations=3, refine_every=2, loss_threshold=sum(first) / 2
    )
    seen, apart = [], [[], []]
    together = paint_seeds(model, text, [5, 6], config, seen.append)
    separate = [paint_seeds(model, text, [5 + i], config, apart[i].append) for i in (0, 1)]
    assert difference(together, torch.cat(separate)) <= 1e-5
    stopped = int(first[1] < first[0])
    guided = [[g.step for g in seen if i in g.images] for i in (0, 1)]
    assert guided == [[g.step for g in own] for own in apart]
    assert guided[stopped].count(0) == 1 < guided[1 - stopped].count(0)


def test_the_order_of_subjects_does_not_matter(model, text, alone):
    swapped = TokenRoles(
        subjects=TOKENS.subjects[::-1],
        filtered=(1, 3),
        end=6,
        length=8,
        leading=TOKENS.leading[::-1],
    )
    same = paint_seeds(model, text, [5], boxes=BOXES[::-1], tokens=swapped)
    assert difference(same, alone[0][:1]) < 1e-5
    crossed = paint_seeds(model, text, [5], boxes=BOXES[::-1])
    assert difference(crossed, alone[0][:1]) > 1e-3


# --- control ---------------------------------------------------------------------------------


def test_boxes_change_the_picture(model, text, alone):
    free = denoise(model, initial_noise(SHAPE, [5]), text, STEPS, 7.5)
    assert difference(alone[0][:1], free) > 1e-3


def test_guidance_lowers_the_loss_at_every_iteration(model, text):
    latents = initial_noise(SHAPE, [5, 6])
    control = box_control(model, [5, 6])
    config = GuidanceConfig(guidance_iterations=5, loss_threshold=0)
    seen = []
    before = latents.clone()
    moved = guide(model, control, latents, torch.tensor(901), text[1:], 0, config, seen.append)
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


def test_guidance_follows_the_gradient_by_its_step_size(model, text):
    """One iteration twice: a step half as long moves the latents half as far."""
    latents = initial_noise(SHAPE, [5])
    control = box_control(model, [5])
    moves = []
    for size in (8.0, 4.0):
        config = GuidanceConfig(guidance_iterations=1, step_size=size)
        moves.append(
            guide(model, control, latents, torch.tensor(901), text[1:], 0, config) - latents
        )
    assert moves[0].abs().max() > 1e-3
    assert difference(2 * moves[1], moves[0]) < 1e-3


def test_the_step_scale_multiplies_both_step_sizes(model, text):
    """8 → 2 over 15 steps: 8 at step 0, 6 at step 5, 4 at step 10."""
    for scale, sizes in ((None, [8, 6, 4]), (1.0, [8, 6, 4]), (0.5, [4, 3, 2]), (0.0, [0, 0, 0])):
        config = GuidanceConfig(step_scale=scale)
        assert [step_size(step, config) for step in (0, 5, 10)] == pytest.approx(sizes)
    latents, control = initial_noise(SHAPE, [5]), box_control(model, [5])
    scaled, smaller = (
        guide(model, control, latents, torch.tensor(901), text[1:], 0, config)
        for config in (
            GuidanceConfig(guidance_iterations=1, step_scale=0.5),
            GuidanceConfig(guidance_iterations=1, step_size=4.0),
        )
    )
    assert not torch.equal(scaled, latents)
    torch.testing.assert_close(scaled, smaller)


def test_boxes_stay_the_regions_without_refinement(model, text):
    control = box_control(model, [5])
    regions = control.regions
    paint(model, text, control, UNREFINED)
    assert control.regions is regions


def test_nothing_is_left_in_the_unet(model, text):
    before = [layer.processor for layer in attention_layers(model.unet).values()]
    paint_seeds(model, text, [5], UNREFINED)
    after = [layer.processor for layer in attention_layers(model.unet).values()]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_a_gradient_that_is_not_finite_ends_the_run(model, text):
    broken = text.clone()
    broken[1, 0, 0] = torch.nan
    control = box_control(model, [5])
    regions = control.regions
    with pytest.raises(FloatingPointError, match="no finite gradient at step 0"):
        paint(model, broken, control)
    assert control.regions is regions


@pytest.mark.parametrize(
    ("guidance_steps", "every", "expected"),
    [(15, 5, [15, 20]), (0, 5, [5, 10, 15, 20]), (15, 0, []), (30, 5, []), (1, 9, [1, 10, 19])],
)
def test_steps_that_refine(model, text, guidance_steps, every, expected):
    config = GuidanceConfig(guidance_steps=guidance_steps, refine_every=every)
    boxed = BoxSampling(model, box_control(model, [5]), text[1:], 24, config)
    assert boxed.refining_steps == expected


def test_maps_are_recorded_until_the_last_refinement(model, text):
    """Refined before steps 2 and 4 of 6."""
    control, recording = box_control(model, [0]), []
    paint(model, text, control, on_step=lambda _: recording.append(control.recording))
    assert recording == [True] * 4 + [False] * 2
