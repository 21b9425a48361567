"""A checked request for pictures: the model, the size, and what each box is for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from imagelab.attention import layer_grid
from imagelab.boxes import Box
from imagelab.errors import UserError
from imagelab.models.device import choose_precision
from imagelab.models.stable_diffusion import StableDiffusion, read_sizes
from imagelab.prompts import check_prompt
from imagelab.sampling import check_steps
from imagelab.training.seeds import check_seed
from mifo.bounds import check_bounds
from mifo.defaults import read_own, settle
from mifo.learned import Learned, read_learned_folder
from mifo.learned_files import read_learned_files
from mifo.method.layers import decoder_block
from mifo.method.regions import TokenRoles
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import GetBoxes
from mifo.synthesis.placing import GivenBoxes, check_placed, check_wanted, place_boxes
from mifo.tokens import ASSET, find_assets, token_roles

MOST_TIMES = 4  # the model's own resolution, for a side of a picture
NEGATIVE = "negative prompt"

#: What is meant for an asset, maybe without its brackets, in capitals or with a space.
LIKE_AN_ASSET = re.compile(r"<?\basset ?\d+>?", re.IGNORECASE)


@dataclass(frozen=True)
class Scene:
    """What :mod:`mifo.synthesis.paint` paints.

    Attributes:
        names: of the subjects, in the order of the prompt; ``boxes``: one for each.
        tokens: roles of the prompt's tokens; None paints without boxes.
        size: rows and columns of the latents.
        device, dtype: of the UNet.
        origins: where each setting that the config left open got its value, by name.
    """

    config: SynthesisConfig
    base: StableDiffusion
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    tokens: TokenRoles | None
    size: tuple[int, int]
    device: str
    dtype: torch.dtype
    origins: dict[str, str]


def make_scene(
    config: SynthesisConfig,
    get_boxes: GetBoxes | None,
    boxes: GivenBoxes | None = None,
    subject_token_indices: Sequence[Sequence[int]] | None = None,
    device: str = "cpu",
    base: StableDiffusion | None = None,
    learned: Learned | None = None,
) -> Scene:
    """Check a request and load its model.

    Args:
        get_boxes: the layout where ``boxes`` is None.
        subject_token_indices: positions of each subject's tokens; None finds the assets' names.
        device: torch device to paint on.
        base: the model of an earlier scene, not to load it again; what it is made of has to be
            the same (see :class:`mifo.synthesis.kept.KeptModel`).
        learned: what :func:`read_learned` gives; None reads it.

    Raises:
        UserError: a setting makes no sense, or prompt, boxes and what was learned do not fit.
    """
    check_numbers(config)
    check_wanted(config.box_control, boxes, subject_token_indices)
    runtime = config.runtime
    dtype = choose_precision(runtime.mixed_precision, device)
    learned = learned or read_learned(config)
    names = asset_names(config.prompt, learned)
    asset_names(config.negative_prompt, learned, NEGATIVE)
    layout = partial(lay_out, names, learned, get_boxes)
    finds_names = config.box_control and subject_token_indices is None
    if finds_names:
        place_boxes(names, boxes, layout)  # fails before a model is fetched
    is_local = runtime.offline or base is not None  # a loaded model need not be fetched again
    config, origins = settle_synthesis(config, learned, is_local)
    check_numbers(config)  # once more, with the numbers that were open
    if base is None:
        grid = read_grid(config, learned)  # fails before the model is loaded
        if finds_names:
            check_placed(place_boxes(names, boxes, partial(layout, grid or (1, 1))), names, grid)
        base, _ = learned.load(config.model_path, runtime.offline)
    check_steps(config.num_inference_steps, base.scheduler)
    find_assets(base.tokenizer, config.negative_prompt, learned.assets)
    found = find_assets(base.tokenizer, config.prompt, learned.assets)
    size = latent_size(config, base)
    if not config.box_control:
        return Scene(config, base, names, (), None, size, device, dtype, origins)
    if subject_token_indices is None:
        subjects = [[position] for _, position in found]
    else:
        subjects = [list(positions) for positions in subject_token_indices]
        names = _subject_names(subjects, found)
    tokens = token_roles(base.tokenizer, config.prompt, subjects)
    placed = place_boxes(names, boxes, partial(lay_out, names, learned, get_boxes, size))
    check_placed(placed, names, layer_grid(base.unet, size, decoder_block(base.unet)))
    return Scene(config, base, names, tuple(placed), tokens, size, device, dtype, origins)


def settle_synthesis(
    config: SynthesisConfig, learned: Learned, offline: bool
) -> tuple[SynthesisConfig, dict[str, str]]:
    """Give each open setting the value that suits the model; where each value is from.

    ``offline``: the hub is not asked.
    """
    own = read_own(model_source(config, learned), offline)
    return settle(config, own, {name: name for name in ("guidance_scale", "step_scale")})


def model_source(config: SynthesisConfig, learned: Learned) -> str:
    """The model that a request paints with: a path, a hub id or ``toybox``."""
    return config.model_path or str(learned.pipeline or learned.base_source)


def lay_out(
    names: Sequence[str],
    learned: Learned,
    get_boxes: GetBoxes,
    size: tuple[int, int] = (1, 1),
) -> list[Box]:
    """The boxes of a layout for subjects of these names; ``size``: rows and columns."""
    rows, columns = size
    known = [learned.proportions.get(name) for name in names]
    return list(get_boxes(len(names), [each and each * rows / columns for each in known]))


def read_learned(config: SynthesisConfig) -> Learned:
    """The learned folder of a request, or the single files that it names."""
    if config.lora is not None or config.tokens:
        learned = read_learned_files(config.lora, config.tokens, config.model_path)
        lora = learned.lora and replace(learned.lora, scale=config.lora_scale)
        return replace(learned, lora=lora)
    return read_learned_folder(Path(config.models_dir) / config.model_id)


def check_numbers(config: SynthesisConfig) -> None:
    """Raises UserError for a number that is out of its range, or that nothing would use."""
    check_bounds(config.settings())
    if config.seed is None:
        raise UserError("there is no seed; give one (only the commands draw it)")
    check_seed(config.seed)
    if config.lora is None and config.lora_scale != 1:
        raise UserError(
            f"--lora_scale is {config.lora_scale:g}, and it is for the file of --lora alone; give "
            "that, or leave --lora_scale out"
        )


def asset_names(prompt: str, learned: Learned, kind: str = "prompt") -> tuple[str, ...]:
    """The assets that a prompt names, in its order; a UserError where one was not learned.

    ``kind``: what a message calls the prompt.
    """
    check_prompt(prompt, f"--{kind.replace(' ', '_')}")
    names = tuple(ASSET.findall(prompt))
    for found in LIKE_AN_ASSET.findall(prompt):
        if found not in names:
            number = found.strip("<>").lower().removeprefix("asset").strip()
            raise UserError(f"the {kind} writes {found!r}; write <asset{number}> for an asset")
    if names and not learned.rows:
        raise UserError(
            f"the {kind} names {names[0]}, and only --lora is given; give its token file, too, "
            f"such as --tokens {names[0].strip('<>')}.safetensors"
        )
    for name in names:
        if name not in learned.tokens:
            raise UserError(
                f"the {kind} names {name}, which {learned.where} does not hold; it holds "
                f"{', '.join(learned.tokens) or 'nothing'}"
            )
    return names


def check_size(config: SynthesisConfig, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels; a UserError for one that does not fit a model."""
    sides = []
    for name in ("height", "width"):
        pixels = getattr(config, name)
        sides.append(resolution if pixels is None else pixels)
        least, most = 2 * multiple, MOST_TIMES * resolution
        if sides[-1] % multiple or not least <= sides[-1] <= most:
            raise UserError(
                f"--{name} is {sides[-1]}; give a multiple of {multiple} from {least} to {most}, "
                f"such as {resolution}"
            )
    return sides[0], sides[1]


def read_grid(config: SynthesisConfig, learned: Learned) -> tuple[int, int] | None:
    """Rows and columns of decoder-1, whose cells boxes have to cover, before a model is loaded.

    None for a single file, which is read whole. Raises UserError for a height or width that does
    not fit.
    """
    sizes = read_sizes(model_source(config, learned), config.runtime.offline)
    if sizes is None:
        return None
    height, width = check_size(config, *sizes)
    cell = sizes[1] // 2  # pixels: the level above the coarsest one, whose cell is the multiple
    return height // cell, width // cell


def latent_size(config: SynthesisConfig, base: StableDiffusion) -> tuple[int, int]:
    """Rows and columns of the latents; a UserError for a height or width that does not fit."""
    height, width = check_size(config, base.resolution, base.multiple)
    return height // base.vae_factor, width // base.vae_factor


def _subject_names(
    subjects: Sequence[Sequence[int]], found: Sequence[tuple[str, int]]
) -> tuple[str, ...]:
    """Of subjects given by token positions: the asset that each holds, or its number."""
    at = {position: name for name, position in found}
    return tuple(
        next((at[p] for p in positions if p in at), f"subject {index + 1}")
        for index, positions in enumerate(subjects)
    )
