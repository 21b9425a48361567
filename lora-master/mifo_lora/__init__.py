"""LoRA for any PyTorch model: inject loralib layers, train, merge, save, and exchange files.

The way of a LoRA: `inject` it, `mark_only_lora_trainable`, train, take `lora_state_dict`,
spell that for others (`to_diffusers`, `to_kohya`), `save_lora`. And back: `read_lora`,
`from_file` (or, part by part, `from_diffusers` and `from_kohya`), then `inject_from`, and `merge`
for speed; or `merge_from` at once.
"""

from mifo_lora.errors import LoraError
from mifo_lora.formats import (
    from_diffusers,
    from_file,
    from_kohya,
    kohya_metadata,
    to_diffusers,
    to_kohya,
)
from mifo_lora.injection import (
    has_lora,
    inject,
    lora_layers,
    lora_parameters,
    mark_only_lora_trainable,
    merge,
    remove,
    unmerge,
)
from mifo_lora.layers import LoRALinear
from mifo_lora.states import (
    inject_from,
    load_lora,
    lora_state_dict,
    merge_from,
    read_lora,
    save_lora,
)

__all__ = [
    "LoRALinear",
    "LoraError",
    "from_diffusers",
    "from_file",
    "from_kohya",
    "has_lora",
    "inject",
    "inject_from",
    "kohya_metadata",
    "load_lora",
    "lora_layers",
    "lora_parameters",
    "lora_state_dict",
    "mark_only_lora_trainable",
    "merge",
    "merge_from",
    "read_lora",
    "remove",
    "save_lora",
    "to_diffusers",
    "to_kohya",
    "unmerge",
]
