"""LoRA files as people have them: told apart by kind, brought to the keys that mifo_lora reads.

    kohya, LyCORIS           lora_unet_<name>.lora_down.weight        (and lora_te_<name>, …)
    diffusers                unet.<name>.to_q.lora_A.weight           (and text_encoder.<name>, …)
    diffusers before peft    unet.<name>.to_q.lora.down.weight
    diffusers before that    unet.<name>.processor.to_q_lora.down.weight
    peft                     base_model.model.<name>.to_q.lora_A.weight
    a model with peft in it  <name>.to_q.lora_A.default.weight

The names may lack `unet.` and `text_encoder.`, and those of peft may follow them. The first two are
mifo_lora's own; keys of the others become those of diffusers.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import read_json

log = logging.getLogger(__name__)

PLAIN = "give --lora a plain LoRA for Stable Diffusion 1 or 2"
#: What is not read, and a key that tells it.
KINDS = {
    "a ControlNet-LoRA": r"^lora_controlnet$|^input_hint_block\.|^zero_convs\.",
    "a DoRA": r"\.dora_scale$|\.lora_magnitude_vector",
    "a LoHa": r"\.hada_",
    "a LoKr": r"\.lokr_",
    "an (IA)^3": r"\.on_input$|\.ia3_",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "an OFT": r"\.b?oft_",
    "a LoRA of three factors (LoCon in Tucker's form)": r"\.lora_mid\.",
    "a set of whole differences of weights": r"\.diff(_b)?$|\.[wb]_norm$",
    "a LoRA with biases": r"\.lora_[AB]\.(\w+\.)?bias$",
    "a Custom Diffusion": r"custom_diffusion",
    "a LoRA in the numbered keys of lora_diffusion": r":\d+:(up|down)$",
    "a LoRA of Flux": r"(^|[._])(double|single)_blocks[._]|single_transformer_blocks",
    "a LoRA of Stable Diffusion 3 or Flux": (
        r"add_[kqv]_proj|joint_blocks|^lora_te3_|^text_encoder_3\."
    ),
    "a LoRA of SDXL": (
        r"^lora_te2_|^text_encoder_2\.|add_embedding|^lora_unet_((in|out)put_blocks|middle_block)_"
    ),
    "a LoRA of another kind of model": r"^(transformer|diffusion_model)\.",
}
CHECKPOINT = re.compile(r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.")
MODEL_PART = re.compile(r"^((encoder\.|decoder\.)?conv_in|text_model\.embeddings.*)\.weight$")
BUNDLED = "bundle_emb."  # where A1111 puts embeddings into a LoRA file

KOHYA = ("lora_unet_", "lora_te_", "lora_te1_")
PEFT = "base_model.model."
#: How names begin in each part, for keys that do not say which part they are of.
BEGINNINGS = {
    "unet": r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)\.",
    "text_encoder": r"(text_model|encoder\.layers)\.",
}
BEFORE_PEFT = re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.(up|down)\.")
ADAPTER = re.compile(r"(\.lora_[AB])\.[^.]+\.weight$")
SETTINGS = "lora_adapter_metadata"  # where diffusers keeps peft's settings
#: What of them says how strong a LoRA is, or which kind.
STRENGTH = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")


def check_kind(path: Path, names: Iterable[str]) -> None:
    """Raises UserError where the names of a file's tensors tell that it is no plain LoRA."""
    names = [name for name in names if not name.startswith(BUNDLED)]
    for kind, pattern in KINDS.items():
        if told := next((name for name in names if re.search(pattern, name)), None):
            raise UserError(
                f"{path} is {kind}, as its key {shorten(told)!r} tells, which is not read; {PLAIN}"
            )
    if any(map(CHECKPOINT.match, names)):
        raise UserError(f"{path} is a whole checkpoint; give it with --model_path, or {PLAIN}")
    if any("lora" in name for name in names):
        return
    if any(map(MODEL_PART.match, names)):
        raise UserError(
            f"{path} is a part of a whole model; give that model's folder with --model_path, or "
            f"{PLAIN}"
        )
    if len(names) == 1:
        raise UserError(
            f"{path} holds {shorten(names[0])!r} alone, as a token file does; give it with "
            f"--tokens, or {PLAIN}"
        )
    if names:
        raise UserError(f"{path} holds no LoRA: its first key is {shorten(min(names))!r}; {PLAIN}")


def plain_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a LoRA file, as mifo_lora reads them.

    Keys that fit none of the formats stay as they are.
    """
    if any(key.startswith(KOHYA) for key in tensors):
        names = {key: re.sub(r"^lora_te1_", "lora_te_", key) for key in tensors}
    else:
        names = _diffusers_names(tensors)
    found = {}
    for key, name in names.items():
        if name in found:
            raise UserError(
                f"{path} holds {shorten(name)!r} more than once, under the names of two adapters; "
                "give a file with one"
            )
        found[name] = tensors[key]
    is_pefts = any(PEFT in key or ADAPTER.search(key) for key in tensors)
    if is_pefts and SETTINGS not in metadata:
        metadata = {**metadata, **_peft_settings(path)}
    return found, dict(metadata)


def _diffusers_names(keys: Iterable[str]) -> dict[str, str]:
    """The name of today's diffusers for each key."""
    names = {}
    for key in keys:
        part, name = _split_part(key)
        if part is None:
            names[key] = key
            continue
        if BEFORE_PEFT.search(name):
            name = _converted(name, part)
        names[key] = f"{part}." + ADAPTER.sub(r"\1.weight", name)
    return names


def _split_part(key: str) -> tuple[str | None, str]:
    """The part of a model that a key is of, None if nobody knows, and the rest of the key."""
    for part, beginning in BEGINNINGS.items():
        name = key.removeprefix(f"{part}.").removeprefix(PEFT)
        if re.match(beginning, name):
            return part, name
    return None, key


def _converted(name: str, part: str) -> str:
    """A name from before peft as diffusers itself reads it today."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    if part == "unet":
        return next(iter(convert_unet_state_dict_to_peft({name: None})))
    return next(iter(convert_state_dict_to_peft({name: None}, StateDictType.DIFFUSERS_OLD)))


def _peft_settings(path: Path) -> dict[str, str]:
    """The metadata that say what peft keeps beside a file; without that, the rank is the alpha."""
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        log.warning(
            "%s does not say its alpha, which peft keeps in adapter_config.json beside it; the "
            "rank is taken for it",
            path,
        )
        return {}
    config = read_json(file, {}, "give the one that peft wrote")
    settings = {
        f"{part}.{name}": config[name] for part in BEGINNINGS for name in STRENGTH if name in config
    }
    return {SETTINGS: json.dumps(settings)}
