"""On what a model runs, and in which precision."""

import re

from imagelab.errors import UserError

#: What ``--mixed_precision`` may be.
PRECISIONS = ("auto", "no", "fp16", "bf16")


def choose_device(name: str) -> str:
    """``auto`` is cuda, then mps, then cpu; a device that is not there is an error."""
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if name == "auto":
        return there[0]
    gpus = torch.cuda.device_count() if "cuda" in there else 0
    number = re.fullmatch(r"cuda:(\d+)", name)
    if name in there or (number and int(number[1]) < gpus):
        return name
    numbers = f" ({gpus} GPU{'s' * (gpus > 1)}, numbered from cuda:0)" if gpus else ""
    found = ", ".join(device + numbers * (device == "cuda") for device in there)
    raise UserError(f"--device {name} is not available here; available: {found}")


def choose_precision(name: str, device: str):
    """The dtype of the UNet.

    ``auto`` is bf16 where the hardware has it, fp16 on older CUDA GPUs, float32 elsewhere.
    """
    import torch

    if name not in PRECISIONS:
        raise UserError(f"--mixed_precision is {name!r}; give {', '.join(PRECISIONS)}")
    if name == "auto":
        if device.startswith("cuda"):
            in_hardware = torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8
            name = "bf16" if in_hardware else "fp16"
        else:
            name = "bf16" if device == "cpu" and torch.cpu._is_amx_tile_supported() else "no"
    if name == "fp16" and device == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; use bf16 or no on the CPU")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
