"""The losses on numbers worked by hand."""

import math

import pytest
import torch

from mifo.method.learning_loss import learning_loss
from mifo.method.losses import (
    ATTENTION_LOSSES,
    box_alpha,
    box_loss,
    box_mass,
    box_term,
    break_a_scene_loss,
    penalty_loss,
    reconstruction_loss,
    reward_loss,
)

ATTENTION = torch.tensor([[0.2, 0.4], [0.1, 0.8]])
MASK = torch.tensor([[1.0, 0.5], [0.0, 0.0]])


def test_reconstruction_counts_only_what_the_mask_holds_but_divides_by_everything():
    predicted = torch.tensor([[[[1.0, 5.0], [2.0, 0.0]], [[0.0, -3.0], [4.0, 9.0]]]])
    target = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]], [[2.0, 1.0], [1.0, 9.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
    # inside: 1² + 0² + 0² and 2² + 3² + 0²; eight elements
    assert reconstruction_loss(predicted, target, mask).item() == pytest.approx(14 / 8)


def test_reward():
    # (.5 - .2)², (.25 - .4)², .1², .8²
    expected = (0.09 + 0.0225 + 0.01 + 0.64) / 4
    assert reward_loss(ATTENTION, MASK).item() == pytest.approx(expected)


def test_penalty():
    # 0², (.4 · .5)², .1², .8²
    expected = (0 + 0.04 + 0.01 + 0.64) / 4
    assert penalty_loss(ATTENTION, MASK).item() == pytest.approx(expected)


def test_break_a_scene():
    # A / max = [[.25, .5], [.125, 1]]
    expected = (0.75**2 + 0**2 + 0.125**2 + 1**2) / 4
    assert break_a_scene_loss(ATTENTION, MASK).item() == pytest.approx(expected)


def test_break_a_scenes_maximum_has_a_gradient():
    attention = torch.tensor([[0.2, 0.4]], requires_grad=True)
    break_a_scene_loss(attention, torch.tensor([[1.0, 0.0]])).backward()
    # ((a / m - 1)² + 1) / 2, as the second is the maximum m: (a / m - 1) · (1 / m, -a / m²)
    assert attention.grad.flatten().tolist() == pytest.approx([-1.25, 0.625])


def test_weights_by_name():
    weights = {name: weight for name, (_, weight) in ATTENTION_LOSSES.items()}
    assert weights == {"reward": 1e-2, "penalty": 2e-2, "break_a_scene": 1e-2}
    functions = [function for function, _ in ATTENTION_LOSSES.values()]
    assert functions == [reward_loss, penalty_loss, break_a_scene_loss]


def test_box_mass_of_two_by_two_pixels():
    """Two heads, the pixels of a 2×2 picture, three tokens; the boxes share the second pixel."""
    heads = [
        [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.7, 0.1, 0.2]],
        [[0.4, 0.4, 0.2], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]],
    ]
    regions = torch.tensor([[[True, True, False, False], [False, True, True, False]]])
    context = torch.tensor([[[False, True, True], [True, False, True]]])
    foreground, background = box_mass(torch.tensor([heads]), regions, context)
    # subject 0, tokens 1 and 2: pixels 0 and 1 hold .5+.9 and .6+.7; pixel 3 holds .3 and .4
    # subject 1, tokens 0 and 2: pixels 1 and 2 hold .4+.8 and .7+.2; pixel 3 holds .9 and .7
    assert foreground.tolist() == [pytest.approx([2.7, 2.1])]
    assert background.tolist() == [pytest.approx([0.7, 1.6])]


def test_box_mass_treats_samples_apart():
    attention = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    regions = torch.tensor([[[1, 0, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]]]).bool()
    context = torch.tensor([[[0, 1, 0, 0, 1]]]).bool()
    together = box_mass(attention, regions, context)
    for sample in range(3):
        alone = box_mass(attention[sample, None], regions[sample, None], context)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours[sample].item() == pytest.approx(theirs.item())
    assert together[1][2].item() == 0  # no pixel of the last sample is background


def test_box_term():
    term = box_term(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0]), alpha=0.5)
    # (1 - 3/4)² + ½·ln 2, and all mass inside
    assert term.tolist() == pytest.approx([0.0625 + 0.5 * math.log(2), 0.0])


def test_box_term_without_any_mass_is_the_worst_share_and_finite():
    foreground = torch.zeros(2, requires_grad=True)
    term = box_term(foreground, torch.zeros(2), alpha=0.5)
    assert term.tolist() == [1.0, 1.0]
    term.sum().backward()
    assert foreground.grad.isfinite().all()


def test_box_term_falls_as_mass_moves_into_the_box():
    inside = torch.linspace(0, 4, 9)
    terms = box_term(inside, 4 - inside, alpha=0.1)
    assert (terms.diff() < 0).all()


def test_box_loss_sums_over_subjects_and_keeps_samples_apart():
    cross = torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    self_ = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    ln2 = math.log(2)
    # sample 0: cross ¼ + α ln2 and 1/16 + α ln2; self 0 and ¼ + α ln2
    # sample 1: cross 1 + α ln2 and 0; self 0 and 0
    for weights in ((1.5, 0.5), (1.0, 2.0)):
        expected = [
            weights[0] * (0.3125 + 0.4 * ln2) + weights[1] * (0.25 + 0.2 * ln2),
            weights[0] * (1 + 0.2 * ln2),
        ]
        assert box_loss(cross, self_, 0.2, *weights).tolist() == pytest.approx(expected)
    assert torch.equal(box_loss(cross, self_, 0.2), box_loss(cross, self_, 0.2, 1.5, 0.5))


@pytest.mark.parametrize(
    ("step", "alpha"),
    [
        (0, 0.55), (1, 0.40), (2, 0.25), (3, 0.10),
        (6, 0.01 + 0.09 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the half cosine
        (9, 0.055), (15, 0.01), (49, 0.01),
    ],
)  # fmt: skip
def test_alpha(step, alpha):
    assert box_alpha(step) == pytest.approx(alpha)


def test_a_pixel_in_two_masks_counts_once():
    predicted = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    masks = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    loss = learning_loss(predicted, torch.zeros_like(predicted), {}, masks)
    assert loss.reconstruction.item() == (1 + 4 + 9 + 0) / 4
