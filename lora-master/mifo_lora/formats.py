"""The keys of other programs: diffusers (as peft writes them) and kohya (A1111, ComfyUI).

Both are flat files over a whole Stable Diffusion pipeline; a *part* of it is "unet" or
"text_encoder". Whatever the installed transformers calls its modules, files name those of the
text encoder below `text_model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mifo_lora.alphas import peft_alphas
from mifo_lora.errors import LoraError, shown
from mifo_lora.states import Factors, State, layer_names, split_state


@dataclass(frozen=True)
class _Format:
    """A key is the prefix of its part, the module's name and the ending of its tensor."""

    program: str
    prefixes: dict[str, str]  # by part
    dot: str  # what stands for a dot in a module's name
    endings: dict[str, str]  # by leaf of a state

    def stem(self, name: str, part: str) -> str:
        return self.prefixes[part] + name.replace(".", self.dot)

    def leaf(self, key: str) -> str | None:
        """Which leaf of a state a key ends like."""
        return next((leaf for leaf, end in self.endings.items() if key.endswith(end)), None)

    def modules(self, model: nn.Module, part: str) -> dict[str, list[tuple[str, nn.Module]]]:
        """The modules, Linear or Conv2d, that the stem of a key may stand for, with their names."""
        stems = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for alias in _file_names(name, part):
                    stems.setdefault(self.stem(alias, part), []).append((name, module))
        return stems


_DIFFUSERS = _Format(
    program="diffusers",
    prefixes={"unet": "unet.", "text_encoder": "text_encoder."},
    dot=".",
    endings={"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "alpha": ".alpha"},
)
_KOHYA = _Format(
    program="kohya",
    prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
    dot="_",
    endings={"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight", "alpha": ".alpha"},
)


def to_diffusers(state: Mapping[str, torch.Tensor], part: str = "unet") -> State:
    """A state in the keys that `StableDiffusionPipeline.load_lora_weights` reads.

    Readers take the rank for alpha, so the factor alpha / rank is multiplied into B.
    """
    layers = split_state(state)
    scaled = {name: f._replace(lora_B=f.lora_B * (f.alpha / f.rank)) for name, f in layers.items()}
    return _spell(_DIFFUSERS, scaled, part, leaves=("lora_A", "lora_B"))


def to_kohya(state: Mapping[str, torch.Tensor], part: str = "unet") -> State:
    """A state in kohya's keys, dots as underscores, each layer with its `.alpha`.

    diffusers reads one alpha per part and ignores others: should a layer's alpha differ from the
    first layer's, it is written as the first's, and the ratio is multiplied into B.
    """
    layers = split_state(state)
    alpha = next(iter(layers.values())).alpha
    even = {
        name: f._replace(lora_B=f.lora_B * (f.alpha / alpha), alpha=alpha)
        for name, f in layers.items()
    }
    return _spell(_KOHYA, even, part, leaves=("lora_A", "lora_B", "alpha"))


def from_diffusers(
    file: Mapping[str, torch.Tensor],
    model: nn.Module,
    part: str = "unet",
    metadata: Mapping[str, str] | None = None,
) -> State:
    """The state of one part of a file in diffusers' keys; empty when the file lacks that part.

    Args:
        file: All tensors of the file, of whatever parts.
        model: The module of that part, injected or not: its Linear and Conv2d modules give the
            names.
        metadata: Metadata of the file; peft writes alphas there, under `lora_adapter_metadata`.
            A layer without alpha has its rank for it.

    Raises:
        LoraError: A key is of another format, or names no such module of the model; or the
            metadata are not peft's.
    """
    state = _read(_DIFFUSERS, file, model, part)
    find_alpha = peft_alphas(metadata or {}, part)
    for name in layer_names(state):
        if (alpha := find_alpha(name)) is not None:
            state.setdefault(f"{name}.alpha", torch.tensor(alpha))
    return _with_alphas(state)


def from_kohya(file: Mapping[str, torch.Tensor], model: nn.Module, part: str = "unet") -> State:
    """The state of one part of a file in kohya's keys; empty when the file lacks that part.

    An underscore of the file is one or a dot: `model`, injected or not, tells which. A layer
    without alpha has its rank for it. Raises LoraErrors as `from_diffusers` does.
    """
    return _with_alphas(_read(_KOHYA, file, model, part))


def from_file(
    file: Mapping[str, torch.Tensor],
    models: Mapping[str, nn.Module],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, State]:
    """The states of all parts of a file in kohya's or diffusers' keys, whichever it has.

    Args:
        file: All tensors of the file.
        models: The modules by part, without LoRA.
        metadata: Metadata of the file, as for `from_diffusers`.

    Raises:
        LoraError: A key fits no Linear or Conv2d module of the models by its name or by the size
            of its tensor (the message says how many do not), or a layer is incomplete or not
            finite.
    """
    is_kohya = any(key.startswith(tuple(_KOHYA.prefixes.values())) for key in file)
    form = _KOHYA if is_kohya else _DIFFUSERS
    modules = {}
    for part, model in models.items():
        modules |= form.modules(model, part)
    if odd := [key for key, tensor in file.items() if not _fits(form, key, tensor, modules)]:
        raise LoraError(
            f"{len(odd)} of its {len(file)} keys fit no Linear or Conv2d module of "
            f"{' and '.join(models)}, the first is {shown(odd[0])} of shape "
            f"{list(file[odd[0]].shape)}; "
            "give a plain LoRA in the keys of kohya or diffusers and the model it was made for."
        )
    if is_kohya:
        return {part: from_kohya(file, model, part) for part, model in models.items()}
    return {part: from_diffusers(file, model, part, metadata) for part, model in models.items()}


def kohya_metadata(
    file: Mapping[str, torch.Tensor], architecture: str, title: str
) -> dict[str, str]:
    """The metadata by which A1111 and others know a file in kohya's keys.

    Args:
        file: All tensors of the file, of both parts.
        architecture: The base in the words of the modelspec: `stable-diffusion-v1`,
            `stable-diffusion-v2-512` or `stable-diffusion-v2-768-v`; or a word of one's own for
            another model.
        title: The name that a user sees.
    """
    ranks = {len(tensor) for key, tensor in file.items() if key.endswith(".lora_down.weight")}
    alphas = {tensor.item() for key, tensor in file.items() if key.endswith(".alpha")}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_output_name": title,
        "ss_v2": str(architecture.startswith("stable-diffusion-v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }


def _file_names(name: str, part: str) -> tuple[str, ...]:
    """Names that files give to a module of the model: the one to write, then others to accept."""
    if part != "text_encoder":
        return (name,)
    bare = name.removeprefix("text_model.")
    return (f"text_model.{bare}", bare)


def _spell(form: _Format, layers: dict[str, Factors], part: str, leaves: tuple[str, ...]) -> State:
    _check_part(form, part)
    file = {}
    for name, factors in layers.items():
        stem = form.stem(_file_names(name, part)[0], part)
        for leaf in leaves:
            file[stem + form.endings[leaf]] = torch.as_tensor(getattr(factors, leaf))
    return file


def _read(form: _Format, file: Mapping[str, torch.Tensor], model: nn.Module, part: str) -> State:
    """The tensors of one part under the model's own names; alphas only where the file has them."""
    _check_part(form, part)
    modules = form.modules(model, part)
    state = {}
    for key, tensor in file.items():
        leaf = form.leaf(key)
        if leaf is None or not key.startswith(tuple(form.prefixes.values())):
            raise LoraError(
                f"{shown(key)} is no key of a plain LoRA for Stable Diffusion in {form.program}'s "
                f"format, such as {form.stem('<module>', part) + form.endings['lora_A']!r}; "
                "give a file of that format."
            )
        if not key.startswith(form.prefixes[part]):
            continue
        found = modules.get(key.removesuffix(form.endings[leaf]), [])
        if len(found) != 1:
            raise LoraError(
                f"{shown(key)} names {len(found)} Linear or Conv2d modules of "
                f"{type(model).__name__} instead of one; give the model that the file was made for."
            )
        ((name, module),) = found
        state[f"{name}.{leaf}"] = tensor if leaf == "alpha" else _like(module.weight, tensor)
    return state


def _like(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A factor with as many sides as a weight, as a matrix is a kernel of 1 × 1, and vice versa."""
    if weight.ndim == 2 and factor.ndim == 4 and factor.shape[2:] == (1, 1):
        return factor[..., 0, 0]
    if weight.ndim == 4 and factor.ndim == 2:
        return factor[..., None, None]
    return factor


def _fits(
    form: _Format,
    key: str,
    tensor: torch.Tensor,
    modules: Mapping[str, list[tuple[str, nn.Module]]],
) -> bool:
    """Does a key name one module, and a factor of its size or an alpha?"""
    leaf = form.leaf(key)
    found = modules.get(key.removesuffix(form.endings[leaf]), []) if leaf else []
    if len(found) != 1:
        return False
    ((_, module),) = found
    if leaf == "alpha":
        return tensor.numel() == 1
    weight = module.weight
    factor = _like(weight, tensor)
    if leaf == "lora_A":
        return factor.shape[1:] == weight.shape[1:]
    ones = (1,) * (weight.ndim - 2)
    return factor.ndim == weight.ndim and len(factor) == len(weight) and factor.shape[2:] == ones


def _with_alphas(state: State) -> State:
    """The state with the rank for every alpha that is missing, its layers whole."""
    for name in layer_names(state):
        if f"{name}.lora_A" in state:
            state.setdefault(f"{name}.alpha", torch.tensor(float(len(state[f"{name}.lora_A"]))))
    if state:
        split_state(state)
    return state


def _check_part(form: _Format, part: str) -> None:
    if part not in form.prefixes:
        raise LoraError(f"the part is {part!r}; give one of {', '.join(form.prefixes)}.")
