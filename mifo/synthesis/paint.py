"""Semantic synthesis: from what was learned, a prompt and boxes to numbered pictures."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from imagelab.attention import layer_grid
from imagelab.boxes import Box, check_box, draw_boxes, parse_box
from imagelab.errors import UserError
from imagelab.models.device import choose_precision
from imagelab.models.stable_diffusion import StableDiffusion
from imagelab.processes import Processes
from imagelab.prompts import encode_ids
from imagelab.sampling import Step, check_steps, denoise, initial_noise
from mifo.learned import LearnedFolder, load_learned, merge_lora, open_learned, portable
from mifo.learned_files import LearnedFiles, load_files, open_files
from mifo.method.control import BoxControl
from mifo.method.layers import decoder_block
from mifo.method.regions import TokenRoles
from mifo.method.sampling import BoxSampling
from mifo.synthesis.config import SynthesisConfig
from mifo.tokens import ASSET, find_assets, token_roles

log = logging.getLogger(__name__)

#: Pictures of a contact sheet are enlarged to about this side, in pixels, for labels to be read.
SHEET_SIDE = 384
MOST_SHEET = 8192  # pixels a side of a contact sheet

MOST = 4  # times the model's own resolution, for a side of a picture


@dataclass(frozen=True)
class Scene:
    """A checked request: the model, what each box is for, and the picture's size in pixels."""

    config: SynthesisConfig
    base: StableDiffusion
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    tokens: TokenRoles | None
    size: tuple[int, int]  # rows, columns of the latents
    device: str
    dtype: torch.dtype


def make_scene(
    config: SynthesisConfig,
    get_boxes: Callable[[int], Sequence[Box]],
    boxes: Sequence[Box] | dict[str, list[Box]] | None = None,
    subject_token_indices: Sequence[Sequence[int]] | None = None,
    device: str = "cpu",
    base: StableDiffusion | None = None,
) -> Scene:
    """Check a request and load its model, unless it is given.

    Args:
        get_boxes: preset layout for so many subjects, where ``boxes`` is None.
        boxes: one a subject in the order of the prompt, or lists of boxes by asset name.
        subject_token_indices: positions of each subject's tokens, in place of the asset names.
        device: torch device to paint on.
        base: of an earlier scene with the same learned folder, to spare loading it again.

    Raises:
        UserError: with what does not fit and what to do.
    """
    check_numbers(config)
    dtype = choose_precision(config.mixed_precision, device)
    if config.lora is not None or config.tokens:
        learned, load = open_files(config.lora, config.tokens, config.model_path), load_files
    else:
        learned, load = open_learned(Path(config.models_dir) / config.model_id), load_learned
    names = asset_names(config.prompt, learned)
    if config.box_control and subject_token_indices is None:
        _placed(names, boxes, get_boxes)  # told before the model is loaded
    if base is None:
        base, _ = load(learned, config.model_path, config.offline)
    check_steps(config.num_inference_steps, base.scheduler)
    tokenizer = base.tokenizer
    encode_ids(tokenizer, config.negative_prompt)
    found = find_assets(tokenizer, config.prompt, learned.assets)
    size = _latent_size(config, base)
    if not config.box_control:
        return Scene(config, base, names, (), None, size, device, dtype)
    if subject_token_indices is None:
        subjects = [[position] for _, position in found]
    else:
        subjects = [list(positions) for positions in subject_token_indices]
        names = _subject_names(subjects, found)
    tokens = token_roles(tokenizer, config.prompt, subjects)
    placed = _placed(names, boxes, get_boxes)
    grid = layer_grid(base.unet, size, decoder_block(base.unet))
    for index, box in enumerate(placed):
        check_box(box, *grid, name=f"box {index + 1} ({names[index]})")
    return Scene(config, base, names, tuple(placed), tokens, size, device, dtype)


def asset_names(prompt: str, learned: LearnedFolder | LearnedFiles) -> tuple[str, ...]:
    """Assets of the prompt, in its order; a UserError names one that was not learned."""
    names = tuple(ASSET.findall(prompt))
    for name in names:
        if name not in learned.tokens:
            raise UserError(
                f"the prompt names {name}, which {learned.where} does not hold; it holds "
                f"{', '.join(learned.tokens) or 'nothing'}"
            )
    return names


def _subject_names(
    subjects: Sequence[Sequence[int]], found: Sequence[tuple[str, int]]
) -> tuple[str, ...]:
    """Of subjects given by token positions: the asset that each holds, or its number."""
    at = {position: name for name, position in found}
    return tuple(
        next((at[p] for p in positions if p in at), f"subject {index + 1}")
        for index, positions in enumerate(subjects)
    )


def _placed(names, boxes, get_boxes) -> list[Box]:
    """A box for each subject, in the prompt's order."""
    if not names:
        raise UserError(
            "the prompt names no asset; name one, such as <asset0>, or give --no_box_control"
        )
    if isinstance(boxes, dict):
        waiting = {name: list(given) for name, given in boxes.items()}
        unknown = [name for name in waiting if name not in names]
        if unknown:
            raise UserError(
                f"--box names {unknown[0]}, which the prompt does not; it names {', '.join(names)}"
            )
        for name, given in waiting.items():
            if len(given) != names.count(name):
                raise UserError(
                    f"--box gives {len(given)} boxes for {name}, which the prompt names "
                    f"{names.count(name)} times; give one box each time"
                )
        if missing := [name for name in names if name not in waiting]:
            raise UserError(
                f"--box gives no box for {missing[0]}; give one for each asset of the prompt"
            )
        return [waiting[name].pop(0) for name in names]
    placed = list(get_boxes(len(names)) if boxes is None else boxes)
    if len(placed) != len(names):
        raise UserError(
            f"there are {len(placed)} boxes and {len(names)} assets in the prompt "
            f"({', '.join(names)}); give one box for each"
        )
    return [parse_box(box) for box in placed]


def check_numbers(config: SynthesisConfig) -> None:
    """Raises UserError for settings that make no sense."""
    counts = {"batch_size": config.batch_size, "num_inference_steps": config.num_inference_steps}
    if config.num_images is not None:
        counts["num_images"] = config.num_images
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; give a whole number from 1 on")
    if config.num_inference_steps > 999:
        raise UserError(f"--num_inference_steps is {config.num_inference_steps}; give 999 at most")
    if config.seed is None:
        raise UserError("there is no seed; give one (only the commands draw it)")
    numbers = asdict(config.guidance) | {"guidance_scale": config.guidance_scale}
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name} is {value}; give a number from 0 on")


def _latent_size(config: SynthesisConfig, base: StableDiffusion) -> tuple[int, int]:
    size = []
    for name in ("height", "width"):
        pixels = getattr(config, name)
        if pixels is None:
            pixels = base.resolution
        if pixels % base.multiple or not 2 * base.multiple <= pixels <= MOST * base.resolution:
            raise UserError(
                f"--{name} is {pixels}; give a multiple of {base.multiple} from "
                f"{2 * base.multiple} to {MOST * base.resolution}, such as {base.resolution}"
            )
        size.append(pixels // base.vae_factor)
    return size[0], size[1]


# ----------------------------------------------------------------------------------------------
# painting


@torch.no_grad()
def encode_prompts(scene: Scene) -> Tensor:
    """States [2, k, d] of the negative prompt (or none) and the prompt."""
    base, config = scene.base, scene.config
    texts = (config.negative_prompt, config.prompt)
    ids = torch.stack([encode_ids(base.tokenizer, text) for text in texts])
    return base.text_encoder(ids.to(scene.device)).last_hidden_state


def prepare(scene: Scene) -> Tensor:
    """Merge the LoRA and move the model to its device; the prompts' states for :func:`paint`."""
    base = scene.base
    merge_lora(base)  # it costs nothing a step then
    base.unet.to(scene.device, scene.dtype)
    base.text_encoder.to(scene.device)
    base.vae.to(scene.device)
    return encode_prompts(scene).to(scene.dtype)


def paint(scene: Scene, indices: Sequence[int], text: Tensor, progress=None) -> list[Image.Image]:
    """Pictures ``indices`` of a scene: picture i starts from noise of seed + i."""
    config, base = scene.config, scene.base
    seeds = [config.seed + index for index in indices]
    shape = (base.unet.config.in_channels, *scene.size)
    latents = initial_noise(shape, seeds).to(scene.device)
    sampling = None
    if scene.tokens is not None:
        control = BoxControl(base.unet, scene.tokens, scene.boxes, scene.size, seeds)
        sampling = BoxSampling(base, control, text[1:], config.num_inference_steps, config.guidance)

    def on_step(step: Step) -> None:
        if progress is not None:
            progress.update(1)

    latents = denoise(
        base,
        latents,
        text,
        config.num_inference_steps,
        config.guidance_scale,
        sampling,
        on_step,
    )
    return decode(base, latents)


@torch.no_grad()
def decode(base: StableDiffusion, latents: Tensor) -> list[Image.Image]:
    """Latents [b, c, h, w] to RGB pictures, one by one to spare memory."""
    pictures = []
    for sample in latents / base.vae.config.scaling_factor:
        pixels = base.vae.decode(sample[None].to(base.vae.dtype)).sample[0].float()
        if not pixels.isfinite().all():
            raise FloatingPointError("the decoded picture is not finite; try --mixed_precision no")
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
        pictures.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
    return pictures


def synthesise(scene: Scene, folder: Path, processes: Processes) -> list[Path]:
    """Paint all pictures of a scene into a folder; returns the paths of the PNGs, then the sheet.

    Each PNG carries its settings in its text and in a JSON beside it; numbers go on from what is
    there, and no file is ever replaced. Processes share the pictures; the first one returns all.
    """
    config = scene.config
    text = prepare(scene)
    folder.mkdir(parents=True, exist_ok=True)
    first = processes.agree(_next_number(folder))
    mine = processes.share(range(config.num_images or config.batch_size))
    batches = [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)]
    saved: dict[int, Path] = {}
    total = len(batches) * config.num_inference_steps
    with tqdm(total=total, desc="synthesis", unit="step", disable=not processes.is_first) as bar:
        for indices in batches:
            for index, picture in zip(indices, paint(scene, indices, text, bar), strict=True):
                saved[index] = save_picture(folder, first + index, picture, describe(scene, index))
    everyone = {i: path for part in processes.gather(saved) for i, path in part.items()}
    if not processes.is_first:
        return []
    paths = [everyone[index] for index in sorted(everyone)]
    return [*paths, save_sheet(scene, paths)]


def save_sheet(scene: Scene, paths: Sequence[Path]) -> Path:
    """A contact sheet of saved pictures, with the boxes drawn over each.

    Small pictures are enlarged, those of a sheet that would be too large are shrunk.
    """
    columns = _columns(len(paths))

    def tile(path: Path) -> Image.Image:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        times = max(1, SHEET_SIDE // max(picture.size))
        shrink = max(1, times * columns * max(picture.size) / MOST_SHEET)
        size = (round(times * side / shrink) for side in picture.size)
        picture = picture.resize(tuple(size), Image.Resampling.BICUBIC)
        return draw_boxes(picture, scene.boxes, list(scene.names)) if scene.boxes else picture

    stem = f"sheet_{paths[0].stem}-{paths[-1].stem}"
    sheet = _png(contact_sheet(map(tile, paths), len(paths)), {})
    return _write_new(paths[0].parent, lambda n: f"{stem}{f'_{n}' if n else ''}.png", sheet)


def _next_number(folder: Path) -> int:
    """One more than the largest number among the pictures that are there."""
    return 1 + max((int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()), default=-1)


def describe(scene: Scene, index: int) -> dict:
    """Everything that makes picture ``index`` again."""
    settings = asdict(scene.config) | {"seed": scene.config.seed + index, "num_images": 1}
    return {
        "settings": settings,
        "subjects": list(scene.names),
        "boxes": [list(box) for box in scene.boxes],
        "subject_token_indices": [list(s) for s in scene.tokens.subjects] if scene.tokens else [],
        "base_model": {"source": scene.base.source, "sha256": scene.base.digest},
        "device": scene.device,
        "precision": str(scene.dtype).removeprefix("torch."),
    }


def save_picture(folder: Path, number: int, picture: Image.Image, facts: dict) -> Path:
    """Write ``NNNN.png`` (the next free number if it is taken), and a JSON of the same name."""
    path = _write_new(folder, lambda n: f"{number + n:04d}.png", _png(picture, facts))
    text = json.dumps(facts, indent=2) + "\n"
    _write_new(folder, lambda n: f"{path.stem}{f'_{n}' if n else ''}.json", text.encode())
    return path


def _png(picture: Image.Image, facts: dict) -> bytes:
    from io import BytesIO

    info = PngImagePlugin.PngInfo()
    if facts:
        info.add_text("mifo", json.dumps(portable(facts)))
        info.add_text("prompt", facts["settings"]["prompt"])
    buffer = BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _write_new(folder: Path, name: Callable[[int], str], content: bytes) -> Path:
    """Write under the first free name; never replaces a file."""
    aside = folder / f".{os.getpid()}.part"
    try:
        aside.write_bytes(content)
        for number in count():
            path = folder / name(number)
            with suppress(FileExistsError):
                _move_new(aside, path)
                return path
    finally:
        aside.unlink(missing_ok=True)


def _move_new(source: Path, target: Path) -> None:
    """Raises FileExistsError if the target is there."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: an empty file takes the name first
        target.open("xb").close()
        os.replace(source, target)


def _columns(count: int) -> int:
    """Of a contact sheet: as near to a square as it goes."""
    return int(np.ceil(np.sqrt(count)))


def contact_sheet(pictures: Iterable[Image.Image], count: int, gap: int = 4) -> Image.Image:
    """``count`` pictures of one size in a grid."""
    columns = _columns(count)
    rows = -(-count // columns)
    for index, picture in enumerate(pictures):
        width, height = picture.width + gap, picture.height + gap
        if index == 0:
            sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
