"""What the code computes, a second time and plainly: seeds, attention, masks at other sizes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def stream_of(seed: int, *labels: str | int) -> torch.Generator:
    """The generator of a labelled seed: sha256 over the seed and the labels with their types."""
    text = "\x1f".join([str(seed), *(f"{type(label).__name__}:{label}" for label in labels)])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:16], 16) // 2)


@contextmanager
def attention_of(unet, names) -> Iterator[dict[str, Tensor]]:
    """Within, [b, pixels, tokens] of the named layers' last pass, mean over heads.

    They come from what the layers' projections put out, whatever processor they have.
    """
    projected, handles, maps = {}, [], {}

    def keep(name: str, part: str):
        def hook(_, __, out: Tensor) -> None:
            projected[name, part] = out
            if part == "to_k":  # comes second
                layer = unet.get_submodule(name)
                query, key = (
                    projected[name, which].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                    for which in ("to_q", "to_k")
                )
                logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
                maps[name] = logits.softmax(-1).mean(1)

        return hook

    try:
        for name in names:
            for part in ("to_q", "to_k"):
                module = unet.get_submodule(f"{name}.{part}")
                handles.append(module.register_forward_hook(keep(name, part)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def nearest(masks: Tensor, factor: int) -> Tensor:
    """[..., H, W] → [..., H/f, W/f]: the first pixel of each square."""
    return masks[..., ::factor, ::factor]


def bilinear(masks: Tensor, factor: int) -> Tensor:
    """[..., H, W] → [..., H/f, W/f], f even: mean of the four pixels in the middle of a square."""
    low, high = factor // 2 - 1, factor // 2
    rows = (masks[..., low::factor, :] + masks[..., high::factor, :]) / 2
    return (rows[..., low::factor] + rows[..., high::factor]) / 2
