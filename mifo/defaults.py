"""Numbers that depend on the base model: it may bring its own, in a file of its folder.

The user's go before the model's, and the model's before the paper's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from imagelab.errors import UserError, shorten
from imagelab.io.atomic import write_json
from imagelab.io.tensors import read_json
from imagelab.models.sources import locate_model
from imagelab.settings import Config

FILE = "mifo_config.json"
AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Defaults:
    """The paper's numbers (arXiv 2511.00542), for Stable Diffusion 2.1.

    Three are not the paper's: it does not say how random tokens are drawn, it fine-tunes the whole
    model and has no LoRA rate, and it scales no box steps.
    """

    initializer_scale: float = 1.0  # deviation of random first tokens, over the vocabulary's
    learning_rate: float = 5e-3  # of stage 1
    lora_learning_rate: float = 1e-4  # of stage 2, with a LoRA
    full_learning_rate: float = 2e-6  # of stage 2, with the whole model
    num_class_images: int = 100
    guidance_scale: float = 7.5
    step_scale: float = 1.0  # factor on the sizes of the box steps


class Own(NamedTuple):
    """What a model brings: the numbers to go by, and the names of those that are its own."""

    defaults: Defaults
    names: frozenset[str]


def read_own(source: str, offline: bool = False) -> Own:
    """The numbers that a base model brings in ``mifo_config.json``, over the paper's.

    Args:
        source: a folder, a single file (which takes the file beside it), a hub id or ``toybox``.

    Raises:
        UserError: the file is damaged, or holds anything but numbers of :class:`Defaults`.
    """
    path = locate_model(source, offline)
    file = (path if path.is_dir() else path.parent) / FILE
    if not (file.exists() or file.is_symlink()):
        return Own(Defaults(), frozenset())
    advice = "mend the file, or take it away"
    found = read_json(file, {}, advice)
    known = {field.name: field.type for field in fields(Defaults)}
    for name, value in found.items():
        if name not in known:
            names = ", ".join(known)
            raise UserError(f"{file} has a {shorten(name)!r}; it may have {names}: {advice}")
        least = int(known[name] is int)
        fits = type(value) is int or (known[name] is float and type(value) is float)
        if not fits or value < least:
            what = "a whole number from 1 on" if least else "a number from 0 on"
            raise UserError(f"{file}: {name} is {str(value)[:40]} and not {what}; {advice}")
    found = {name: known[name](value) for name, value in found.items()}
    return Own(replace(Defaults(), **found), frozenset(found))


def write_own(folder: Path, own: Own) -> None:
    """Put the numbers that a model brings into the folder of a model made from it."""
    if own.names:
        values = asdict(own.defaults)
        write_json(folder / FILE, {name: values[name] for name in values if name in own.names})


def settle(
    config: AnyConfig,
    own: Own,
    wanted: Mapping[str, str],
    more: Mapping[str, tuple[object, str]] = MappingProxyType({}),
) -> tuple[AnyConfig, dict[str, str]]:
    """Give each open setting, which is None, its value.

    Args:
        wanted: fields of :class:`Defaults`, by the settings that they are for.
        more: values from elsewhere and where they are from, by setting.

    Returns:
        The config without open settings, and where the value of each is from, by setting.
    """
    values = asdict(own.defaults)
    found = {
        name: (values[key], "the model's" if key in own.names else "default")
        for name, key in wanted.items()
    }
    found |= more
    given = config.settings()
    origins = {
        name: origin if given[name] is None else "as given" for name, (_, origin) in found.items()
    }
    open_ = {name: value for name, (value, _) in found.items() if given[name] is None}
    return config.with_settings(**open_), origins
