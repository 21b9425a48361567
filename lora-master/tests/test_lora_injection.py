"""Injecting into a model, training, merging, removing; what is refused."""

import re

import pytest
import torch
from torch import nn

import mifo_lora
from mifo_lora import LoRALinear


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8, bias=False)
        self.to_k = nn.Linear(8, 8, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x):
        return self.to_out[0](self.to_q(x) * self.to_k(x))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x):
        return self.attn2(self.attn1(self.norm(x)))


ATTN2 = ["attn2.to_q", "attn2.to_k", "attn2.to_out.0"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def randomise(model):
    for layer in mifo_lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (ATTN2, ATTN2),
        ("to_q", ["attn1.to_q", "attn2.to_q"]),
        (["to_out.0", "attn1.to_q"], ["attn1.to_q", "attn1.to_out.0", "attn2.to_out.0"]),
        (re.compile(r"attn\d\.to_[kq]"), [f"attn{i}.to_{x}" for i in (1, 2) for x in "qk"]),
        (["attn1.to_k", re.compile(r".*2\.to_k")], ["attn1.to_k", "attn2.to_k"]),
        (lambda name, m: isinstance(m, nn.Linear) and m.bias is None and "2" in name, ATTN2[:2]),
    ],
)
def test_targets_choose_and_the_rest_stays(model, targets, names):
    assert mifo_lora.inject(model, targets, rank=2) == names
    assert list(mifo_lora.lora_layers(model)) == names
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert len(linears) + len(names) == 6


def test_a_fresh_injection_changes_nothing_and_alpha_is_the_rank(model, x):
    before = model(x)
    mifo_lora.inject(model, ATTN2, rank=2)
    assert torch.equal(model(x), before)
    assert all(layer.scaling == 1 for layer in mifo_lora.lora_layers(model).values())
    randomise(model)
    assert not torch.allclose(model(x), before)


def test_a_seed_fixes_every_layer_and_layers_differ(model):
    twin = Toy()
    for net in (model, twin):
        mifo_lora.inject(net, ATTN2, rank=2, generator=torch.Generator().manual_seed(5))
    a, b = (mifo_lora.lora_state_dict(net) for net in (model, twin))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["attn2.to_q.lora_A"], a["attn2.to_k.lora_A"])


def test_a_is_drawn_layer_after_layer_from_one_stream(model):
    """Uniform within ±1/√in, in the model's order, whatever the order of the targets."""
    mifo_lora.inject(model, ATTN2[::-1], rank=2, generator=torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    for name in ATTN2:
        a = torch.empty(2, 8).uniform_(-(8**-0.5), 8**-0.5, generator=draw)
        torch.testing.assert_close(model.get_submodule(name).lora_A.detach(), a)
        assert not model.get_submodule(name).lora_B.any()


def test_only_the_lora_is_trained(model, x):
    mifo_lora.inject(model, ATTN2, rank=2)
    mifo_lora.mark_only_lora_trainable(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = mifo_lora.lora_parameters(model)
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):  # B is zero at first, so A moves in the second step
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    graded = {n for n, p in model.named_parameters() if p.grad is not None}
    assert changed == graded == {f"{name}.lora_{x}" for name in ATTN2 for x in "AB"}
    assert len(parameters) == 6


def test_injection_freezes_the_base_even_unmarked(model):
    mifo_lora.inject(model, ATTN2, rank=2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {*(f"{name}.weight" for name in ATTN2), "attn2.to_out.0.bias"}


def test_merge_and_unmerge_reach_every_layer(model, x):
    mifo_lora.inject(model, ATTN2, rank=2)
    randomise(model)
    before, y = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    mifo_lora.merge(model)
    torch.testing.assert_close(model(x), y)
    assert all(
        not torch.equal(model.state_dict()[f"{n}.weight"], before[f"{n}.weight"]) for n in ATTN2
    )
    mifo_lora.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("merged", [False, True])
def test_remove_restores_the_very_modules(model, x, merged):
    model.attn2.to_q.weight.requires_grad_(False)
    modules, y = dict(model.named_modules()), model(x)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    mifo_lora.inject(model, ATTN2, rank=2)
    randomise(model)
    if merged:
        mifo_lora.merge(model)
    model.eval()
    mifo_lora.remove(model)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert torch.equal(model(x), y)
    assert not any(module.training for module in model.modules())


def test_remove_can_leave_the_lora_in_the_weights(model, x):
    plain_keys = model.state_dict().keys()
    mifo_lora.inject(model, ATTN2, rank=2)
    randomise(model)
    y = model(x)
    mifo_lora.remove(model, keep_merged=True)
    assert model.state_dict().keys() == plain_keys
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["to_q", "to_x", "o_q"], r"\['to_x', 'o_q'\] match no module of Toy"),
        ([], "match no module"),
        (re.compile(r"attn2\.to_"), "match no module"),
        (re.compile("attn2"), "'attn2' is a Attention"),
        ("to_out", "'attn1.to_out' is a ModuleList"),
        (lambda name, module: name == "norm", "'norm' is a LayerNorm"),
        (lambda name, module: False, "match no module"),
    ],
)
def test_targets_that_cannot_be_are_refused_and_nothing_is_replaced(model, targets, words):
    with pytest.raises(ValueError, match=words):
        mifo_lora.inject(model, targets, rank=2)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_layer_is_not_injected_twice(model):
    mifo_lora.inject(model, "attn2.to_q", rank=2)
    with pytest.raises(ValueError, match="'attn2.to_q' is a LoRA layer already"):
        mifo_lora.inject(model, "to_q", rank=2)
    assert list(mifo_lora.lora_layers(model)) == ["attn2.to_q"]


class Shared(nn.Module):
    """A layer of its own, and a head that shares its weight with what `share` makes of it."""

    def __init__(self, share):
        super().__init__()
        self.own, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other = share(self.head)


def tied(module, head):
    module.weight = head.weight
    return module


@pytest.mark.parametrize(
    "share",
    [
        lambda head: tied(nn.Embedding(8, 8), head),
        lambda head: tied(nn.Linear(8, 8), head),
        lambda head: head,
    ],
    ids=["an embedding", "another Linear", "itself under another name"],
)
def test_a_weight_that_another_module_shares_is_refused_and_nothing_is_replaced(share):
    model = Shared(share)
    with pytest.raises(mifo_lora.LoraError, match="^'head' shares its weight with 'other.weight'"):
        mifo_lora.inject(model, ["own", "head"], rank=2)
    assert not mifo_lora.has_lora(model)
    assert mifo_lora.inject(model, "own", rank=2) == ["own"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_computed_is_refused(norm):
    model = nn.Sequential(norm(nn.Linear(8, 8)))
    with pytest.raises(mifo_lora.LoraError, match="^the weight of '0' is computed"):
        mifo_lora.inject(model, "0", rank=2)


def test_a_linear_whose_forward_is_passed_by_is_refused():
    with pytest.raises(ValueError, match="'0.out_proj' is a NonDynamicallyQuantizableLinear"):
        mifo_lora.inject(nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj", rank=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": 2, "alpha": 0}, "alpha is 0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 2, "dropout": 1}, "dropout is 1"),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, words):
    with pytest.raises(ValueError, match=words):
        mifo_lora.inject(model, ATTN2, **settings)


@pytest.mark.parametrize(
    "verb",
    [
        mifo_lora.lora_parameters,
        mifo_lora.lora_state_dict,
        mifo_lora.mark_only_lora_trainable,
        mifo_lora.merge,
        mifo_lora.remove,
        mifo_lora.unmerge,
    ],
)
def test_a_model_without_lora_is_told_so(model, verb):
    with pytest.raises(ValueError, match="Toy has no LoRA layers; call inject first"):
        verb(model)
    assert all(p.requires_grad for p in model.parameters())
