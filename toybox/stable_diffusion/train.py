"""Train toybox from nothing: the autoencoder, then the UNet with its text encoder.

The UNet's part is in ``diffusion.py``, the scenes are in ``data.py``.

Every random draw depends on the seed and the step alone, so a run may be stopped at any moment
(Ctrl-C) and, started again with the same command, ends where an unbroken one would have.
`torchrun --nproc_per_node N -m toybox.stable_diffusion.train` shares every batch over N processes.
"""

import argparse
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.figures import plot_losses
from imagelab.io.atomic import write_json, written_aside
from imagelab.models.device import choose_device
from imagelab.processes import Processes
from toybox.classifier.network import load_classifier, to_tensor
from toybox.scenes.scenes import KINDS, caption, distinct_kinds, draw_scene, render
from toybox.stable_diffusion import architecture as toybox_model
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.between import measure_between
from toybox.stable_diffusion.config import HELP, TrainConfig
from toybox.stable_diffusion.data import encode_scenes, scene_of
from toybox.stable_diffusion.diffusion import Pace, begin_from, generator, train_unet
from toybox.stable_diffusion.loop import Trainer

log = logging.getLogger("toybox")
PARTS = ("unet", "text_encoder")
#: Numbers that make no sense below 1.
COUNTS = (
    "vae_scenes", "vae_batch", "decoder_batch", "scenes", "captions", "batch", "sample_steps",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------
# the autoencoder


def train_vae(
    config: TrainConfig,
    shape: ToyboxConfig,
    folder: Path,
    start: Path | None = None,
    processes: Processes | None = None,
):
    processes = processes or Processes("cpu")
    torch.manual_seed(config.seed)
    vae = begin_from(toybox_model.build_vae(shape), start, "vae").to(processes.device)
    trainer = Trainer(
        "autoencoder", folder, [vae], config, config.vae_lr, processes, config.vae_batch
    )
    crop = config.vae_crop
    if len(trainer.losses) < config.vae_steps:
        pixels, toys = vae_scenes(config, shape)

    def crops(index: int) -> Tensor:
        """Half of the crops are centred on a toy."""
        rng = np.random.default_rng((config.seed, index))
        out = []
        for i in rng.integers(len(pixels), size=config.vae_batch):
            corner = rng.integers(0, shape.resolution - crop + 1, 2)
            rows, columns = np.nonzero(toys[i])
            if rng.random() < 0.5 and len(rows):
                at = rng.integers(len(rows))
                corner = np.clip(
                    [rows[at], columns[at]] - np.array(crop // 2), 0, shape.resolution - crop
                )
            y, x = corner
            out.append(pixels[i, y : y + crop, x : x + crop])
        return to_tensor(out)

    def step(index: int) -> Tensor:
        images = processes.share(crops(index)).to(processes.device)
        posterior = vae.encode(images).latent_dist
        draw = generator(config.seed, index)
        restored = vae.decode(drawn_latents(posterior, config.vae_batch, draw, processes)).sample
        return F.mse_loss(restored, images) + config.kl_weight * posterior.kl().mean()

    trainer.run(config.vae_steps, step)
    trainer.ema.swap()
    return vae.eval().requires_grad_(False), trainer


def drawn_latents(posterior, batch: int, draw: torch.Generator, processes: Processes) -> Tensor:
    """This process's latents [b, c, h, w] of a batch, from the noise that the whole batch draws."""
    noise = torch.randn(batch, *posterior.mean.shape[1:], generator=draw)
    return posterior.mean + posterior.std * processes.share(noise).to(processes.device)


@lru_cache(maxsize=1)  # the decoder learns from what the autoencoder has just seen
def vae_scenes(config: TrainConfig, shape: ToyboxConfig) -> tuple[np.ndarray, np.ndarray]:
    """What the autoencoder learns from: pictures, uint8 [n, h, w, 3], and where toys are, bool."""
    drawn = [
        render(scene_of(replace(config, seed=config.seed + 1), i), shape.resolution)
        for i in tqdm(range(config.vae_scenes), "scenes")
    ]
    pixels = np.stack([np.asarray(picture) for picture, _ in drawn])
    return pixels, np.stack([masks.any(axis=0) for _, masks in drawn])


def train_decoder(
    vae, config: TrainConfig, shape: ToyboxConfig, folder: Path, processes: Processes | None = None
) -> Trainer:
    """Teach the decoder alone on whole scenes; the latents stay what they are.

    Its group norms average over all that they see, and crops have other means than scenes.
    """
    processes = processes or Processes("cpu")
    parts = [vae.decoder, vae.post_quant_conv]
    trainer = Trainer(
        "decoder", folder, parts, config, config.decoder_lr, processes, config.decoder_batch
    )
    if len(trainer.losses) < config.decoder_steps:
        pixels, _ = vae_scenes(config, shape)

    def step(index: int) -> Tensor:
        chosen = np.random.default_rng((config.seed, index)).integers(
            len(pixels), size=config.decoder_batch
        )
        images = processes.share(to_tensor(pixels[chosen])).to(processes.device)
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
        draw = generator(config.seed, index)
        latents = drawn_latents(posterior, config.decoder_batch, draw, processes)
        return F.mse_loss(vae.decode(latents).sample, images)

    for part in parts:
        part.requires_grad_(True)
    trainer.run(config.decoder_steps, step)
    trainer.ema.swap()
    vae.requires_grad_(False)
    return trainer


# ----------------------------------------------------------------------------------------------
# the command


def check_work(
    work: Path, config: TrainConfig, start: Path | None, more: dict | None = None
) -> None:
    """Make the work folder, or raise UserError where it holds a training of another kind.

    The number of the UNet's steps may change, for more of them or an earlier cool-down, and how
    often it draws samples.
    """
    facts = {k: v for k, v in asdict(config).items() if k not in ("steps", "sample_steps")}
    facts = json.loads(json.dumps(facts | {"begin_from": str(start)} | (more or {})))
    path = work / "settings.json"
    work.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, facts)
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    if differ := ", ".join(key for key in facts if then.get(key) != facts[key]):
        raise UserError(
            f"{work} holds a training with other settings ({differ}); give another --work"
        )


def sample_grid(pipeline, path: Path, seed: int = 0) -> None:
    """Twelve fixed prompts, guidance 5, 25 steps."""
    from imagelab.io.pictures import Tile, contact_sheet

    prompts = [
        "a red car",
        "a photo of a purple lizard",
        "a teal fish on the grass",
        "a yellow balloon in the sky",
        "a green robot in the snow",
        "an orange cat",
        "a blue teapot on a wooden table",
        "a pink dog",
        "a photo of a purple lizard and a yellow balloon",
        "a red car and a blue car on the road",
        "a fox and a bear in the snow",
        "a teal chair and an orange duck",
    ]
    draw = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pictures = pipeline(prompts, num_inference_steps=25, guidance_scale=5.0, generator=draw).images
    contact_sheet([Tile(picture) for picture in pictures], gap=0).save(path)


def psnr(vae, config: TrainConfig, shape: ToyboxConfig, count: int = 128) -> float:
    """Mean PSNR in dB of held-out scenes through the autoencoder (8-bit range)."""
    held_out = replace(config, seed=config.seed + 999)
    scenes = [scene_of(held_out, index) for index in range(count)]
    images = to_tensor([render(scene, shape.resolution)[0] for scene in scenes]).to(vae.device)
    with torch.inference_mode():
        restored = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = ((restored - images) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def parse_args(argv: list[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        prog="python -m toybox.stable_diffusion.train",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--work", type=Path, default=Path("toybox_work"), help="checkpoints, sample grids"
    )
    parser.add_argument(
        "--output", type=Path, help="pipeline folder; None: the folder model in --work"
    )
    parser.add_argument("--begin_from", type=Path, help="pipeline folder to go on from")
    parser.add_argument(
        "--fresh", nargs="+", default=[], choices=PARTS, metavar="PART",
        help=f"what begins anew nevertheless: {', '.join(PARTS)}",
    )  # fmt: skip
    for name, what in (("channels", "channels"), ("heads", "attention heads")):
        parser.add_argument(
            f"--unet_{name}", nargs="+", type=int, metavar="N",
            help=f"{what} of each level of a new UNet (default: those of --begin_from)",
        )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cuda (in bfloat16), mps or cpu")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that render scenes; 0: this one alone"
    )
    parser.add_argument(
        "--minutes", type=float,
        help="from the start of the command to the UNet's last step; replaces --steps",
    )  # fmt: skip
    parser.add_argument(
        "--cuda_graph", action="store_true", help="replay each step as a CUDA graph: faster"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet: a minute or two, then faster"
    )
    parser.add_argument(
        "--between", type=int, default=0, metavar="IMAGES",
        help="pictures that measure hues between the named ones at the end",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    for name, value in asdict(TrainConfig()).items():
        more = {"type": type(value)}
        if name == "kinds":
            more = {"nargs": "+", "choices": KINDS, "metavar": "KIND"}
        if name == "count_odds":
            more = {"nargs": 3, "type": float, "metavar": "ODDS"}
        if isinstance(value, bool):
            more = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", default=value, help=HELP[name], **more)
    return parser, parser.parse_args(argv)


def chosen(options: argparse.Namespace, processes: Processes) -> TrainConfig:
    """What the options ask for; a UserError for what makes no sense."""
    given = {field.name: getattr(options, field.name) for field in fields(TrainConfig)}
    given["kinds"] = distinct_kinds(given["kinds"])
    given["count_odds"] = odds = tuple(given["count_odds"])
    if not (min(odds) >= 0 and 0 < sum(odds) < math.inf):
        raise UserError("--count_odds takes three numbers from 0 on, not all of them 0")
    for name in COUNTS:
        if given[name] < 1:
            raise UserError(f"--{name} is {given[name]}; give 1 or more")
    if options.begin_from is None and not given["vae_steps"]:
        raise UserError("--vae_steps 0 keeps the latents of --begin_from; give that or more steps")
    for name in ("free_looks", "placeholders", "mixed", "look_noise"):
        if not 0 <= given[name] <= 1:
            raise UserError(f"--{name} is {given[name]}; give a share from 0 to 1")
    if given["placeholders"] + given["mixed"] > 1:
        raise UserError("--placeholders and --mixed are shares of all captions, more than 1 here")
    if options.minutes is not None and given["cooldown"] > 0.5:
        raise UserError("with --minutes the cool-down cannot be longer than half of the steps")
    if (options.cuda_graph or options.compile) and not str(processes.device).startswith("cuda"):
        raise UserError(f"--cuda_graph and --compile are for CUDA, not for {processes.device}")
    config = TrainConfig(**given)
    batches = config.batch, config.vae_batch, config.decoder_batch
    if any(size % processes.count for size in batches):
        raise UserError(f"the batches must divide by {processes.count}, the processes")
    return config


def read_record(folder: Path) -> dict:
    """How the model in a pipeline folder was trained."""
    try:
        return json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--begin_from {folder} has no readable record.json ({type(error).__name__}); "
            "give a folder that this trainer wrote"
        ) from error


def choose_shape(options: argparse.Namespace) -> ToyboxConfig:
    """The shape of --begin_from or the usual one, with the UNet that the options ask for."""
    shape = ToyboxConfig()
    if options.begin_from is not None:
        known = read_record(options.begin_from)["shape"]
        known = {key: tuple(v) if isinstance(v, list) else v for key, v in known.items()}
        shape = replace(shape, **known)
    wanted = {
        name: tuple(value)
        for name in ("unet_channels", "unet_heads")
        if (value := getattr(options, name)) is not None
    }
    if wanted and options.begin_from is not None and "unet" not in options.fresh:
        raise UserError(f"--{min(wanted)} needs a new UNet: add --fresh unet")
    return replace(shape, **wanted)


def train(
    config: TrainConfig,
    shape: ToyboxConfig,
    options: argparse.Namespace,
    processes: Processes,
    pace: Pace,
) -> None:
    """Train what is not yet trained in ``--work``, and write the pipeline."""
    work, start = options.work, options.begin_from
    parts = {part: start for part in PARTS if start and part not in options.fresh}
    began_from = read_record(start) if start else None
    with processes.first_alone():
        check_work(work, config, start, {"fresh": options.fresh, "shape": asdict(shape)})
    if start is not None and processes.is_first:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(start / "tokenizer" / name, work / name)
    vae, vae_trainer = train_vae(config, shape, work, start, processes)
    decoder_trainer = train_decoder(vae, config, shape, work, processes)
    quality = psnr(vae, config, shape)
    log.info("autoencoder: %.1f dB on held-out scenes", quality)
    with processes.first_alone():
        tokenizer = toybox_model.build_tokenizer(all_words(config.seed), work)
        data = encode_scenes(vae, config, shape, work / "latents.pt", tokenizer, options.workers)
    if start is None:
        scale = 1 / data["latents"].float().std().item()
    else:  # the UNet knows latents of this scale
        scale = AutoencoderKL.load_config(start / "vae")["scaling_factor"]
    vae.register_to_config(scaling_factor=scale)

    def report(unet, text_encoder, done: int) -> None:
        pipeline = toybox_model.build_pipeline(vae, text_encoder, tokenizer, unet)
        sample_grid(pipeline, work / f"samples_{done:06d}.png")

    trained = train_unet(
        config, shape, work, data, scale, tokenizer, report, parts, processes, pace
    )
    if not processes.is_first:
        return
    pipeline = toybox_model.build_pipeline(vae, trained.text_encoder, tokenizer, trained.unet)
    trainers = (vae_trainer, decoder_trainer, trained.trainer)
    record = {
        "train": asdict(replace(config, steps=len(trained.trainer.losses))),
        "shape": asdict(shape),
        "psnr_db": quality,
        "seconds": {one.name: one.seconds for one in trainers},
        "processes": processes.count,
        "began_from": began_from,
        "fresh": options.fresh,
    }
    write_pipeline(pipeline, options.output or work / "model", work, trainers, record)
    with written_aside(work / "looks.pt") as aside:  # needed for measurements alone
        torch.save(trained.embedder.state_dict(), aside)
    if options.between:
        record["between"] = between(pipeline, trained.embedder, options.between, config)
        write_json((options.output or work / "model") / "record.json", record)


def all_words(seed: int) -> Iterator[str]:
    """Captions that hold the words of all kinds."""
    rng = np.random.default_rng(seed)
    for _ in range(5000):
        yield caption(draw_scene(rng), rng).text


def write_pipeline(pipeline, output: Path, work: Path, trainers, record: dict) -> None:
    """The pipeline folder, with the learning curves and how it was trained."""
    toybox_model.save_half(pipeline, output)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / name, output / "tokenizer" / name)
    if curves := {one.name: one.losses for one in trainers if one.losses}:
        plot_losses(output / "training.png", curves)
    write_json(output / "record.json", record)


def between(pipeline, embedder, images: int, config: TrainConfig) -> list[dict[str, float]]:
    """Hues between the named ones, from the weights as they were saved: clear, and half noise."""
    pipeline.to(torch.float32)
    classifier = load_classifier()
    found = [
        measure_between(pipeline, embedder, classifier, images, 0, config.kinds, share)
        for share in (0.0, 0.5)
    ]
    for one in found:
        log.info("hues between the named ones: %s", one)
    return found


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        processes = Processes(choose_device(options.device))
        config, shape = chosen(options, processes), choose_shape(options)
        until = None if options.minutes is None else started + 60 * options.minutes
        pace = Pace(until, options.cuda_graph, options.compile)
        try:
            train(config, shape, options, processes, pace)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        processes.leave()


if __name__ == "__main__":
    main()
