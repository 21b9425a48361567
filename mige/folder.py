"""A MIGE model folder, read as if from a stranger: see `imagelab.models.parts`.

It is a diffusers folder with ``transformer/``, ``vae/``, ``tokenizer/``, ``text_encoder/``,
``vision_encoder/``, ``qformer/``, ``fusion/`` and ``scheduler/``.
"""

import hashlib
import json
from base64 import b64decode
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import misfit, read_json
from imagelab.models.digests import weights_digest
from imagelab.models.loading import load_module, quiet_libraries, read_part
from imagelab.models.parts import Part, check_classes, checked_folder, find_weights, read_config
from imagelab.models.sources import embedded_folder, embedded_names
from imagelab.models.tokenizers import ADVICE, TOKENIZER_CONFIG
from mige.config import DEFAULTS, GUIDANCE_KINDS, check_numbers
from mige.method.schedule import BETA_SCHEDULES, PREDICTION_TYPES
from mige.method.wording import MARK, PREFIXES
from mige.vocabulary import is_charsmap

INDEX = "model_index.json"
EMBEDDED = "mige.models"  # group of entry points at which packages announce their models
PARTS = {
    "transformer": Part(
        "diffusers", ("PixArtTransformer2DModel",), "config.json",
        weights="diffusion_pytorch_model",
    ),
    "vae": Part("diffusers", ("AutoencoderKL",), "config.json", weights="diffusion_pytorch_model"),
    "tokenizer": Part("transformers", ("T5Tokenizer", "T5TokenizerFast"), TOKENIZER_CONFIG),
    "text_encoder": Part(
        "transformers", ("T5EncoderModel",), "config.json",
        (
            "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
            "relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate",
            "layer_norm_epsilon", "feed_forward_proj", "initializer_factor", "pad_token_id",
            "eos_token_id", "model_type",
        ),
        weights="model",
    ),
    "vision_encoder": Part(
        "transformers", ("Blip2VisionModel",), "config.json",
        (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
            "initializer_range", "qkv_bias", "model_type",
        ),
        weights="model",
    ),
    "qformer": Part(
        "transformers", ("Blip2QFormerModel",), "config.json",
        (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "initializer_range", "layer_norm_eps", "pad_token_id", "cross_attention_frequency",
            "encoder_hidden_size", "use_qformer_text_input", "model_type",
        ),
        weights="model",
    ),
    "fusion": Part(
        "mige.method.fusion", ("InstructionFusion",), "config.json",
        (
            "queries", "width", "heads", "patch_width", "text_width", "text_length",
            "reads_latents",
        ),
        weights="diffusion_pytorch_model",
    ),
    "scheduler": Part(
        "mige.method.sampler", ("ContinuousDPMSolver",), "scheduler_config.json",
        ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    ),
}  # fmt: skip
CONTENTS = (INDEX, *PARTS)  # all that lies in a model folder
#: What a model folder says besides its parts, and its form.
SETTINGS = {"slots": int, "round_timesteps": bool, "prefixes": dict}
MOST_SLOTS, LONGEST_PREFIX, MOST_TIMESTEPS = 64, 2000, 100_000
#: What the schedule may be, the released model's first.
SCHEDULES = {"beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTION_TYPES}
#: Widths that have to be the same: a part's and its key's, twice.
SAME = (
    (("qformer", "encoder_hidden_size"), ("vision_encoder", "hidden_size")),
    (("fusion", "width"), ("qformer", "hidden_size")),
    (("fusion", "text_width"), ("text_encoder", "d_model")),
    (("transformer", "caption_channels"), ("text_encoder", "d_model")),
)


def load_parts(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    kept_whole: Collection[str] = ("vae",),
    left_out: Collection[str] = (),
) -> dict:
    """The parts and settings of a model folder, by the names of the pipeline's arguments.

    Args:
        kept_whole: parts that stay in float32.
        left_out: parts whose weights are not read.

    Raises:
        UserError: something is missing, damaged, of another kind or of another width.
    """
    from mige.method.sampler import ContinuousDPMSolver

    quiet_libraries()
    folder = find_folder(str(folder))
    settings = read_settings(folder)
    check_classes(folder, PARTS)
    weights = {
        name: find_weights(folder / name, part) for name, part in PARTS.items() if part.weights
    }
    read = [name for name in weights if name not in left_out]
    own = {name: part for name, part in PARTS.items() if name != "tokenizer"}
    with checked_folder(folder, own, weights) as ours:
        configs = {
            name: json.loads((ours / name / part.config).read_text()) for name, part in own.items()
        }
        check_widths(configs, folder)
        parts = {
            name: read_part(
                lambda _, n=name: load_module(
                    PARTS[n], ours / n, torch.float32 if n in kept_whole else dtype
                ),
                folder / name,
                "model",
            )
            for name in read
        }
    for name in read:
        parts[name].eval().requires_grad_(False)
        check_finite(parts[name], folder / name)
    parts["scheduler"] = ContinuousDPMSolver(**read_schedule(configs["scheduler"], folder))
    parts["tokenizer"] = tokenizer = read_tokenizer(folder / "tokenizer")
    if len(tokenizer) > (known := configs["text_encoder"]["vocab_size"]):
        raise UserError(
            f"the parts of {folder} do not fit: tokenizer has {len(tokenizer)} pieces, and "
            f"text_encoder knows {known}; make or fetch the model again"
        )
    return parts | settings


def find_folder(source: str) -> Path:
    """The local folder of a model, or of an embedded one; a UserError where there is none."""
    folder = embedded_folder(source, EMBEDDED) or Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"there is no model folder {shorten(source)}; "
            + "".join(f"{name} is one that comes along, " for name in embedded_names(EMBEDDED))
            + "`python -m mige.convert` makes one from a release, and `python -m mige.start` one "
            "to train; see docs/mige.md"
        )
    if not (folder / INDEX).is_file():
        within = folder / "model"  # of what `python -m mige.train` wrote
        there = (within / INDEX).is_file()
        wanted = str(within) if there else "the folder that `python -m mige.convert` wrote"
        raise UserError(f"{folder} is no model folder: it has no {INDEX}; give {wanted}")
    if missing := [name for name in PARTS if not (folder / name).is_dir()]:
        raise UserError(f"the model {folder} has no folder {missing[0]!r}; make or fetch it again")
    return folder


def read_settings(folder: Path) -> dict:
    """How many pictures a model takes, whether it rounds times, its prefixes and its guidance."""
    path = folder / INDEX
    found = read_json(path, SETTINGS, ADVICE)
    guidance = found.get("guidance", {})
    if wrong := misfit_of_guidance(guidance):
        raise UserError(f"{path}: {wrong}; {ADVICE}")
    slots, prefixes = found["slots"], found["prefixes"]
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(f"{path}: slots is {slots}, and may be 1 to {MOST_SLOTS}; {ADVICE}")
    if wrong := misfit(prefixes, dict.fromkeys(PREFIXES, str), "prefixes"):
        raise UserError(f"{path}: {wrong}; {ADVICE}")
    for name in PREFIXES:
        check_prefix(prefixes[name], f"{path}: the prefix of {name}", ADVICE)
    settings = {name: found[name] for name in SETTINGS}
    prefixes = {name: prefixes[name] for name in PREFIXES}
    return settings | {"prefixes": prefixes, "guidance": guidance}


def misfit_of_guidance(found: object) -> str | None:
    """Why this cannot be what a model says of its sampling, or None."""
    if wrong := misfit(found, dict, "guidance"):
        return wrong
    for task, numbers in found.items():
        if task not in DEFAULTS:
            return f"guidance is of {shorten(str(task))!r}, and tasks are {', '.join(DEFAULTS)}"
        if wrong := misfit(numbers, dict, f"guidance.{task}"):
            return wrong
        if unknown := [name for name in numbers if name not in GUIDANCE_KINDS]:
            known = ", ".join(GUIDANCE_KINDS)
            return f"guidance.{task} has {shorten(str(unknown[0]))!r}, not {known}"
        kinds = {name: GUIDANCE_KINDS[name] for name in numbers}
        if wrong := misfit(numbers, kinds, f"guidance.{task}"):
            return wrong
        try:
            check_numbers(numbers)
        except UserError as error:
            return f"guidance.{task}.{str(error).removeprefix('--')}"
    return None


def check_prefix(text: str, name: str, advice: str) -> None:
    """Raises UserError for what cannot stand before an instruction."""
    if len(text) > LONGEST_PREFIX:
        raise UserError(f"{name} is longer than any prompt; {advice}")
    if MARK in text:
        raise UserError(f"{name} holds a mark, {MARK}, and no picture belongs there; {advice}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is not UTF-8 text; {advice}") from None


def check_widths(configs: dict[str, dict], folder: Path) -> None:
    """Raises UserError for parts that do not fit each other."""

    def number(part: str, key: str) -> int:
        value = configs[part].get(key)
        if type(value) is not int:
            raise UserError(
                f"{folder / part}: {key} is {shorten(str(value))} and no whole number; {ADVICE}"
            )
        return value

    def agree(one: str, value: int, other: str, wanted: int) -> None:
        if value != wanted:
            raise UserError(
                f"the parts of {folder} do not fit: {one} is {value}, and {other} is {wanted}; "
                "make or fetch the model again"
            )

    for (part, key), (other, wanted) in SAME:
        agree(f"{part}'s {key}", number(part, key), f"{other}'s {wanted}", number(other, wanted))
    width = number("transformer", "num_attention_heads") * number(
        "transformer", "attention_head_dim"
    )
    agree("fusion's patch_width", number("fusion", "patch_width"), "transformer's width", width)
    latents = 2 * number("vae", "latent_channels")
    for key in ("in_channels", "out_channels"):
        value = number("transformer", key)
        agree(f"transformer's {key}", value, "twice vae's latent_channels", latents)
    number("text_encoder", "vocab_size")
    if type(reads := configs["fusion"].get("reads_latents", True)) is not bool:
        raise UserError(
            f"{folder / 'fusion'}: reads_latents is {shorten(str(reads))}, and not true or false; "
            f"{ADVICE}"
        )


def check_finite(module, folder: Path) -> None:
    """Raises UserError for weights that are not finite."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder} has weights that are not finite ({name}); {ADVICE}")


def read_schedule(config: dict, folder: Path) -> dict:
    """The noise schedule: training steps, betas, and what the model predicts."""
    steps, *betas = (config.get(name) for name in ("num_train_timesteps", "beta_start", "beta_end"))
    fits = type(steps) is int and 1 <= steps <= MOST_TIMESTEPS
    if not fits or {float} != {*map(type, betas)} or not 0 < betas[0] <= betas[1] < 1:
        raise UserError(
            f"{folder / 'scheduler'} has {shorten(str(steps))} steps with betas from "
            f"{shorten(str(betas[0]))} to {shorten(str(betas[1]))}, which is no schedule; {ADVICE}"
        )
    settings = {"num_train_timesteps": steps, "beta_start": betas[0], "beta_end": betas[1]}
    for name, known in SCHEDULES.items():
        settings[name] = config.get(name, known[0])
        if settings[name] not in known:
            raise UserError(
                f"{folder / 'scheduler'}: {name} is {shorten(str(settings[name]))}, and this "
                f"program knows {' and '.join(known)}; {ADVICE}"
            )
    return settings


def read_tokenizer(folder: Path):
    """A T5 tokenizer, made anew out of the vocabulary in ``tokenizer.json``.

    Nothing else of the file is used: patterns and templates are T5's own.
    """
    from transformers import T5Tokenizer

    path = folder / "tokenizer.json"
    found = read_json(path, {"model": {"type": str, "vocab": list}}, ADVICE)
    model = found["model"]
    if model["type"] != "Unigram":
        raise UserError(f"{path} is a {shorten(model['type'])} and no T5 tokenizer; {ADVICE}")
    vocabulary = [_piece(each, path) for each in model["vocab"]]
    extra = sum(text.startswith("<extra_id_") for text, _ in vocabulary)
    charsmap = _charsmap(found.get("normalizer"))
    if charsmap is not None and not is_charsmap(charsmap):  # at which tokenizers would panic
        raise UserError(f"{path}: its table of characters is damaged; {ADVICE}")
    try:
        return T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=charsmap, extra_ids=extra)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path} makes no tokenizer ({str(error)[:160]}); {ADVICE}") from error


def _piece(value: object, path: Path) -> tuple[str, float]:
    fits = type(value) is list and len(value) == 2
    if not (fits and type(value[0]) is str and type(value[1]) in (int, float)):
        raise UserError(f"{path} has a piece that is no text and its score; {ADVICE}")
    return value[0], float(value[1])


def _charsmap(normalizer: object) -> bytes | None:
    """SentencePiece's table of characters, wherever it stands among the normalizers."""
    if type(normalizer) is not dict:
        return None
    if type(text := normalizer.get("precompiled_charsmap")) is str:
        try:
            return b64decode(text, validate=True)
        except ValueError as error:
            raise UserError(f"the tokenizer's table of characters is damaged; {ADVICE}") from error
    several = normalizer.get("normalizers")
    found = [_charsmap(each) for each in several] if type(several) is list else []
    return next((each for each in found if each), None)


def model_digest(folder: Path) -> str:
    """sha256 over a model folder's weights, and what its configs and its tokenizer say.

    The guidance is left out: what is painted with it records its numbers.
    """
    words = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    parts = [name for name in PARTS if name != "tokenizer"]
    settings = {name: value for name, value in read_settings(folder).items() if name != "guidance"}
    facts = [parts_digest(folder, parts), settings, words]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def parts_digest(folder: Path, names: Sequence[str]) -> str:
    """sha256 over the weights of some parts, and what their configs say."""
    weights = {
        f"{name}/{file.name}": file
        for name in names
        if PARTS[name].weights
        for file in find_weights(folder / name, PARTS[name])
    }
    configs = {name: config_of(folder, name) for name in names}
    facts = [weights_digest(weights), configs]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def config_of(folder: Path, name: str) -> dict:
    """What is known of a part's config, checked against the sizes of its weights."""
    part = PARTS[name]
    files = find_weights(folder / name, part) if part.weights else []
    return read_config(folder / name / part.config, part, *files)
