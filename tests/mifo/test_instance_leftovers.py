"""What is left of thin masks on the grids that learning compares with, worked out by hand.

Of 512 pixels a side, counted from 0, the latents see the first of every 8, mirrored the last; the
attention maps of 32 x 32 see the 7th and 8th of every 16, those of 16 x 16 the 15th and 16th of 32.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from imagelab.errors import UserError
from imagelab.models.stable_diffusion import load_base
from mifo.learning.config import Recipe
from mifo.learning.instance import Instance
from mifo.learning.leftovers import check_leftovers, leftovers, used_grids
from mifo.method.learning_loss import learning_loss

SIDE = 512
TOKENS = Recipe(finetune="none", attention_loss="none")  # nothing but reconstruction
LATENTS, FINE, COARSE = ("nearest", (64, 64)), ("bilinear", (32, 32)), ("bilinear", (16, 16))


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_base(str(tiny_sd))


def pole(first, last, top=0):
    """Columns first … last, from a row on."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:, first : last + 1] = True
    return mask


def instance(*masks):
    image = np.zeros((*masks[0].shape, 3), np.uint8)
    return Instance("toys", Path("toys"), image, np.stack(masks), (SIDE, SIDE), (), "", ())


def shares(mask, grid):
    mode, size = grid
    return leftovers(torch.from_numpy(mask)[None].float(), size, mode)[0].tolist()


@pytest.mark.parametrize(
    ("mask", "grid", "left"),
    [
        (pole(9, 14), LATENTS, [0, 0]),  # between columns 8 and 15
        (pole(9, 15), LATENTS, [0, 1 / 64]),
        (pole(8, 14), LATENTS, [1 / 64, 0]),
        (pole(8, 15), LATENTS, [1 / 64, 1 / 64]),
        (pole(0, 255), LATENTS, [1 / 2, 1 / 2]),
        (pole(9, 22), FINE, [0, 0]),  # between 8 and 23
        (pole(8, 22), FINE, [1 / 64, 1 / 64]),  # one of two columns
        (pole(9, 24, top=256), FINE, [1 / 64, 1 / 64]),  # both, in half of the rows
        (pole(17, 46), COARSE, [0, 0]),  # between 16 and 47
        (pole(17, 47), COARSE, [1 / 32, 1 / 32]),
    ],
)
def test_what_is_left_of_a_pole(mask, grid, left):
    assert shares(mask, grid) == left


def test_the_grids_are_those_of_the_losses(model):
    toys = instance(pole(0, 255))
    assert list(used_grids(model, Recipe(), toys)) == [LATENTS, COARSE, FINE]
    assert list(used_grids(model, TOKENS, toys)) == [LATENTS]
    late = Recipe(train_steps=0)  # stage 2 alone, at the resolution of decoder-1
    assert list(used_grids(model, late, toys)) == [LATENTS, COARSE]
    rewarded = Recipe(train_steps=0, attention_loss="reward")  # which stage 2 has not
    assert list(used_grids(model, rewarded, toys)) == [LATENTS]
    wide = instance(np.ones((512, 768), bool))
    assert list(used_grids(model, late, wide)) == [("nearest", (64, 96)), ("bilinear", (16, 24))]


def test_where_nothing_is_left_the_loss_sees_nothing():
    """The 6-pixel pole: no reconstruction; between the cells of 16 x 16: no goal for attention."""
    draw = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 1, 4, 64, 64, generator=draw)
    maps = torch.rand(1, 16, 16, generator=draw)
    masks = torch.from_numpy(pole(9, 14))[None].float()
    assert learning_loss(predicted, target, {}, masks).reconstruction == 0
    masks = torch.from_numpy(pole(9, 15))[None].float()
    assert learning_loss(predicted, target, {}, masks).reconstruction == 0
    assert learning_loss(predicted, target, {}, masks.flip(-1)).reconstruction > 0
    masks = torch.from_numpy(pole(17, 46))[None].float()
    loss = learning_loss(predicted, target, {"layer": maps}, masks, "reward")
    assert loss.attention == [maps.square().mean()]  # the token is to look nowhere


NOTHING = (
    "mask1 of toys is so thin or small that nothing of it is left in the {} cells of the {}, and "
    "nothing would be learned; crop the photo and its masks around that thing"
)


@pytest.mark.parametrize(
    ("mask", "recipe", "told"),
    [
        (pole(9, 14), TOKENS, ("64 x 64", "latents")),
        (pole(9, 14), Recipe(), ("64 x 64", "latents")),
        (pole(9, 22), Recipe(), ("32 x 32", "attention maps")),
        (pole(17, 46), Recipe(), ("16 x 16", "attention maps")),
        (pole(17, 46), Recipe(train_steps=0), ("16 x 16", "attention maps")),
        (pole(9, 22), TOKENS, None),
        (pole(9, 22), Recipe(train_steps=0), None),
    ],
)
def test_a_mask_of_which_nothing_is_left_is_refused(model, mask, recipe, told):
    toys = instance(pole(64, 255), mask)
    if told is None:
        return check_leftovers(model, recipe, toys)
    with pytest.raises(UserError, match=re.escape(NOTHING.format(*told))):
        check_leftovers(model, recipe, toys)


def test_a_mask_of_which_little_is_left_is_noted(model, caplog):
    """7 columns of which the mirrored view sees one, the other none; then 10 of which both see one.

    1/64 of the cells for 10/512 of the picture is 80%, which is no loss worth a word.
    """
    check_leftovers(model, TOKENS, instance(pole(64, 255), pole(9, 15)))
    [note] = caplog.messages
    assert note.startswith(
        "mask1 of toys is thin or small: of it, 0% is left in the 64 x 64 cells of the latents; "
    )
    caplog.clear()
    check_leftovers(model, TOKENS, instance(pole(64, 255), pole(7, 16)))
    assert not caplog.messages


def test_a_cross_that_loses_most_of_it_is_noted(model, caplog):
    """An upright of 8 columns, 4096 pixels, is seen; bars of 6 rows, 6 · 504 beside it, are not."""
    bars = np.zeros((SIDE, SIDE), bool)
    for top, left in ((9, 0), (17, 40), (25, 31)):  # 4096 of 7120: 58%; of 10144: 40%; of 13168
        bars[top : top + 6] = True
        caplog.clear()
        check_leftovers(model, TOKENS, instance(bars | pole(8, 15)))
        assert [f"of it, {left}% is left" in note for note in caplog.messages] == [True] * bool(
            left
        )
