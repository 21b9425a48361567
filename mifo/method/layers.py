"""Which attention layers of a Stable Diffusion UNet the method reads, by name (arXiv 2511.00542).

| group | modules | of Stable Diffusion 2.1 | read by |
|---|---|---|---|
| decoder-1 | ``up_blocks.1`` | latent / 4 | both learning stages, box loss, refinement |
| decoder-2 | ``up_blocks.2`` | latent / 2 | learning stage 1 |
| encoder | ``down_blocks`` at decoder-1's resolution | latent / 4 | learning stage 2 |
| mid | ``mid_block`` | latent / 8 | box loss |

A UNet of fewer levels has the same names at finer resolutions.
"""

from imagelab.attention import attention_layers, layer_grid
from imagelab.errors import UserError

DECODER_1, DECODER_2, MID = "up_blocks.1.", "up_blocks.2.", "mid_block."


def decoder_block(unet) -> str:
    """Name prefix of decoder-1, the block whose maps tell instances apart.

    Raises UserError for a UNet without attention there.
    """
    if not any(name.startswith(DECODER_1) for name in attention_layers(unet, "cross")):
        raise UserError(
            "the UNet has no attention in up_blocks.1, whose maps MIFO reads; "
            "use a Stable Diffusion 1 or 2 model"
        )
    return DECODER_1


def supervised_layers(unet, size: tuple[int, int], stage: int) -> list[str]:
    """Cross-attention layers that a learning stage supervises, for latents of (rows, columns).

    Stage 1: decoder-1 and decoder-2. Stage 2: every cross layer at the resolution of decoder-1,
    the encoder's included.
    """
    cross = attention_layers(unet, "cross")
    decoder = decoder_block(unet)
    if stage == 1:
        return [name for name in cross if name.startswith((decoder, DECODER_2))]
    grid = layer_grid(unet, size, decoder)
    return [name for name in cross if layer_grid(unet, size, name) == grid]


def map_layers(unet) -> list[str]:
    """Self- and cross-attention layers of decoder-1, from whose maps regions are refined."""
    decoder = decoder_block(unet)
    return [name for name in attention_layers(unet) if name.startswith(decoder)]


def loss_layers(unet) -> list[str]:
    """Self- and cross-attention layers that the box loss reads: mid, then decoder-1."""
    mid = [name for name in attention_layers(unet) if name.startswith(MID)]
    return mid + map_layers(unet)
