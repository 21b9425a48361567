"""A pretend "cuda" or "mps" device, for machines without one.

    with pretend("cuda"):
        semantic_learning.main(["--device", "cuda", ...])

A tensor on the device, a :class:`DeviceTensor`, keeps its numbers in a tensor of the CPU, but says
that it is on the device, and is refused where a real one would be: beside tensors of the CPU, by
numpy, and in float64 on mps. All arithmetic is the CPU's own, in the asked dtype. The gradient
scaler is torch's; autocast, which goes by a tensor's device below Python, is imitated. A module
keeps its parameters when it moves, as on a real device. What is drawn on the device comes from a
stream of its own, as its numbers would be other ones than the CPU's, and it has no generators.

Below Python torch takes these tensors for ones of ``meta:1``, which is never asked for otherwise
(plain ``meta`` tensors, of models that are being built, stay what they are). diffusers is imported
here, for what it imports must find the machine's own devices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

STAND_IN = torch.device("meta", 1)
DOUBLES = (torch.float64, torch.complex128)
#: Operations between devices.
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
#: Operations that take indices on the CPU, too; the indices are their second argument.
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
#: Operations that refuse even single numbers of another device.
JOINED = ("aten::cat", "aten::stack")
#: Operations whose result the host waits for.
WAITED_FOR = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::unique_dim")
#: Functions that make a tensor of numbers of the host.
CONVERTERS = (torch.tensor, torch.as_tensor, torch.asarray)
#: Functions that autocast runs in half precision, of torch's list those that are used,
HALVED = """linear conv1d conv2d conv_transpose2d matmul __matmul__ mm bmm addmm baddbmm einsum
    scaled_dot_product_attention""".split()  # noqa: SIM905
#: and in float32.
WIDENED = """softmax log_softmax softplus layer_norm group_norm norm cosine_similarity cross_entropy
    l1_loss mse_loss smooth_l1_loss exp log log1p pow __pow__ reciprocal rsqrt sum prod cumsum
    dist""".split()  # noqa: SIM905


class DeviceTensor(Tensor):
    """A tensor on a :class:`PretendDevice`, whose numbers are in ``content``, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, content: Tensor, pretended: "PretendDevice"):
        layout = {"strides": content.stride(), "storage_offset": content.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(
            cls, content.size(), dtype=content.dtype, device=STAND_IN, **layout
        )
        tensor.content, tensor.pretended = content, pretended
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tensors = _tensors([*args, *(kwargs or {}).values()])
        pretended = next(t.pretended for t in tensors if isinstance(t, DeviceTensor))
        return pretended.__torch_dispatch__(func, types, args, kwargs)

    @property
    def device(self) -> torch.device:
        return self.pretended.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.device.index

    def untyped_storage(self):
        return self.content.untyped_storage()

    def tolist(self):
        self.pretended.waits += 1
        return self.content.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __array__(self, *_, **__):
        return self.numpy()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = torch.tensor(data, dtype=dtype or self.dtype).to(device or STAND_IN)
        return made.requires_grad_(requires_grad)

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)

    def __repr__(self, **_):
        return f"{self.content!r} on {self.device}"


def _index(index):
    """Lists in an index as tensors, which torch makes where the indexed tensor is."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


class PretendDevice(TorchDispatchMode):
    """The device itself; ``waits`` counts how often the host has waited for a result of it.

    As a mode it sees every operation, for those that make a tensor on the device or move one there.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits = 0
        self._draws = torch.Generator().manual_seed(20_000_003).get_state()

    def put(self, content: Tensor) -> DeviceTensor:
        if self.device.type == "mps" and content.dtype in DOUBLES:
            raise TypeError(f"Cannot convert a MPS Tensor to {content.dtype} dtype")
        return DeviceTensor(content, self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        given = _tensors([*args, *kwargs.values()])
        here = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
        asked = kwargs.get("device")
        is_ours = bool(here) if asked is None else asked == STAND_IN
        if not (here or is_ours):
            return func(*args, **kwargs)
        if here and name not in COPIES:
            _check_together(name, args, given, self.device)
        if asked is not None:
            kwargs = kwargs | {"device": torch.device("cpu") if is_ours else asked}
        if is_ours and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{self.device.type}' device type for generator")
        comes_back = name in COPIES and not (is_ours and isinstance(args[0], DeviceTensor))
        by_truth = name in INDEXING and any(t.dtype == torch.bool for t in _tensors(args[1:2]))
        self.waits += bool(here) and (comes_back or by_truth or name in WAITED_FOR)
        args = _each(_content, args)
        kwargs = {key: _each(_content, value) for key, value in kwargs.items()}
        out = self._drawn(func, args, kwargs) if is_ours else func(*args, **kwargs)
        for tensor in here:
            if tensor.shape != tensor.content.shape or tensor.dtype != tensor.content.dtype:
                raise NotImplementedError(f"{name} changes a tensor's shape or dtype in place")
        # An operation in place returns what it was given.
        known = {id(_content(tensor)): tensor for tensor in given}

        def handed_out(tensor: Tensor) -> Tensor:
            if id(tensor) in known:
                return known[id(tensor)]
            return self.put(tensor) if is_ours else tensor

        return _each(handed_out, out)

    def _drawn(self, func, args: tuple, kwargs: dict):
        """The result of an operation, with the device's own stream if it draws something."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        state = torch.get_rng_state()
        torch.set_rng_state(self._draws)
        try:
            return func(*args, **kwargs)
        finally:
            self._draws = torch.get_rng_state()
            torch.set_rng_state(state)

    def stand_in(self, value):
        """STAND_IN for the device or its name, anything else as it is."""
        if isinstance(value, str) and value.split(":")[0] == self.device.type:
            value = torch.device(value)
        if not isinstance(value, torch.device) or value.type != self.device.type:
            return value
        if value.index:
            raise RuntimeError(f"{value}: invalid device ordinal")
        return STAND_IN


def _content(tensor: Tensor) -> Tensor:
    return tensor.content if isinstance(tensor, DeviceTensor) else tensor


def _each(change: Callable[[Tensor], Tensor], value):
    """A value in which each tensor is changed, also those in lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_each(change, part) for part in value])
    return value


def _tensors(values: Sequence) -> list[Tensor]:
    """The tensors among some values, also those in lists."""
    lists = (_tensors(value) if isinstance(value, list | tuple) else [value] for value in values)
    return [value for some in lists for value in some if isinstance(value, Tensor)]


def _check_together(name: str, args: tuple, tensors: Sequence[Tensor], device) -> None:
    """Raises RuntimeError for tensors of the CPU, apart from single numbers and indices."""
    if name in INDEXING:
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        tensors = _tensors([args[0], *args[2:]])
    for tensor in tensors:
        if not isinstance(tensor, DeviceTensor) and (tensor.dim() or name in JOINED):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {tensor.device}! ({name}, {list(tensor.shape)})"
            )


class _Calls(TorchFunctionMode):
    """Sees every call of torch's functions, for the device among its arguments."""

    def __init__(self, pretended: PretendDevice):
        super().__init__()
        self.pretended = pretended

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is torch.device or "autocast" in name:
            return func(*args, **kwargs)
        if name in HALVED or name in WIDENED:
            args, kwargs = self._autocast(name, args, kwargs)
        args = tuple(map(self.pretended.stand_in, args))
        kwargs = {key: self.pretended.stand_in(value) for key, value in kwargs.items()}
        if func is Tensor.cuda and self.pretended.device.type == "cuda":
            return args[0].to(STAND_IN)
        if func in CONVERTERS and kwargs.get("device") == STAND_IN:
            trains = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs | {"device": "cpu"}).to(STAND_IN).requires_grad_(trains)
        return func(*args, **kwargs)

    def _autocast(self, name: str, args: tuple, kwargs: dict) -> tuple:
        kind = self.pretended.device.type
        if not torch.is_autocast_enabled(kind):
            return args, kwargs
        dtype = torch.get_autocast_dtype(kind) if name in HALVED else torch.float32

        def cast(tensor: Tensor) -> Tensor:
            is_cast = tensor.is_floating_point() and tensor.dtype not in DOUBLES
            return tensor.to(dtype) if is_cast and isinstance(tensor, DeviceTensor) else tensor

        return _each(cast, args), {key: _each(cast, value) for key, value in kwargs.items()}


#: What else is asked of a device.
ANSWERS = {
    "torch.cuda.device_count": 1,
    "torch.cuda.current_device": 0,
    "torch.cuda.get_device_capability": (8, 0),
    "torch.cuda.get_device_name": "a pretend device",
    "torch.cuda.is_bf16_supported": True,
    "torch.cuda.synchronize": None,
    "torch.cuda.empty_cache": None,
    "torch.backends.mps.is_macos_or_newer": True,
    "torch.mps.synchronize": None,
    "torch.mps.empty_cache": None,
}


@contextmanager
def pretend(kind: str) -> Iterator[PretendDevice]:
    """Within, there is a device of a kind, "cuda" or "mps", and no other but the CPU."""
    pretended = PretendDevice(kind)
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        there = {"torch.cuda.is_available": "cuda", "torch.backends.mps.is_available": "mps"}
        answers = {name: kind == other for name, other in there.items()} | ANSWERS
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        _foreach_supported_types.append(DeviceTensor)
        stack.callback(_foreach_supported_types.remove, DeviceTensor)
        # A parameter that moves stays the same object.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        # Checkpointed layers run once more in the backward pass, which torch runs out of sight.
        calls, run_backward = _Calls(pretended), torch.autograd._engine_run_backward

        def seen_backward(*args, **kwargs):
            with calls:
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", seen_backward))
        stack.enter_context(pretended)
        stack.enter_context(calls)
        yield pretended
