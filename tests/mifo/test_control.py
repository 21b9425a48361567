"""Bounded attention: what it hides, what it reads, and how little of the UNet a pass runs."""

import pytest
import torch
from thin import BOXES, TOKENS, thin_unet

from imagelab.attention import attend, attention_layers, layer_grid, leave_early, processors
from mifo.method.control import BoxControl
from mifo.method.losses import box_mass
from mifo.method.regions import RegionSet


@pytest.fixture(scope="module")
def unet():
    return thin_unet()


@pytest.fixture(scope="module")
def inputs():
    """Latents of 8×12, a timestep, and the states of eight tokens, for two samples."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 12, generator=draw)
    return latents, torch.tensor(500), torch.randn(2, 8, 16, generator=draw)


@pytest.fixture
def control(unet):
    return BoxControl(unet, TOKENS, BOXES, (8, 12), seeds=[0, 0])


def executed(unet, run) -> set[str]:
    """Names of the modules that ``run`` executes to the end."""
    seen: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in unet.named_modules()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_guidance_leaves_after_the_last_layer_of_its_loss(unet, inputs, control):
    latents, timestep, text = inputs

    def run():
        with control.guidance_pass(), leave_early():
            unet(latents, timestep, text)

    seen = executed(unet, run)
    assert {"down_blocks.0", "mid_block", "up_blocks.0", "up_blocks.1.resnets.1"} <= seen
    assert not {name for name in seen if name.startswith(("up_blocks.2", "up_blocks.3"))}
    assert not {"up_blocks.1", "conv_norm_out", "conv_out", ""} & seen


def test_guidance_sees_what_a_full_pass_sees(unet, inputs, control):
    """F and B from probabilities recorded in a whole pass under the very same masks."""
    latents, timestep, text = inputs
    with control.guidance_pass(), leave_early():
        unet(latents, timestep, text)
    regions = RegionSet(BOXES, TOKENS)
    context = torch.zeros(1, 2, 8, dtype=torch.bool)
    context[0, 0, [2, 6]] = context[0, 1, [4, 5, 6]] = True
    masses: dict[str, list] = {"self": [], "cross": []}

    def process_of(name):
        def process(attn, hidden_states, encoder_hidden_states=None, **_):
            grid = layer_grid(unet, (8, 12), name)
            kind = "self" if encoder_hidden_states is None else "cross"
            hidden = (
                regions.self_mask(*grid)
                if kind == "self"
                else regions.cross_mask(*grid, guidance=True)
            )
            mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]
            out, attention = attend(attn, hidden_states, encoder_hidden_states, mask, True)
            if name.startswith(("mid_block.", "up_blocks.1.")):
                keys = regions.at(*grid) if kind == "self" else context
                masses[kind].append(box_mass(attention, regions.at(*grid), keys))
            return out

        return process

    with processors(unet, {name: process_of(name) for name in attention_layers(unet)}):
        assert unet(latents, timestep, text).sample.shape == latents.shape
    popped = dict(zip(("cross", "self"), control.pop_masses(), strict=True))
    for kind, found in masses.items():
        assert len(found) == 3  # mid, and two layers of the decoder's first block
        for ours, whole in zip(popped[kind], zip(*found, strict=True), strict=True):
            assert ours.shape == (2, 2)
            assert torch.allclose(ours, torch.stack(whole).mean(0), rtol=1e-5)


def test_denoising_bounds_cross_attention_in_the_conditional_half_alone(unet, inputs, control):
    """Hidden tokens cannot matter: the filtered ones to the second half, all do to the first."""
    latents, timestep, text = inputs
    latents, text = latents[:1].repeat(2, 1, 1, 1), text[:1].repeat(2, 1, 1)
    other = text.clone()
    other[:, list(TOKENS.filtered)] += 1
    with control.denoising_pass():
        before, after = (unet(latents, timestep, states).sample for states in (text, other))
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.allclose(before[1], after[1], atol=1e-6)


def test_denoising_attends_once_for_both_halves_before_the_first_text(unet, inputs, control):
    latents, timestep, text = inputs
    seen = {}
    handles = [
        layer.to_out[0].register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: len(out)})
        )
        for name, layer in attention_layers(unet).items()
    ]
    with control.denoising_pass():
        unet(latents[:1].repeat(2, 1, 1, 1), timestep, text)
    for handle in handles:
        handle.remove()
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert seen == {name: 1 if name == first else 2 for name in attention_layers(unet)}
