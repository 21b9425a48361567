"""Time, memory and operations of a piece of work."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK_NAMES = {"wall": "wall clock", "cpu": "processor time"}


def _attention(query, key, value, *rest, **options) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient, query, key, value, *rest, **options) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


class OperationCounter(TorchDispatchMode):
    """Counts by torch's formulas. (Its own counter cannot see through ``autograd.grad``.)"""

    formulas = flop_registry | {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), options=None):
        options = options or {}
        formula = self.formulas.get(function.overloadpacket)
        if formula is None:  # under inference mode, convolutions and others arrive whole
            with self:
                out = function.decompose(*args, **options)
            if out is not NotImplemented:
                return out
        out = function(*args, **options)
        if formula:
            self.total += formula(*args, **options, out_val=out)
        return out


def seconds(work: Callable, device: str, clock: str) -> float:
    """One run, all of the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = CLOCKS[clock]()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def peak_bytes(work: Callable, device: str) -> int:
    """The most that torch had allocated during a run beyond what it had before.

    On a CPU it is read from the allocations that torch's profiler records: buffers inside the
    kernels' libraries do not count.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def weight_bytes(base) -> int:
    """What the weights of the UNet, the text encoder and the VAE take."""
    modules = (base.unet, base.text_encoder, base.vae)
    return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())


def operations(work: Callable) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of a run."""
    with OperationCounter() as counter:
        work()
    return counter.total


def peak_rate(dtype: torch.dtype, device: str, clock: str) -> float:
    """Operations a second of a square matrix product, the best of five: the unit's own rate."""
    side = 8192 if device == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    times = [seconds(lambda: matrix @ matrix, device, clock) for _ in range(6)]
    return 2 * side**3 / min(times[1:])
