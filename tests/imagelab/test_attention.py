"""Attention layers: found by name, computed as diffusers does, restored afterwards."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from thin import thin_unet

from imagelab.attention import (
    Recorder,
    attend,
    attention_layers,
    layer_grid,
    leave_early,
    pixel_grids,
    processors,
)


@pytest.fixture(scope="module")
def unet():
    return thin_unet()


@pytest.fixture(scope="module")
def inputs():
    """Latents of 8×12, a timestep, and the states of eight tokens, for two samples."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 12, generator=draw)
    return latents, torch.tensor(500), torch.randn(2, 8, 16, generator=draw)


def everywhere(unet, processor) -> dict:
    return dict.fromkeys(attention_layers(unet), processor)


@pytest.fixture(scope="module")
def theirs(unet, inputs):
    """What diffusers' own processor, which materialises attention, makes of the inputs."""
    with processors(unet, everywhere(unet, AttnProcessor())):
        return unet(*inputs).sample


# --- computing -------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities", [True, False])
def test_attend_is_diffusers_attention(unet, inputs, theirs, probabilities):
    def process(attn, hidden_states, encoder_hidden_states=None, **_):
        out, attention = attend(attn, hidden_states, encoder_hidden_states, None, probabilities)
        assert (attention is not None) == probabilities
        return out

    with processors(unet, everywhere(unet, process)):
        ours = unet(*inputs).sample
    assert (ours - theirs).abs().max() <= 1e-6


def test_attend_hides_what_the_mask_hides(unet):
    attn = attention_layers(unet, "cross")["mid_block.attentions.0.transformer_blocks.0.attn2"]
    draw = torch.Generator().manual_seed(2)
    hidden, context = torch.randn(2, 6, 16, generator=draw), torch.randn(2, 8, 16, generator=draw)
    hides = torch.rand(2, 1, 6, 8, generator=draw) < 0.5
    hides[..., 0] = False
    mask = torch.zeros(hides.shape).masked_fill(hides, -torch.inf)
    out, attention = attend(attn, hidden, context, mask, probabilities=True)
    assert (attention[hides.expand_as(attention)] == 0).all()
    assert torch.allclose(attention.sum(-1), torch.ones(2, attn.heads, 6))
    fused, _ = attend(attn, hidden, context, mask, probabilities=False)
    assert torch.allclose(fused, out, atol=1e-6)
    seen, _ = attend(attn, hidden, context, None, probabilities=False)
    assert not torch.allclose(seen, out, atol=1e-4)


def test_recorder_changes_nothing_and_its_maps_sum_to_one(unet, inputs, theirs):
    recorder = Recorder()
    layers = attention_layers(unet)
    with processors(unet, {name: recorder.processor(name) for name in layers}):
        ours = unet(*inputs).sample
    assert (ours - theirs).abs().max() <= 1e-6
    assert set(recorder.maps) == set(layers)
    for name, map_ in recorder.maps.items():
        rows, columns = layer_grid(unet, (8, 12), name)
        keys = 8 if name.endswith("attn2") else rows * columns
        assert map_.shape == (2, rows * columns, keys)
        assert torch.allclose(map_.sum(-1), torch.ones(2, rows * columns), atol=1e-5)


def test_recorder_keeps_the_mask_of_the_text(unet, inputs):
    shown = torch.ones(2, 8, dtype=torch.bool)
    shown[0, 3:] = False
    shown[1, 5:] = False
    recorder = Recorder()
    names = attention_layers(unet, "cross")
    plain = unet(*inputs, encoder_attention_mask=shown).sample
    with processors(unet, {name: recorder.processor(name) for name in names}):
        ours = unet(*inputs, encoder_attention_mask=shown).sample
    assert (ours - plain).abs().max() <= 1e-6
    for map_ in recorder.maps.values():
        assert map_[0, :, 3:].max() == 0 and map_[1, :, 5:].max() == 0


def test_recorded_maps_are_differentiable(unet, inputs):
    latents, timestep, text = inputs
    recorder = Recorder()
    text = text.clone().requires_grad_()
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    with processors(unet, {name: recorder.processor(name)}):
        unet(latents, timestep, text)
    recorder.maps[name][:, :, 2].sum().backward()
    assert text.grad.abs().max() > 0


# --- processors ------------------------------------------------------------------------------


def test_processors_are_restored_after_an_exception(unet, inputs):
    before = {name: layer.processor for name, layer in attention_layers(unet).items()}

    def fail(*_, **__):
        raise RuntimeError("within the third layer")

    chosen = list(before)[:3]
    new = dict(zip(chosen, (AttnProcessor(), AttnProcessor(), fail), strict=True))
    with pytest.raises(RuntimeError, match="third layer"), processors(unet, new):
        for name, layer in attention_layers(unet).items():
            assert layer.processor is new.get(name, before[name])
        unet(*inputs)
    for name, layer in attention_layers(unet).items():
        assert layer.processor is before[name]


def test_processors_of_an_unknown_layer_change_nothing(unet):
    before = [layer.processor for layer in attention_layers(unet).values()]
    first = next(iter(attention_layers(unet)))
    with (
        pytest.raises(AttributeError),
        processors(unet, {first: AttnProcessor(), "no.layer": None}),
    ):
        pass
    after = [layer.processor for layer in attention_layers(unet).values()]
    assert all(a is b for a, b in zip(after, before, strict=True))


# --- names and grids -------------------------------------------------------------------------


def test_layers_by_kind(unet):
    both, self_, cross = (set(attention_layers(unet, kind)) for kind in (None, "self", "cross"))
    assert self_ | cross == both and not self_ & cross
    assert {name.replace("attn1", "attn2") for name in self_} == cross
    assert len(both) == 2 * (3 + 1 + 2 * 3)  # down, mid, and two a block up


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (13, 21)])
def test_grids_are_those_that_the_unet_works_at(levels, size):
    unet = thin_unet(levels)
    pixels, shapes = {}, []

    def process_of(name):
        def process(attn, hidden_states, encoder_hidden_states=None, **_):
            pixels[name] = hidden_states.shape[1]
            return attend(attn, hidden_states, encoder_hidden_states, None, False)[0]

        return process

    handles = [
        block.resnets[0].register_forward_hook(lambda _, __, out: shapes.append(out.shape[-2:]))
        for block in unet.down_blocks
    ]
    with processors(unet, {name: process_of(name) for name in attention_layers(unet)}):
        unet(torch.randn(1, 4, *size), 5, torch.randn(1, 8, 16))
    for handle in handles:
        handle.remove()
    assert list(pixel_grids(unet, size).values()) == [tuple(shape) for shape in shapes]
    for name, count in pixels.items():
        grid = layer_grid(unet, size, name)
        assert grid[0] * grid[1] == count, name
        assert pixel_grids(unet, size)[count] == grid


def test_grids_of_odd_sizes_round_up(unet):
    assert pixel_grids(unet, (5, 9)) == {45: (5, 9), 15: (3, 5), 6: (2, 3), 2: (1, 2)}
    assert layer_grid(unet, (5, 9), "down_blocks.1.attentions.0") == (3, 5)
    assert layer_grid(unet, (5, 9), "mid_block.attentions.0") == (1, 2)
    assert layer_grid(unet, (5, 9), "up_blocks.1.") == (2, 3)


def test_other_exceptions_are_not_swallowed():
    with pytest.raises(RuntimeError, match="real"), leave_early():
        raise RuntimeError("a real failure")
