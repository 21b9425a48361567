"""The alphas that peft writes into the metadata of a file, as diffusers saves it."""

import json
import math
import re
from collections.abc import Callable, Mapping

from mifo_lora.errors import LoraError, shown
from mifo_lora.states import LARGEST

#: Where peft's settings of a LoRA are in the metadata.
PEFT = "lora_adapter_metadata"
NAME = re.compile(r"(\^?)([\w.]+)\$?")  # of a module, as a pattern of peft spells it


def peft_alphas(metadata: Mapping[str, str], part: str) -> Callable[[str], float | None]:
    """A function from a layer's name to the alpha that peft's metadata of a part give it."""
    config = _peft_config(metadata)
    for variant in ("use_rslora", "use_dora"):
        if config.get(f"{part}.{variant}"):
            raise LoraError(f"the LoRA file was made with {variant}; give one of plain LoRA.")
    common = config.get(f"{part}.lora_alpha")
    common = None if common is None else _alpha(f"{part}.lora_alpha", common)
    patterns = config.get(f"{part}.alpha_pattern")
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, dict):
        raise LoraError(
            f"the LoRA file's {PEFT} have {shown(patterns)} as {part}.alpha_pattern; give a file "
            "whose patterns are an object, or one without."
        )
    ranked = {}  # by (whole name alone?, name): place among the patterns, alpha
    for place, (pattern, alpha) in enumerate(patterns.items()):
        # They are expressions, which may take forever: only those are read that spell a name.
        spelled = NAME.fullmatch(pattern.replace("\\.", "."))
        if spelled is None:
            raise LoraError(
                f"the LoRA file's {PEFT} have the alpha_pattern {shown(pattern)}, which is not the "
                "name of a module; give a file with plain names."
            )
        alpha = _alpha(f"{part}.alpha_pattern[{shown(pattern)}]", alpha)
        ranked.setdefault((bool(spelled[1]), spelled[2]), (place, alpha))

    def find(name: str) -> float | None:
        """By peft's rule: that of the first pattern which is the name, or its end at a dot."""
        pieces = name.split(".")
        ends = [(False, ".".join(pieces[start:])) for start in range(len(pieces))]
        hits = [ranked[end] for end in [(True, name), *ends] if end in ranked]
        return min(hits)[1] if hits else common

    return find


def _peft_config(metadata: Mapping[str, str]) -> dict:
    try:
        config = json.loads(metadata.get(PEFT, "{}"))
    except (ValueError, RecursionError) as error:
        raise LoraError(
            f"the LoRA file's {PEFT} cannot be read as JSON ({type(error).__name__}); "
            "give a sound file."
        ) from error
    if not isinstance(config, dict):
        raise LoraError(
            f"the LoRA file's {PEFT} are {shown(config)} and not an object; give a sound file."
        )
    return config


def _alpha(name: str, value: object) -> float:
    """A number of peft's metadata that can be an alpha."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= LARGEST or not math.isfinite(value):
        raise LoraError(
            f"the LoRA file's {PEFT} have {shown(value)} as {name}; give a file whose alphas are "
            "positive numbers."
        )
    return float(value)
