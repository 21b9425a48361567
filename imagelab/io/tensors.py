"""Files of tensors and of facts: read with care, since they may come from anywhere, written whole.

Tensors are in safetensors files, which run no code; facts are JSON. What is wrong with a file is a
UserError that names it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagelab.errors import UserError, memory_errors
from imagelab.io.atomic import written_aside

#: What may be computed with; the 8-bit and 4-bit floats of safetensors are storage alone.
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

UMASK = os.umask(0)
os.umask(UMASK)
MOST_JSON = 64 * 2**20  # bytes
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


# ----------------------------------------------------------------------------------------------
# tensors


def read_tensors(
    path: Path, advice: str, finite: bool = True, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, on the CPU as stored, and its metadata.

    Args:
        advice: what to do about a file that cannot be used; ends the message.
        finite: refuse NaN and infinity.
        prefix: read those alone whose names begin with this.

    Raises:
        UserError: the file is missing, damaged, or holds what cannot be computed with.
    """
    with _opened(path, advice) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no dict)
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds {name!r} in {kind}, which is not supported; {advice}")
        if finite and not tensor.isfinite().all():
            raise UserError(f"{path} holds NaN or infinity in {name!r}; {advice}")
    return tensors, metadata


def read_metadata(path: Path, advice: str) -> dict[str, str]:
    """The metadata of a safetensors file alone; raises UserError as `read_tensors` does."""
    with _opened(path, advice) as file:
        return file.metadata() or {}


def tensor_names(path: Path, advice: str) -> list[str]:
    """The names of a safetensors file's tensors; raises UserError as `read_tensors` does."""
    with _opened(path, advice) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path, advice: str) -> Iterator[safe_open]:
    """Whatever goes wrong within is the file's fault."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; {advice}")
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code, and is never opened; {advice}")
    try:
        with memory_errors(), safe_open(path, framework="pt") as file:
            yield file
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes safetensors raise almost anything
        raise UserError(
            f"{path} cannot be read as safetensors ({_reason(error)}); {advice}"
        ) from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, by way of a copy in the CPU's memory; it appears when it is whole.

    Raises OSError when there is no room.
    """
    with disk_errors(path), written_aside(path) as aside:
        save_file(_separate(tensors), aside, dict(metadata) if metadata else None)
        aside.chmod(0o666 & ~UMASK)  # safetensors writes files that only their owner may read


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over tensors on the CPU and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and no two of them in one storage, such as bitsandbytes' tables are."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within, what safetensors makes of an OSError, such as a full disk, is that OSError again."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


# ----------------------------------------------------------------------------------------------
# facts


def read_json(path: Path, form: object, advice: str, clip: bool = False) -> dict:
    """The facts in a JSON file, which have a form; see `misfit`.

    ``clip``: whole numbers beyond 64 bits become the largest of these.

    Raises UserError, ending with ``advice``, for a file that is missing, damaged, too large, or of
    another form.
    """
    if not path.is_file():  # nor a pipe, which might never end, nor a link in a circle
        raise UserError(f"there is no file {path}; {advice}")
    try:
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"{path} is too large, {path.stat().st_size >> 20} MiB; {advice}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; {advice}") from error
    return parse_json(text, form, str(path), advice, clip)


def parse_json(text: str, form: object, name: str, advice: str, clip: bool = False) -> dict:
    """Facts from JSON text, as `read_json` reads them; ``name`` is what a message calls it."""
    whole = partial(_parse_int, clip=clip)
    try:
        facts = json.loads(
            text, parse_int=whole, parse_float=_parse_float, parse_constant=_parse_float
        )
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply; {advice}") from error
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON ({_reason(error)}); {advice}") from error
    if wrong := misfit(facts, form):
        raise UserError(f"{name}: {wrong}; {advice}")
    return facts


def misfit(value: object, form: object, name: str = "") -> str | None:
    """What is wrong with a value that was read from JSON, in words; None if it has the form.

    A form is a type; a list of one form, for lists of such; a dict of forms, for dicts that have
    at least these keys; or a tuple of forms, one of which must fit. ``float`` is for whole numbers,
    too, and None for null.
    """
    if isinstance(form, tuple):
        wrong = [misfit(value, each, name) for each in form]
        # of the forms of the value's own type the last, which says which of its parts is wrong
        apt = [told for told, each in zip(wrong, form, strict=True) if type(each) is type(value)]
        return None if None in wrong else (apt or wrong)[-1 if apt else 0]
    kind = type(form) if isinstance(form, dict | list) or form is None else form
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"{name or 'it'} is {_shown(value)} and not {KINDS[kind]}"
    if isinstance(form, list):
        parts = ((item, form[0], f"{name}[{i}]") for i, item in enumerate(value))
    elif isinstance(form, dict):
        if missing := [key for key in form if key not in value]:
            return f"{name or 'it'} has no {missing[0]!r}"
        parts = ((value[key], each, f"{name}.{key}" if name else key) for key, each in form.items())
    else:
        return None
    return next((wrong for part in parts if (wrong := misfit(*part))), None)


KINDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
    dict: "an object", type(None): "null",
}  # fmt: skip


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else KINDS[type(value)]
    return text if len(text) <= 40 else text[:37] + "..."


def _parse_int(text: str, clip: bool) -> int:
    """A whole number of 64 bits: no longer one can be a count or a seed."""
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        if not clip:
            raise ValueError(f"it holds a number of {len(text)} digits")
        return -(2**63) if text.startswith("-") else 2**63 - 1
    return number


def _parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text[:20]}")
    return number


def _reason(error: Exception) -> str:
    """The first line of what a library says, or the kind of the error if that is nothing."""
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
