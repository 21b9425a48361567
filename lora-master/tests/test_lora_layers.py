"""The layer: its numbers, its dtypes, merging."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mifo_lora import LoRALinear

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def hand_made() -> LoRALinear:
    """W = [[1, 2], [3, 4]], b = [1, 0]; A = [1, 2], B = [3, 4]ᵀ, alpha / r = 2."""
    base = nn.Linear(2, 2)
    base.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    base.bias.data = torch.tensor([1.0, 0.0])
    layer = LoRALinear(base, rank=1, alpha=2)
    layer.lora_A.data = torch.tensor([[1.0, 2.0]])
    layer.lora_B.data = torch.tensor([[3.0], [4.0]])
    return layer


def random_layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> LoRALinear:
    base = nn.Linear(8, 6, bias=bias, dtype=dtype)
    layer = LoRALinear(base, rank=3, alpha=6)
    nn.init.normal_(layer.lora_B)
    return layer


def test_output_and_merged_weight_worked_by_hand():
    layer = hand_made()
    # W x + b = [4, 7]; A x = 3, B A x = [9, 12], twice that [18, 24].
    x = torch.tensor([1.0, 1.0])
    assert layer(x).tolist() == [22.0, 31.0]
    layer.merge()
    # 2 B A = [[6, 12], [8, 16]].
    assert layer.weight.tolist() == [[7.0, 14.0], [11.0, 20.0]]
    assert layer(x).tolist() == [22.0, 31.0]


def test_alpha_sets_the_strength():
    layer = hand_made()
    layer.set_alpha(0.5)
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [4 + 4.5, 7 + 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_fresh_layer_is_its_base_and_a_linear(dtype):
    base = nn.Linear(8, 6, dtype=dtype)
    layer = LoRALinear(base, rank=3, alpha=3)
    x = torch.randn(5, 8, dtype=dtype)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert layer.weight.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.lora_A.abs().min() > 0
    assert torch.equal(layer(x), base(x))


def test_a_is_drawn_as_a_linear_is_and_fixed_by_its_generator():
    base = nn.Linear(64, 4)
    before = torch.get_rng_state()
    first, second, other = (
        LoRALinear(base, 32, 32, generator=torch.Generator().manual_seed(s)).lora_A
        for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    # Uniform within ±1/√in = ±1/8.
    assert 0.12 < first.abs().max() <= 0.125
    assert first.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_branch_of_a_half_precision_base_computes_in_float32(dtype):
    layer = random_layer(dtype)
    # B A is as before, but B alone is infinite in float16 and A is below its smallest number.
    layer.lora_A.data *= 1e-9
    layer.lora_B.data *= 1e9
    x = torch.randn(5, 8, dtype=dtype)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    exact += x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T * 2
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-2, atol=2e-2)


def test_under_autocast_the_output_is_autocasts_and_gradients_are_float32():
    layer = random_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, 8))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.weight.grad is None and layer.bias.grad is None


def test_dropout_acts_on_the_branch_while_training_only():
    base = nn.Linear(8, 6)
    layer = LoRALinear(base, rank=3, alpha=3, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), base(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(dtype, bias):
    layer = random_layer(dtype, bias)
    x = torch.randn(5, 8, dtype=dtype)
    weight, y = layer.weight.clone(), layer(x)
    parameter = layer.weight
    layer.merge()
    assert not torch.equal(layer.weight, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    assert layer.weight is parameter
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), y)


def test_merging_in_half_precision_rounds_the_sum_alone():
    """Numbers from 1 on are 2⁻¹⁰ apart in fp16: a little more than half of that rounds up.

    The branch alone would be rounded to 2⁻¹¹, which is half of that, and rounds to the even 1.
    """
    base = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    base.weight.data.fill_(1)
    layer = LoRALinear(base, rank=1, alpha=1)
    layer.lora_A.data.fill_(1)
    layer.lora_B.data.fill_(2**-11 + 2**-23)
    layer.merge()
    assert layer.weight.item() == 1 + 2**-10


def test_merging_happens_in_merge_alone_and_once():
    layer = random_layer()
    weight = layer.weight.clone()
    layer.eval()
    assert torch.equal(layer.weight, weight)
    layer.merge()
    merged = layer.weight.clone()
    layer.merge()
    layer.train()
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_unmerging_follows_a_change_of_dtype():
    layer = random_layer()
    weight = layer.weight.clone()
    layer.merge()
    layer.to(torch.float16)
    layer.unmerge()
    assert torch.equal(layer.weight, weight.half())


def test_release_hands_over_weights_that_were_replaced():
    layer = random_layer()
    replaced = {key: tensor + 1 for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(replaced, assign=True)
    base = layer.release()
    assert base.weight is layer.weight and base.bias is layer.bias
    assert torch.equal(base.weight, replaced["weight"])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_equal_and_independent(twin):
    layer = random_layer()
    x = torch.randn(5, 8)
    other = twin(layer)
    assert torch.equal(other(x), layer(x))
    assert other.release().weight is other.weight
    other.lora_B.data.zero_()
    assert not torch.equal(other(x), layer(x))
