"""The pretend device refuses what a real one refuses, computes, and leaves nothing behind."""

import numpy as np
import pytest
import torch
from pretend_device import DeviceTensor, pretend
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagelab.models.device import choose_device, choose_precision


@pytest.fixture(params=["cuda", "mps"])
def kind(request):
    with pretend(request.param):
        yield request.param


@pytest.mark.parametrize(
    "mix",
    [
        lambda ours, theirs: ours + theirs,
        lambda ours, theirs: ours @ theirs,
        lambda ours, theirs: torch.cat([ours, theirs]),
        lambda ours, theirs: torch.stack([ours.sum(), theirs.sum()]),
        lambda ours, theirs: ours.mul_(theirs),
        lambda ours, theirs: theirs * ours.sum(),
        lambda ours, theirs: theirs.mul_(ours),
        lambda ours, theirs: ours.masked_fill(theirs > 0, 0),
        lambda ours, theirs: F.embedding(theirs.long(), ours),
        lambda ours, theirs: F.linear(ours, theirs),
        lambda ours, theirs: ours.index_select(0, theirs[0].long()),
        lambda ours, theirs: ours.__setitem__(ours > 0, theirs[0]),
        lambda ours, theirs: theirs[ours.long()],
        lambda ours, theirs: nn.Linear(2, 2)(ours),
    ],
)
def test_tensors_of_two_devices_are_refused(kind, mix):
    ours, theirs = torch.ones(2, 2, device=kind), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        mix(ours, theirs)


def test_what_a_real_device_allows(kind):
    ours = torch.arange(6.0, device=kind).view(2, 3)
    assert (ours * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert ours[torch.tensor([1])].tolist() == [[3, 4, 5]]
    assert ours[:, [2, 0]].tolist() == [[2, 0], [5, 3]]
    ours[0] = torch.zeros(3)
    ours[:, [1]] = 7
    assert ours.tolist() == [[0, 7, 0], [3, 7, 5]]
    there = torch.zeros(2, 3)
    there.copy_(ours)
    assert type(there) is torch.Tensor and torch.equal(there, ours.cpu())
    assert ours.new_tensor([1, 2]).device == ours.device
    assert float(ours.sum()) == 22 and ours.any() and len(ours) == 2


def test_numbers_come_back_by_way_of_the_cpu_alone(kind):
    ours = torch.tensor([1.0, 2.0], device=kind)
    for convert in (lambda: ours.numpy(), lambda: np.asarray(ours)):
        with pytest.raises(TypeError, match="to numpy"):
            convert()
    back = ours.cpu()
    assert type(back) is torch.Tensor and back.device.type == "cpu"
    ours.add_(1)
    assert back.tolist() == [1, 2] and ours.tolist() == [2, 3]


def test_the_device_is_told_and_followed(kind):
    ours = torch.zeros(2).to(kind)
    assert isinstance(ours, DeviceTensor)
    assert ours.device == torch.device(kind, 0) and ours.is_cuda == (kind == "cuda")
    for made in (torch.ones_like(ours), torch.zeros(3, device=ours.device), ours[:1], ours.half()):
        assert made.device == ours.device
    assert ours.to(kind) is ours and ours.to(f"{kind}:0") is ours
    assert torch.empty(1, device="meta").device.type == "meta"


def test_float64_on_mps_is_refused():
    with pretend("mps"):
        for make in (
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.zeros(2, device="mps").double(),
            lambda: torch.zeros(2).double().to("mps"),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
    with pretend("cuda"):
        assert torch.zeros(2, device="cuda").double().dtype == torch.float64


def test_a_device_has_draws_of_its_own(kind):
    torch.manual_seed(0)
    here = torch.randn(4)
    torch.manual_seed(0)
    ours = torch.randn(4, device=kind)
    assert not torch.equal(ours.cpu(), here)
    assert torch.equal(torch.randn(4), here)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(4, device=kind, generator=torch.Generator())


def test_a_module_keeps_its_parameters_when_it_moves(kind):
    module = nn.Linear(2, 2)
    before = list(module.parameters())
    module.to(kind)
    assert all(one is other for one, other in zip(before, module.parameters(), strict=True))
    assert all(isinstance(parameter, nn.Parameter) for parameter in before)
    module.load_state_dict({name: v.cpu() for name, v in module.state_dict().items()})
    assert module.weight.device.type == kind
    assert module.cpu().weight.device.type == "cpu"


@pytest.mark.parametrize("foreach", [True, False])
def test_optimisation_is_that_of_the_cpu(kind, foreach):
    results = []
    for device in ("cpu", kind):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
        inputs = torch.randn(5, 3)
        module.to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            module(inputs.to(device)).square().mean().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in module.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_reaches_layers_that_run_twice(kind, dtype):
    module, seen = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2)).to(kind), []
    module[0].register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    ours = torch.ones(1, 2, device=kind, requires_grad=True)
    with torch.autocast(kind, dtype):
        out = checkpoint(module, ours, use_reentrant=False)
        assert F.layer_norm(out, (2,)).dtype == torch.float32
    out.float().sum().backward()
    assert seen == [dtype, dtype]
    assert module[0].weight.grad.dtype == torch.float32 and ours.grad.device.type == kind


def test_the_scale_falls_at_an_overflow_and_grows_else(kind):
    weight = nn.Parameter(torch.ones(2).to(kind))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler(kind, init_scale=4.0, growth_interval=1)
    for factor in (1e38, 1.0):
        optimizer.zero_grad()
        (scaler.scale(weight.sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert weight.tolist() == [0, 0]


def test_waiting_for_the_device_is_counted():
    with pretend("cuda") as device:
        ours = torch.ones(2).to("cuda")
        (ours + 1).sum()
        assert device.waits == 0
        ours.cpu(), ours.tolist(), ours.sum().item(), bool(ours.any())
        assert device.waits == 4
        ours[ours > 0]
        assert device.waits == 5


def test_devices_and_precisions_are_chosen():
    with pretend("cuda"):
        assert choose_device("auto") == "cuda" and choose_device("cuda:0") == "cuda:0"
        assert choose_precision("auto", "cuda") == torch.bfloat16
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(1, device="cuda:1")
        with pytest.raises(ValueError, match="not available"):
            choose_device("mps")
    with pretend("mps"):
        assert choose_device("auto") == "mps"


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_nothing_is_left_behind(kind):
    there = torch.cuda.is_available(), torch.backends.mps.is_available()
    with pytest.raises(KeyError), pretend(kind):
        ours = torch.ones(2, device=kind)
        raise KeyError
    assert (torch.cuda.is_available(), torch.backends.mps.is_available()) == there
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert type(torch.ones(2) + 1) is torch.Tensor
    assert (ours + 1).cpu().tolist() == [2, 2]
    if not any(there):
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(2, device=kind)
