"""Weights that are split over processes (FSDP, Zhao et al., arXiv 2304.11277), and whole again.

Everything here is to be called by all processes alike, in the same order.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Split a model's weights over all processes; each block is whole only while it works.

    Gradients are means over the processes, and an optimiser made afterwards keeps the moments of
    this process's part alone. What belongs to no block is whole for as long as the model works.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.split(":")[0], (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all processes' parts; one that is not split as it is."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where ``like`` is split; otherwise as it is."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is this process's part of a whole; told without a slow import."""
    return hasattr(tensor, "full_tensor")
