"""The model that MIGE's training starts from: PixArt-α, BLIP-2 and T5, part by part.

Parts keep the precision that they are stored in; the fusion, some of which is drawn, is float32.
The library names the vision encoder's last norm ``post_layernorm``; its epsilon is set on loading.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from imagelab.errors import UserError, shown
from imagelab.io.tensors import read_json
from imagelab.models.loading import quiet_libraries
from imagelab.models.parts import END, Part, check_classes, read_config
from imagelab.training.seeds import check_seed, generator_for, seed_for
from mige.conversion import Model, write_folder
from mige.folder import INDEX, PARTS
from mige.method.fusion import FeatureFusion
from mige.origins import (
    CONFIG,
    Origin,
    Origins,
    check_part,
    check_there,
    make_part,
    read_weights,
)
from mige.release import State
from mige.sizes import HEADS, build
from mige.sources import SPIECE, TOKENIZER, read_text_tokenizer, read_vae
from mige.targets import check_output, check_room

#: PixArt-α's trunk; folders of an older diffusers give it the class's former name.
TRUNK = replace(PARTS["transformer"], classes=(*PARTS["transformer"].classes, "Transformer2DModel"))
BLIP2, BLIP2_TYPE = "Blip2ForConditionalGeneration", "blip-2"
#: BLIP-2's tensors that are used, by the beginnings of their names.
SEES, ASKS, QUERIES, PROJECTS = "vision_model.", "qformer.", "query_tokens", "language_projection."
#: What older files hold besides: the numbers of places, which are no weights.
UNNEEDED = "position_ids"
#: The text encoder's embeddings, which have two names.
TABLES = ("shared.weight", "encoder.embed_tokens.weight")
LONGEST_TEXT = 4096


def start(
    origins: Origins,
    output: Path,
    prefixes: Mapping[str, str] | None = None,
    seed: int = 0,
    text_length: int = 256,
    round_timesteps: bool = True,
    overwrite: bool = False,
) -> None:
    """Write the model that training starts from, which appears when it is whole.

    Args:
        prefixes: sentences before the instructions; None: empty ones.
        seed: of the feature fusion and the null text.
        text_length: of the text encoder's states.
        round_timesteps: as the release does.

    Raises:
        UserError: an origin is not what it should be, or there is no room for the folder.
    """
    check_seed(seed)
    if not 1 <= text_length <= LONGEST_TEXT:
        raise UserError(
            f"--text_length is {shown(text_length)}; give a whole number from 1 to {LONGEST_TEXT}"
        )
    quiet_libraries()
    output = output.absolute()
    check_output(output, origins.folders, overwrite)
    model = read_start(origins, seed, text_length)
    check_room(output, model.size)
    check_finite(model)
    write_folder(output, model, prefixes, round_timesteps, overwrite)


def read_start(origins: Origins, seed: int, text_length: int) -> Model:
    """All parts, which fit each other; weights stay on the disk until they are used."""
    pixart, blip2 = origins.pixart, origins.blip2
    taken: dict[str, Part] = {"transformer": TRUNK}
    if origins.t5 is None:
        taken |= {name: PARTS[name] for name in ("text_encoder", "tokenizer")}
    if origins.vae is None:
        taken["vae"] = PARTS["vae"]
    check_classes(pixart.fetch(INDEX), taken)
    t5, words = origins.t5 or pixart.part("text_encoder"), origins.t5 or pixart.part("tokenizer")
    vae = origins.vae or pixart.part("vae")

    parts = {
        "transformer": read_trunk(pixart.part("transformer")),
        "vae": read_autoencoder(vae),
        "text_encoder": read_text_encoder(t5),
    }
    trunk, text = parts["transformer"][0].config, parts["text_encoder"][0].config
    latents = parts["vae"][0].config.latent_channels
    if trunk.in_channels != 2 * latents:
        raise UserError(
            f"the trunk of {pixart.source} takes {trunk.in_channels // 2} channels, and the "
            f"autoencoder {vae.source} makes {latents}; give another {vae.option}"
        )
    _agree("trunk", pixart, trunk.caption_channels, t5, text.d_model)
    width = trunk.num_attention_heads * trunk.attention_head_dim
    parts |= read_blip2(blip2, text_length, width, seed)
    fusion = parts["fusion"][0].config
    _agree("projection", blip2, fusion.text_width, t5, text.d_model)
    return Model(
        {name: module for name, (module, _) in parts.items()},
        {name: state for name, (_, state) in parts.items()},
        read_words(words, text.vocab_size),
    )


def _agree(part: str, origin: Origin, width: int, t5: Origin, wanted: int) -> None:
    """Raises UserError for a part of another T5."""
    if width != wanted:
        raise UserError(
            f"the {part} of {origin.source} is for a T5 {shown(width)} wide, and that of "
            f"{t5.source} is {wanted}; give another --t5 or {origin.option}"
        )


def check_finite(model: Model) -> None:
    """Raises UserError for NaN and infinity, before anything is written."""
    with tqdm(total=model.size, unit="B", unit_scale=True, desc="checking") as bar:
        for part, state in model.states.items():
            for name, tensor in state.items():
                if name == TABLES[1]:  # the other name of the first
                    continue
                if not tensor.isfinite().all():
                    raise UserError(
                        f"{name} of {part} holds NaN or infinity; fetch the weights again"
                    )
                bar.update(tensor.nbytes)


# ----------------------------------------------------------------------------------------------
# parts: each an empty module and its tensors


def read_trunk(origin: Origin) -> tuple[nn.Module, State]:
    """PixArt-α's trunk, which takes a second half of channels, and makes nothing of it yet."""
    from diffusers import PixArtTransformer2DModel

    files, state = read_weights(origin, TRUNK.weights)
    folder = files[0].parent
    known = inspect.signature(PixArtTransformer2DModel).parameters
    found = read_config(folder / CONFIG, TRUNK, *files)
    config = {key: value for key, value in found.items() if key in known}
    narrow = make_part("transformer", config, origin, folder)
    if narrow.use_additional_conditions:
        raise UserError(
            f"the trunk in {folder} also reads sizes (use_additional_conditions), as PixArt-α for "
            "1024×1024 does; give the one for 512×512 by --pixart"
        )
    channels = narrow.config.in_channels
    if narrow.out_channels != 2 * channels:
        raise UserError(
            f"the trunk in {folder} takes {channels} channels and gives {narrow.out_channels}, and "
            "PixArt-α's gives twice as many as it takes; give another --pixart"
        )
    check_part(narrow, state, folder, origin.advice)
    weight = state["pos_embed.proj.weight"]
    widened = {"pos_embed.proj.weight": torch.cat([weight, torch.zeros_like(weight)], dim=1)}
    wide = make_part("transformer", config | {"in_channels": 2 * channels}, origin, folder)
    return wide, state | widened


def read_text_encoder(origin: Origin) -> tuple[nn.Module, State]:
    """T5's encoder, out of an encoder's folder or a whole T5's."""
    part = PARTS["text_encoder"]
    files, state = read_weights(origin, part.weights, ("shared.", "encoder."))
    folder = files[0].parent
    config = read_config(folder / CONFIG, part, *files)
    if (kind := config.pop("model_type", None)) != "t5":
        raise UserError(f"{folder / CONFIG} is of a {shown(kind)} and not of a t5; {origin.advice}")
    tables = [state[name] for name in TABLES if name in state]
    if len(tables) == 2 and not _same(*tables):
        raise UserError(f"{' and '.join(TABLES)} in {folder} differ, and are one; {origin.advice}")
    state |= dict.fromkeys(TABLES, tables[0]) if tables else {}
    module = make_part("text_encoder", config | {"is_encoder_decoder": False}, origin, folder)
    check_part(module, state, folder, origin.advice)
    return module, state


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def read_autoencoder(origin: Origin) -> tuple[nn.Module, State]:
    name = f"{PARTS['vae'].weights}{END}"
    folder = origin.fetch(CONFIG, name)
    check_there(folder / name, origin.advice)
    module, state = read_vae(folder)
    check_part(module, state, folder, origin.advice)
    return module, state


def read_blip2(
    origin: Origin, text_length: int, patch_width: int, seed: int
) -> dict[str, tuple[nn.Module, State]]:
    """The vision encoder, the Q-Former, and the fusion with its queries and projection."""
    folder = origin.fetch(CONFIG)
    form = {"model_type": str, "vision_config": dict, "qformer_config": dict}
    found = read_json(folder / CONFIG, form, origin.advice)
    classes = found.get("architectures") or [BLIP2]
    if found["model_type"] != BLIP2_TYPE or classes != [BLIP2]:
        raise UserError(
            f"{folder / CONFIG} is of a {shown(found['model_type'])} ({shown(classes)}) and not of "
            f"a {BLIP2_TYPE} ([{BLIP2!r}]); {origin.advice}"
        )
    files, state = read_weights(origin, "model", (SEES, ASKS, QUERIES, PROJECTS))
    folder = files[0].parent
    parts, configs = {}, {"vision_encoder": found["vision_config"]}
    configs["qformer"] = found["qformer_config"]
    for name, start_of in (("vision_encoder", SEES), ("qformer", ASKS)):
        own = {
            key.removeprefix(start_of): tensor
            for key, tensor in state.items()
            if key.startswith(start_of) and not key.endswith(UNNEEDED)
        }
        keys = set(PARTS[name].keys) - {"model_type"}
        config = {key: value for key, value in configs[name].items() if key in keys}
        if name == "qformer":  # BLIP-2 does so, whatever its config says
            config["encoder_hidden_size"] = parts["vision_encoder"][0].config.hidden_size
        layers = config.get("num_hidden_layers", 0)
        if type(layers) is not int or layers > len(own):
            raise UserError(
                f"{folder / CONFIG}: num_hidden_layers of {name} is {shown(layers)}, which its "
                f"weights do not have; {origin.advice}"
            )
        module = make_part(name, config, origin, folder)
        check_part(module, own, folder, origin.advice, start_of)
        parts[name] = module, own
    rest = {key: tensor for key, tensor in state.items() if not key.startswith((SEES, ASKS))}
    width = parts["qformer"][0].config.hidden_size
    return parts | {"fusion": make_fusion(rest, origin, width, patch_width, text_length, seed)}


def make_fusion(
    state: State, origin: Origin, width: int, patch_width: int, text_length: int, seed: int
) -> tuple[nn.Module, State]:
    """BLIP-2's queries and projection; the feature fusion and the null text are drawn.

    Args:
        state: `query_tokens` and `language_projection`.
        width: of the Q-Former.
    """
    heads, _ = HEADS["fusion"]
    if width % heads:
        raise UserError(
            f"the Q-Former of {origin.source} is {width} wide, and the fusion has {heads} heads; "
            f"give another {origin.option}"
        )
    sizes = {QUERIES: 3, f"{PROJECTS}weight": 2}
    for name, sides in sizes.items():
        if name not in state or state[name].ndim != sides:
            raise UserError(f"{origin.source} has no {name} of {sides} sides; {origin.advice}")
    config = {
        "queries": state[QUERIES].shape[1],
        "width": width,
        "heads": heads,
        "patch_width": patch_width,
        "text_width": state[f"{PROJECTS}weight"].shape[0],
        "text_length": text_length,
    }
    module = build("fusion", config)
    renamed = {name.replace(PROJECTS, "projection."): each for name, each in state.items()}
    whole = {name: tensor.float() for name, tensor in renamed.items()}
    whole |= draw_features(width, heads, patch_width, seed)
    whole["null_text"] = draw_null_text(text_length, config["text_width"], seed)
    check_part(module, whole, Path(origin.source), origin.advice)
    return module, whole


def draw_features(width: int, heads: int, patch_width: int, seed: int) -> State:
    """The feature fusion as its class begins, from a stream of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "start", "features"))
        drawn = FeatureFusion(width, heads, patch_width)
    return {f"features.{name}": tensor for name, tensor in drawn.state_dict().items()}


def draw_null_text(length: int, width: int, seed: int) -> Tensor:
    """States [k, d] that stand for "no text": of about the length 1 each."""
    return torch.randn(length, width, generator=generator_for(seed, "start", "null text")) / (
        width**0.5
    )


def read_words(origin: Origin, known: int):
    """T5's tokenizer, which has no more pieces than the text encoder knows."""
    folder = origin.fetch(SPIECE, TOKENIZER, "tokenizer_config.json")
    if not any((folder / name).is_file() for name in (SPIECE, TOKENIZER)):
        raise UserError(f"there is neither {SPIECE} nor {TOKENIZER} in {folder}; {origin.advice}")
    tokenizer = read_text_tokenizer(folder)
    if len(tokenizer) > known:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} pieces, and the text encoder knows "
            f"{known}; {origin.advice}"
        )
    return tokenizer
