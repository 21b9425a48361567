"""Loading the parts of a pipeline from folders of our own (see `imagelab.models.parts`)."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from imagelab.errors import UserError, memory_errors
from imagelab.models.parts import Part


def quiet_libraries() -> None:
    """Silence the notices of diffusers and transformers that a user can do nothing about."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_module(part: Part, folder: Path, dtype: torch.dtype = torch.float32):
    """A part with weights, of the class that is known for it, on the CPU."""
    kind = getattr(import_module(part.library), part.classes[0])
    module, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        output_loading_info=True,
        local_files_only=True,
        **({} if dtype == torch.float32 else {_dtype_option(part): dtype}),
    )
    if report["missing_keys"]:
        raise UserError(f"its weights lack {min(report['missing_keys'])}")
    _forget_place(module)
    return module.to(dtype)


def _dtype_option(part: Part) -> str:
    """What the part's library calls the precision that weights are read in, to save memory."""
    return "dtype" if part.library == "transformers" else "torch_dtype"


def _forget_place(module) -> None:
    """Leave out where a module was loaded from: configs that are saved later would tell it."""
    if hasattr(module, "register_to_config"):
        module.register_to_config(_name_or_path="")
    else:
        module.config._name_or_path = module.name_or_path = ""


def read_part(make: Callable, folder: Path, option: str = "--model_path"):
    """Call a loader; what it cannot read becomes one clear sentence."""
    try:
        with memory_errors():
            return make(folder)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder} could not be loaded ({reason[:160]}); fetch the model again or give another "
            f"{option}"
        ) from error
