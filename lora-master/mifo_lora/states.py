"""The state of a LoRA: in and out of a model, and in and out of a file.

A state is a dict of CPU tensors. For each layer, by its dotted name in the model:

    <name>.lora_A [r, in]    <name>.lora_B [out, r]    <name>.alpha []    (strength: alpha / r)

A layer of a convolution, which only files of others have, is merged and never injected:

    <name>.lora_A [r, in, k, k]    <name>.lora_B [out, r, 1, 1]
"""

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from mifo_lora.errors import LoraError, shown
from mifo_lora.injection import check_injectable, lora_layers, put
from mifo_lora.layers import LoRALinear

State = dict[str, torch.Tensor]
LARGEST = torch.finfo(torch.float32).max


class Factors(NamedTuple):
    """One layer of a state: lora_A [r, in], lora_B [out, r] and alpha; or of a convolution."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.lora_A)


def lora_state_dict(model: nn.Module) -> State:
    """A copy of every LoRA layer's factors and alpha, on the CPU (see above for the keys)."""
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{name}.lora_A"] = layer.lora_A.detach().to("cpu", copy=True)
        state[f"{name}.lora_B"] = layer.lora_B.detach().to("cpu", copy=True)
        state[f"{name}.alpha"] = torch.tensor(float(layer.lora_alpha))
    return state


def load_lora(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a state into the LoRA layers of a model, alpha included; all layers or none.

    Raises:
        LoraError: The state and the model differ in layers or shapes, the state is incomplete or
            not finite, or the model is merged. The model is as before then.
    """
    layers, factors = lora_layers(model), split_state(state)
    if missing := layers.keys() - factors.keys():
        raise LoraError(
            f"the LoRA state has nothing for {_some(missing)}; inject only the layers it was "
            "made for, or let inject_from do so."
        )
    if unexpected := factors.keys() - layers.keys():
        raise LoraError(
            f"the LoRA state has {_some(unexpected)}, where {type(model).__name__} has no LoRA "
            "layer; inject the layers it was made for, or let inject_from do so."
        )
    for name, layer in layers.items():
        if layer.merged:
            raise LoraError(f"{name!r} is merged into its weight; call unmerge before loading.")
        _check_shapes(name, layer, factors[name], layer.r)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(factors[name].lora_A)
            layer.lora_B.copy_(factors[name].lora_B)
            layer.set_alpha(factors[name].alpha)


def inject_from(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Inject the very layers of a state, each with its own rank, and load the state into them.

    Returns:
        The dotted names of the replaced modules.

    Raises:
        LoraError: A layer of the state is no plain `nn.Linear` of the model or has another
            shape, or the state is incomplete or not finite. The model is as before then.
    """
    factors = _fitting(model, state, (nn.Linear,))
    with torch.no_grad():
        for name, factor in factors.items():
            # The drawn A is overwritten at once: draw it aside, not from torch's own generator.
            base = model.get_submodule(name)
            layer = LoRALinear(base, factor.rank, factor.alpha, 0.0, torch.Generator())
            layer.lora_A.copy_(factor.lora_A)
            layer.lora_B.copy_(factor.lora_B)
            put(model, name, layer)
    return list(factors)


@torch.no_grad()
def merge_from(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Add what a state adds to the weights of a model, for good; layers of convolutions, too.

    Returns:
        The dotted names of the modules.

    Raises:
        LoraError: As `inject_from`, but a layer may be a plain `nn.Conv2d` as well. The model is
            as before then.
    """
    factors = _fitting(model, state, (nn.Linear, nn.Conv2d))
    for name, factor in factors.items():
        weight = model.get_submodule(name).weight
        up, down = (f.to(weight.device, torch.float32) for f in (factor.lora_B, factor.lora_A))
        product = up.flatten(1) @ down.flatten(1)  # out, in · k · k
        weight.copy_(weight + product.view_as(weight) * (factor.alpha / factor.rank))
    return list(factors)


def _fitting(
    model: nn.Module, state: Mapping[str, torch.Tensor], kinds: tuple[type[nn.Module], ...]
) -> dict[str, Factors]:
    """The layers of a state; a LoraError unless each fits a module of these kinds."""
    factors = split_state(state)
    modules = dict(model.named_modules())
    if unknown := factors.keys() - modules.keys():
        raise LoraError(
            f"the LoRA state has {_some(unknown)}, which {type(model).__name__} lacks; "
            "give the model it was made for."
        )
    check_injectable(model, factors, kinds)
    for name, factor in factors.items():
        _check_shapes(name, modules[name], factor, factor.rank)
    return factors


def save_lora(
    path: str | os.PathLike,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as a safetensors file, which replaces one of that name only when complete.

    Args:
        state: A state of a model, or one in the keys of diffusers or kohya.
        metadata: Words for the header of the file, strings to strings.
    """
    path = Path(path)
    tensors = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")  # no other writer has it
    try:
        with open(aside, "wb") as file:
            file.write(save(tensors, dict(metadata) if metadata else None))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_lora(path: str | os.PathLike) -> tuple[State, dict[str, str]]:
    """Read the tensors (on the CPU, as stored) and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LoraError(
            f"{os.fspath(path)!r} cannot be read as safetensors ({error}); give a LoRA file."
        ) from error


def layer_names(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of a state's layers, each once, in the state's order."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in state))


def split_state(state: Mapping[str, torch.Tensor]) -> dict[str, Factors]:
    """The layers of a state by name; a LoraError if one is incomplete, misshapen or not finite."""
    if not state:
        raise LoraError("the LoRA state is empty; give one with layers.")
    names = layer_names(state)
    expected = {f"{name}.{leaf}" for name in names for leaf in Factors._fields}
    if odd := expected ^ state.keys():
        raise LoraError(
            f"the keys {_some(odd)} are missing or unknown in the LoRA state; each layer has "
            "<name>.lora_A, <name>.lora_B and <name>.alpha."
        )
    return {
        name: _factors(name, *(state[f"{name}.{x}"] for x in Factors._fields)) for name in names
    }


def _factors(name: str, a: torch.Tensor, b: torch.Tensor, alpha: torch.Tensor) -> Factors:
    is_layer = a.ndim == b.ndim and a.ndim in (2, 4) and len(a) == b.shape[1]
    is_layer = is_layer and all(side == 1 for side in b.shape[2:])
    if not is_layer or a.numel() == 0 or b.numel() == 0 or alpha.numel() != 1:
        raise LoraError(
            f"{shown(name)} of the LoRA state has shapes {list(a.shape)}, {list(b.shape)} and "
            f"{list(alpha.shape)}; give lora_A [r, in], lora_B [out, r] and one number alpha."
        )
    if not all(tensor.isfinite().all() for tensor in (a, b, alpha)) or alpha <= 0:
        raise LoraError(
            f"{shown(name)} of the LoRA state has NaN, infinity or an alpha that is not positive; "
            "give a sound file."
        )
    # No entry of (alpha / r) · B A is larger, since each is a sum of r products.
    if not (most := alpha.item() * a.abs().max().item() * b.abs().max().item()) < LARGEST:
        raise LoraError(
            f"{shown(name)} of the LoRA state would add numbers up to {most:.1g} to a weight; "
            "give a sound file."
        )
    return Factors(a, b, alpha.item())


def _check_shapes(name: str, module: nn.Linear | nn.Conv2d, factors: Factors, rank: int) -> None:
    found = [list(factors.lora_A.shape), list(factors.lora_B.shape)]
    out, *sides = module.weight.shape
    needed = [[rank, *sides], [out, rank, *(1 for _ in sides[1:])]]
    if found != needed:
        raise LoraError(
            f"{name!r} of the LoRA state has lora_A {found[0]} and lora_B {found[1]}, where the "
            f"model needs {needed[0]} and {needed[1]}; give the rank and the model it was made for."
        )


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
