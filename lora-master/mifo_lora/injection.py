"""Put LoRA layers into a model, and take them out again."""

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from mifo_lora.errors import LoraError
from mifo_lora.layers import LoRALinear

Target = str | re.Pattern
Predicate = Callable[[str, nn.Module], bool]


def inject(
    model: nn.Module,
    targets: Target | Iterable[Target] | Predicate,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Replace the targeted Linear modules by `LoRALinear`; nothing is replaced on an error.

    Args:
        targets: Which modules. A string matches a dotted name or its end at a dot (`attn2.to_q`),
            a compiled pattern matches a whole dotted name, a callable `(name, module) -> bool`
            decides itself. Each string and pattern has to match something.
        rank: Rank r of the branch, at least 1.
        alpha: The branch is scaled by alpha / rank; by default alpha is the rank.
        dropout: Probability in [0, 1) of dropping an input of the branch while training.
        generator: Draws A, layer after layer in the model's order; torch's own by default.

    Returns:
        The dotted names of the replaced modules, in the model's order.

    Raises:
        LoraError: A target matches nothing, or something other than a plain `nn.Linear`.
    """
    if not isinstance(rank, int) or rank < 1:
        raise LoraError(f"rank is {rank}; give a whole number of at least 1.")
    alpha = float(rank) if alpha is None else float(alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise LoraError(f"alpha is {alpha}; give a positive number, or None for the rank.")
    if not 0 <= dropout < 1:
        raise LoraError(f"dropout is {dropout}; give a probability in [0, 1).")

    names = _find(model, targets)
    check_injectable(model, names)
    for name in names:
        base = model.get_submodule(name)
        put(model, name, LoRALinear(base, rank, alpha, dropout, generator))
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by dotted name; a model without any is a LoraError."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise LoraError(f"{type(model).__name__} has no LoRA layers; call inject first.")
    return layers


def has_lora(model: nn.Module) -> bool:
    """Is there a LoRA layer in the model?"""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every LoRA layer, in the model's order: what an optimiser gets."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def mark_only_lora_trainable(model: nn.Module) -> None:
    """Let A and B have gradients, and no other parameter of the model."""
    trainable = lora_parameters(model)
    model.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Add every LoRA branch to its weight: same output, no extra work, no training.

    The sums are made in float32 and rounded to the weight's dtype. The weights from before are
    kept beside (a second copy of these weights in memory) until `unmerge` or `remove`.
    """
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every weight is as before, to the bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module, keep_merged: bool = False) -> None:
    """Undo `inject`: the original modules return, with their weights and their requires_grad.

    With `keep_merged` the branches are merged into these weights first, and stay: what is left is
    a plain model of the same output, to be saved as such.
    """
    for name, layer in lora_layers(model).items():
        if keep_merged:
            layer.merge()
        else:
            layer.unmerge()
        put(model, name, layer.release())


def check_injectable(
    model: nn.Module, names: Iterable[str], kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> None:
    """Raise a LoraError unless every named module is a plain one, with a weight of its own."""
    owners: dict[int, list[str]] = {}
    for owned, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owned)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LoRALinear):
            raise LoraError(f"{name!r} is a LoRA layer already; narrow the targets, or remove it.")
        # A subclass may use its weight without calling forward, and so pass a LoRA by.
        if type(module) not in kinds:
            raise LoraError(
                f"{name!r} is a {type(module).__name__}, and LoRA goes into "
                f"{' and '.join(f'torch.nn.{kind.__name__}' for kind in kinds)} only; "
                "narrow the targets."
            )
        if id(module.weight) not in owners:
            raise LoraError(
                f"the weight of {name!r} is computed, as by weight_norm, and cannot be shared; "
                "narrow the targets."
            )
        if others := [each for each in owners[id(module.weight)] if each != f"{name}.weight"]:
            raise LoraError(
                f"{name!r} shares its weight with {others[0]!r}, which a merged LoRA would change "
                "as well; narrow the targets."
            )


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the module of that dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _find(model: nn.Module, targets: Target | Iterable[Target] | Predicate) -> list[str]:
    """Names of the modules that the targets match, in the model's order."""
    if callable(targets) or isinstance(targets, Target):
        targets = [targets]
    targets = list(targets)
    hits = [
        {name for name, module in model.named_modules() if name and _matches(target, name, module)}
        for target in targets
    ]
    idle = [target for target, names in zip(targets, hits, strict=True) if not names]
    if idle or not targets:
        raise LoraError(
            f"the targets {idle} match no module of {type(model).__name__}; "
            "compare them with the names in model.named_modules()."
        )
    wanted = set.union(*hits)
    return [name for name, _ in model.named_modules() if name in wanted]


def _matches(target: Target | Predicate, name: str, module: nn.Module) -> bool:
    if isinstance(target, str):
        return name == target or name.endswith(f".{target}")
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    return target(name, module)
