"""What is left of masks where learning uses them: on grids much coarser than the photo.

The latents of Stable Diffusion have a cell for 8 x 8 pixels, of which one counts; the attention
maps have cells of 16 x 16 and 32 x 32 pixels, of which the four in the middle count. What is thin
may lie between them.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from imagelab.attention import layer_grid
from imagelab.errors import UserError
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learning.config import Recipe
from mifo.learning.instance import Instance
from mifo.method.layers import supervised_layers

log = logging.getLogger(__name__)

LITTLE = 0.5  # of a mask's share of the picture: when less is left, that is worth a note
LATENTS = "nearest"  # how masks get to the size of the latents, and
ATTENTION = "bilinear"  # of attention maps: see mifo.method.learning_loss
WHAT = {LATENTS: "latents", ATTENTION: "attention maps"}


def check_leftovers(model: StableDiffusion, recipe: Recipe, instance: Instance) -> None:
    """Raises UserError for a mask of which learning would see nothing; logs where it sees little.

    A mask is looked at as views show it, and mirrored.
    """
    masks = torch.from_numpy(instance.masks).float()
    for mode, grid in used_grids(model, recipe, instance):
        where = f"the {grid[1]} x {grid[0]} cells of the {WHAT[mode]}"
        for index, (mask, left) in enumerate(zip(masks, leftovers(masks, grid, mode), strict=True)):
            name, advice = f"mask{index} of {instance.folder}", "crop the photo and its masks"
            if not left.max():
                raise UserError(
                    f"{name} is so thin or small that nothing of it is left in {where}, and "
                    f"nothing would be learned; {advice} around that thing"
                )
            share = (left.min() / mask.mean()).item()
            if share < LITTLE:
                log.warning(
                    "%s is thin or small: of it, %.0f%% is left in %s; %s around that thing if it "
                    "is learned badly",
                    name, 100 * share, where, advice,
                )  # fmt: skip


def used_grids(
    model: StableDiffusion, recipe: Recipe, instance: Instance
) -> Iterable[tuple[str, tuple[int, int]]]:
    """The grids on which learning compares with masks: how masks get there, rows and columns."""
    rows, columns = (side // model.vae_factor for side in instance.masks.shape[1:])
    found = {(LATENTS, (rows, columns)): None}  # in this order, each once
    for stage in recipe.steps:
        if recipe.attention_term(stage, 0):
            for name in supervised_layers(model.unet, (rows, columns), stage):
                found[ATTENTION, layer_grid(model.unet, (rows, columns), name)] = None
    return found


def leftovers(masks: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """The share of the grid [n, 2] that masks [n, H, W] cover, as they are and mirrored."""
    ways = torch.stack([masks, masks.flip(-1)], 1)  # n 2 H W
    return F.interpolate(ways, grid, mode=mode).mean((-2, -1))
