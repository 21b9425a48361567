"""The parts of a pipeline folder, read as if from a stranger: no code of its own ever runs.

A folder is not handed to diffusers or transformers, whose loaders import modules that its files
name, open pickles, adapters and shards that lie beside the weights, and take kernels from the hub.
What is known of it is copied into a folder of our own: of configs the keys that are known, of
weights the one file that was hashed, as a link. The loaders see that folder alone.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open

from imagelab.errors import UserError
from imagelab.io.tensors import read_json, tensor_names
from imagelab.models.tokenizers import ADVICE, TOKENIZER_CONFIG, copy_clip_tokenizer

MOST_LISTED = 64  # values in a list of a config
END = ".safetensors"
#: A number in a config may be so large, or as large as the largest side of a tensor.
LARGE = 4096


@dataclass(frozen=True)
class Part:
    """What a part of a pipeline may be, and which files it has.

    Attributes:
        library: that its class comes from; ``classes``: their names, the first is the usual one.
        config: name of its JSON file.
        keys: of the config that are read; empty: whatever is not hidden or about other files.
        weights: stem of the name of its safetensors file, "" if it has none.
    """

    library: str
    classes: tuple[str, ...]
    config: str
    keys: tuple[str, ...] = ()
    weights: str = ""


#: Keys that make a loader look elsewhere or choose code; those that begin with "_" are hidden.
ELSEWHERE = (
    "auto_map", "quantization_config", "attn_implementation", "experts_implementation", "adapter",
    "custom_pipelines", "trust_remote_code", "architectures", "torch_dtype", "dtype",
)  # fmt: skip
CLIP_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps",
    "attention_dropout", "initializer_range", "initializer_factor", "pad_token_id",
    "bos_token_id", "eos_token_id", "model_type",
)  # fmt: skip
SCHEDULERS = (
    "DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "LCMScheduler",
)  # fmt: skip
STABLE_DIFFUSION = {
    "unet": Part(
        "diffusers", ("UNet2DConditionModel",), "config.json", weights="diffusion_pytorch_model"
    ),
    "vae": Part("diffusers", ("AutoencoderKL",), "config.json", weights="diffusion_pytorch_model"),
    "text_encoder": Part(
        "transformers", ("CLIPTextModel",), "config.json", CLIP_TEXT, weights="model"
    ),
    "tokenizer": Part(
        "transformers", ("CLIPTokenizer", "CLIPTokenizerFast"), "tokenizer_config.json"
    ),
    "scheduler": Part("diffusers", SCHEDULERS, "scheduler_config.json"),
}


@contextmanager
def checked_folder(
    folder: Path, parts: Mapping[str, Part], weights: Mapping[str, Path | Sequence[Path]]
) -> Iterator[Path]:
    """A folder of our own, for as long as loading takes, with what is known of a pipeline folder.

    Args:
        weights: the safetensors file of each part that is to have one, or its shards.

    Raises:
        UserError: a part is of another class, or its files are not what they should be.
    """
    check_classes(folder, parts)
    with TemporaryDirectory(prefix="imagelab-", ignore_cleanup_errors=True) as name:
        ours = Path(name)
        index = {key: [part.library, part.classes[0]] for key, part in parts.items()}
        _write(ours / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | index)
        for key, part in parts.items():
            (ours / key).mkdir()
            if part.config == TOKENIZER_CONFIG:
                copy_clip_tokenizer(folder / key, ours / key)
                continue
            files = weights.get(key, ())
            files = [files] if isinstance(files, Path) else list(files)
            config = read_config(folder / key / part.config, part, *files)
            _write(ours / key / part.config, config)
            link_weights(files, ours / key, part)
        yield ours


def link_weights(files: Sequence[Path], folder: Path, part: Part) -> None:
    """Put a part's weights into a folder; of shards, an index of what is really in them."""
    if len(files) == 1:
        link(files[0], folder / f"{part.weights}.safetensors")
    elif files:
        places = {}
        for number, file in enumerate(files, 1):
            name = f"{part.weights}-{number:05d}-of-{len(files):05d}.safetensors"
            link(file, folder / name)
            places |= dict.fromkeys(tensor_names(file, ADVICE), name)
        total = sum(file.stat().st_size for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write(folder / f"{part.weights}.safetensors.index.json", index)


def find_weights(folder: Path, part: Part) -> list[Path]:
    """The safetensors file of a part, or its shards; a UserError when there is neither."""
    single = folder / f"{part.weights}.safetensors"
    if single.is_file():
        return [single]
    index = single.with_name(f"{single.name}.index.json")
    if not index.is_file():
        raise UserError(f"there is no {single} (pickled .bin weights are never read); {ADVICE}")
    places = read_json(index, {"weight_map": {}}, ADVICE)["weight_map"]
    names = sorted({str(name) for name in places.values()})
    if not names or any(name != Path(name).name or not name.endswith(END) for name in names):
        raise UserError(f"{index} names other files than its own shards; {ADVICE}")
    files = [folder / name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"there is no {missing[0]}, which {index.name} names; {ADVICE}")
    return files


def check_classes(folder: Path, parts: Mapping[str, Part]) -> None:
    """Raises UserError unless a folder's model_index.json names known classes for its parts."""
    path = folder / "model_index.json"
    index = read_json(path, {}, ADVICE)
    for key, part in parts.items():
        found = index.get(key)
        library, name = found if type(found) is list and len(found) == 2 else (None, found)
        if library != part.library or name not in part.classes:
            raise UserError(
                f"{path} says that {key} is {_shown(found)}, and this program knows "
                f"{part.library}.{part.classes[0]} alone; {ADVICE}"
            )


def read_config(path: Path, part: Part, *weights: Path) -> dict:
    """The keys of a config that are known, checked against the sizes of the part's weights."""
    config = read_json(path, {}, ADVICE)
    if (name := config.get("_class_name", part.classes[0])) not in part.classes:
        raise UserError(f"{path} is of a {_shown(name)} and not of a {part.classes[0]}; {ADVICE}")
    known = {key: harmless(value) for key, value in config.items() if key in part.keys}
    known = known if part.keys else harmless(config)
    largest, tensors = LARGE, 0 if weights else LARGE
    for file in weights:
        sides, count = _sizes(file)
        largest, tensors = max(largest, sides), tensors + count
    _check_numbers(known, path, largest, max(tensors, 1))
    if part.library == "diffusers":
        known["_class_name"] = name
    return known


def harmless(value: object, left_out: Collection[str] = ELSEWHERE) -> object:
    """A config without hidden keys and some others, at any depth."""
    if not isinstance(value, dict):
        return value
    return {
        key: harmless(each, left_out)
        for key, each in value.items()
        if not key.startswith("_") and key not in left_out
    }


def _sizes(path: Path) -> tuple[int, int]:
    """The largest side of a tensor in a safetensors file, and how many tensors there are."""
    try:
        with safe_open(path, framework="pt") as file:
            sides = [max(file.get_slice(name).get_shape(), default=1) for name in file.keys()]  # noqa: SIM118
    except Exception as error:  # a damaged file makes safetensors raise almost anything
        raise UserError(
            f"{path} cannot be read as safetensors ({str(error)[:80]}); {ADVICE}"
        ) from error
    return max(sides, default=1), len(sides)


def _check_numbers(value, path: Path, most: int, tensors: int, key: str = "") -> None:
    """Raises UserError for numbers in a config that no file of such weights can have."""
    if isinstance(value, dict):
        for name, each in value.items():
            _check_numbers(each, path, most, tensors, str(name))
    elif isinstance(value, list):
        if len(value) > MOST_LISTED:
            raise UserError(f"{path}: {key[:40]} is a list of {len(value)} values; {ADVICE}")
        for each in value:
            _check_numbers(each, path, most, tensors, key)
    elif type(value) is int:
        limit = tensors if "layer" in key else most
        if abs(value) > limit:
            raise UserError(
                f"{path}: {key[:40]} is {_shown(value)}, which its weights do not have; {ADVICE}"
            )


def link(source: Path, target: Path) -> None:
    """Let a file have a second name; a copy, where the disk knows no links."""
    source = source.resolve()
    for make in (os.symlink, os.link, shutil.copyfile):
        try:
            make(source, target)
        except OSError:
            if make is shutil.copyfile:
                raise
        else:
            return


def _write(path: Path, facts: dict) -> None:
    path.write_text(json.dumps(facts), encoding="utf-8")


def _shown(value: object) -> str:
    text = ".".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
