"""States: out of a model, into a model, through a file."""

import os

import pytest
import torch
from torch import nn

import mifo_lora


def toy(injected: bool = True, rank: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    if injected:
        mifo_lora.inject(model, "0", rank=rank, alpha=4)
        mifo_lora.inject(model, "2", rank=1, alpha=3)
        for layer in mifo_lora.lora_layers(model).values():
            nn.init.normal_(layer.lora_B)
    return model


@pytest.fixture
def model():
    return toy()


@pytest.fixture
def state(model):
    return mifo_lora.lora_state_dict(model)


X = torch.linspace(-1, 1, 8).view(2, 4)


def test_the_state_has_the_native_names_and_is_a_copy(model, state):
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    assert shapes == {
        "0.lora_A": [2, 4],
        "0.lora_B": [6, 2],
        "0.alpha": [],
        "2.lora_A": [1, 6],
        "2.lora_B": [3, 1],
        "2.alpha": [],
    }
    assert state["0.alpha"] == 4 and state["2.alpha"] == 3
    kept = state["0.lora_A"].clone()
    nn.init.zeros_(model[0].lora_A)
    assert torch.equal(state["0.lora_A"], kept)


def test_loading_brings_factors_and_alpha(model, state):
    other = toy(injected=False)
    mifo_lora.inject(other, "0", rank=2)  # alpha is the rank here, and 4 in the state
    mifo_lora.inject(other, "2", rank=1)
    assert not torch.allclose(other(X), model(X))
    mifo_lora.load_lora(other, state)
    assert torch.equal(other(X), model(X))


def test_inject_from_makes_the_layers_of_the_state(model, state):
    other = toy(injected=False)
    before = torch.get_rng_state()
    assert mifo_lora.inject_from(other, state) == ["0", "2"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(other(X), model(X))
    assert [p.shape for p in mifo_lora.lora_parameters(other)] == [
        p.shape for p in mifo_lora.lora_parameters(model)
    ]


def test_half_precision_states_load_as_float32(model, state):
    mifo_lora.load_lora(model, {key: tensor.half() for key, tensor in state.items()})
    assert model[0].lora_A.dtype == torch.float32
    assert torch.equal(model[0].lora_A, state["0.lora_A"].half().float())


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


def layer(state, name, **leaves):
    return {**state, **{f"{name}.{leaf}": value for leaf, value in leaves.items()}}


ONE = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(6, 1), "alpha": torch.ones(())}
BROKEN = [
    (lambda s: {}, "is empty"),
    (lambda s: without(s, "2.lora_B"), "'2.lora_B' are missing or unknown"),
    (lambda s: layer(s, "2", lora_mid=torch.ones(1)), "'2.lora_mid' are missing or unknown"),
    (lambda s: layer(s, "0", lora_A=torch.ones(4)), r"'0' of the LoRA state has shapes \[4\]"),
    (lambda s: layer(s, "0", lora_A=torch.ones(3, 4)), r"'0' .* shapes \[3, 4\], \[6, 2\]"),
    (
        lambda s: layer(s, "0", lora_A=torch.ones(0, 4), lora_B=torch.ones(6, 0)),
        r"'0' .* shapes \[0, 4\]",
    ),
    (
        lambda s: layer(s, "0", lora_A=torch.ones(2, 0), lora_B=torch.ones(6, 2)),
        r"'0' .* shapes \[2, 0\]",
    ),
    (lambda s: layer(s, "0", lora_A=torch.ones(2, 4, 1, 1)), r"'0' .* shapes \[2, 4, 1, 1\]"),
    (lambda s: layer(s, "0", alpha=torch.tensor(-1.0)), "'0' .* not positive"),
    (lambda s: layer(s, "0", alpha=torch.tensor(torch.nan)), "'0' .* NaN"),
    # 1e30 · 1e20 is more than a float32 holds.
    (
        lambda s: layer(s, "0", lora_A=torch.full((2, 4), 1e20), alpha=torch.tensor(1e30)),
        "'0' .* would add numbers up to",
    ),
    (lambda s: layer(s, "x" * 5000, lora_mid=torch.ones(1)), "x{98}…, .* and 1 more are missing"),
    (lambda s: layer(s, "0", alpha=torch.ones(2)), r"'0' .* \[2\]"),
    (lambda s: layer(s, "0", alpha=torch.zeros(())), "'0' .* not positive"),
    (lambda s: layer(s, "2", lora_B=torch.full((3, 1), torch.nan)), "'2' .* NaN"),
    (lambda s: layer(s, "2", lora_A=torch.ones(1, 5)), r"'2' .* \[1, 5\].*needs \[1, 6\]"),
]
BROKEN_FOR_LOADING = [
    *BROKEN,
    (lambda s: without(s, "2.lora_A", "2.lora_B", "2.alpha"), "nothing for '2'"),
    (lambda s: layer(s, "1", **ONE), "has '1', where Sequential has no LoRA layer"),
    (lambda s: layer(s, "0", **ONE), r"'0' .* lora_A \[1, 4\] .*needs \[2, 4\]"),
]
BROKEN_FOR_INJECTING = [
    *BROKEN,
    (lambda s: layer(s, "1", **ONE), "'1' is a Tanh"),
    (lambda s: layer(s, "7.to_q", **ONE), "has '7.to_q', which Sequential lacks"),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN_FOR_LOADING)
def test_loading_refuses_what_does_not_fit_and_changes_nothing(model, state, damage, words):
    with pytest.raises(ValueError, match=words):
        mifo_lora.load_lora(model, damage({k: v * 2 for k, v in state.items()}))
    after = mifo_lora.lora_state_dict(model)
    assert all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize(("damage", "words"), BROKEN_FOR_INJECTING)
def test_inject_from_refuses_what_does_not_fit_and_changes_nothing(state, damage, words):
    model = toy(injected=False)
    modules = list(model)
    with pytest.raises(ValueError, match=words):
        mifo_lora.inject_from(model, damage(state))
    assert all(now is then for now, then in zip(model, modules, strict=True))


CONV = {
    "conv.lora_A": torch.arange(9.0).view(1, 1, 3, 3),
    "conv.lora_B": torch.tensor([2.0, -1.0]).view(2, 1, 1, 1),
    "conv.alpha": torch.tensor(4.0),
}


def net() -> nn.Sequential:
    """A convolution of zeros from one channel to two, of stride 2, and a Linear of zeros."""
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 2, kernel_size=3, stride=2, padding=1, bias=False))
    model.add_module("linear", nn.Linear(2, 2, bias=False))
    return model.requires_grad_(False)


def test_merging_a_state_worked_by_hand():
    model = net()
    model.conv.weight.zero_()
    model.linear.weight.fill_(1)
    linear = {
        "linear.lora_A": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "linear.lora_B": torch.tensor([[3.0, 0.0], [0.0, 4.0]]),
        "linear.alpha": torch.tensor(1.0),
    }
    kept = model.conv.weight
    assert mifo_lora.merge_from(model, {**CONV, **linear}) == ["conv", "linear"]
    assert model.conv.weight is kept and not mifo_lora.has_lora(model)
    # alpha / r is 4 of 1: the kernel times 8, and times -4
    kernel = torch.arange(9.0).view(3, 3)
    assert torch.equal(model.conv.weight[0, 0], 8 * kernel)
    assert torch.equal(model.conv.weight[1, 0], -4 * kernel)
    # alpha / r is 1 of 2: B A = [[3, 6], [0, 4]], half of that on ones
    assert model.linear.weight.tolist() == [[2.5, 4.0], [1.0, 3.0]]


def test_a_merged_convolution_is_the_branch_of_two():
    model, x = net(), torch.linspace(-1, 1, 49).view(1, 1, 7, 7)
    conv = nn.functional.conv2d
    down = conv(x, CONV["conv.lora_A"], stride=2, padding=1)
    expected = model.conv(x) + 4 * conv(down, CONV["conv.lora_B"])
    mifo_lora.merge_from(model, CONV)
    torch.testing.assert_close(model.conv(x), expected)


def test_merging_in_half_precision_rounds_once():
    model = net().half()
    model.conv.weight.fill_(0.1)
    mifo_lora.merge_from(model, {**CONV, "conv.alpha": torch.tensor(2**-12)})
    exact = torch.tensor(0.1).half().float() + 2**-12 * 2 * torch.arange(9.0).view(3, 3)
    assert torch.equal(model.conv.weight[0, 0], exact.half())


def test_a_convolution_is_never_injected():
    model = net()
    before = model.conv.weight.clone()
    with pytest.raises(ValueError, match="'conv' is a Conv2d, and LoRA goes into torch.nn.Linear"):
        mifo_lora.inject_from(model, CONV)
    assert torch.equal(model.conv.weight, before)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "is empty"),
        (
            layer(CONV, "conv", lora_A=torch.ones(1, 1, 1, 1)),
            r"needs \[1, 1, 3, 3\] and \[2, 1, 1,",
        ),
        (
            layer(CONV, "conv", lora_B=torch.ones(3, 1, 1, 1)),
            r"needs \[1, 1, 3, 3\] and \[2, 1, 1,",
        ),
        (layer(CONV, "conv", lora_B=torch.ones(2, 1, 2, 2)), r"shapes .*\[2, 1, 2, 2\]"),
        (layer(CONV, "linear", **ONE), r"'linear' .* needs \[1, 2\] and \[2, 1\]"),
        (layer(CONV, "pool", **ONE), "has 'pool', which Sequential lacks"),
    ],
)
def test_merging_refuses_what_does_not_fit_and_changes_nothing(state, words):
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        mifo_lora.merge_from(model, state)
    assert all(map(torch.equal, model.parameters(), before))


def test_merging_refuses_a_lora_layer(model, state):
    with pytest.raises(ValueError, match="'0' is a LoRA layer already"):
        mifo_lora.merge_from(model, state)


def test_inject_from_refuses_an_injected_model(model, state):
    with pytest.raises(ValueError, match="'0' is a LoRA layer already"):
        mifo_lora.inject_from(model, state)


def test_a_merged_model_is_not_loaded_into(model, state):
    mifo_lora.merge(model)
    with pytest.raises(ValueError, match="'0' is merged into its weight; call unmerge"):
        mifo_lora.load_lora(model, state)


def test_a_file_gives_back_tensors_and_metadata(tmp_path, state):
    path = tmp_path / "lora.safetensors"
    state["0.lora_A"] = state["0.lora_A"].half().T.contiguous().T  # neither float32 nor in order
    mifo_lora.save_lora(path, state, {"tokens": "<asset0>"})
    found, metadata = mifo_lora.read_lora(path)
    assert metadata == {"tokens": "<asset0>"}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert found["0.lora_A"].dtype == torch.float16
    mifo_lora.save_lora(path, state)
    assert mifo_lora.read_lora(path)[1] == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, state, monkeypatch):
    path = tmp_path / "lora.safetensors"
    mifo_lora.save_lora(path, state)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        mifo_lora.save_lora(path, {key: tensor * 2 for key, tensor in state.items()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("content", [None, b"", b"no tensors here, only words"])
def test_an_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "lora.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="lora.safetensors' cannot be read as safetensors"):
        mifo_lora.read_lora(path)
