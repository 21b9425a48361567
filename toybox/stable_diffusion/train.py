"""Train toybox from nothing: the autoencoder, then the UNet with its text encoder.

Every random draw depends on the seed and the step alone, so a run may be stopped at any moment
(Ctrl-C) and, started again with the same command, ends where an unbroken one would have.
`torchrun --nproc_per_node N -m toybox.stable_diffusion.train` shares every batch over N processes.
"""

import argparse
import json
import logging
import math
import shutil
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagelab.attention import Recorder, attention_layers, processors
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.figures import plot_losses
from imagelab.io.atomic import write_json
from imagelab.models.device import choose_device
from imagelab.processes import Processes
from toybox.classifier.classifier import to_tensor
from toybox.scenes.scenes import KINDS, caption, distinct_kinds, draw_scene, render
from toybox.stable_diffusion import architecture as toybox_model
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import HELP, TrainConfig
from toybox.stable_diffusion.data import encode_scenes, scene_of
from toybox.stable_diffusion.loop import Trainer

log = logging.getLogger("toybox")


def generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ----------------------------------------------------------------------------------------------
# the two stages


def begin_from(module: torch.nn.Module, start: Path | None, part: str) -> torch.nn.Module:
    """Give a module the weights of the same part of a saved pipeline, if one is given."""
    if start is not None:
        module.load_state_dict(type(module).from_pretrained(start / part).float().state_dict())
    return module


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
    trainer = Trainer("autoencoder", folder, [vae], config, config.vae_lr, processes)
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
    trainer = Trainer("decoder", folder, parts, config, config.decoder_lr, processes)
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


def grounding_loss(
    maps: list[Tensor], coverage: Tensor, nouns: list[tuple[int, int, int]]
) -> Tensor:
    """How far each noun's attention is from lying on its toy, and from reigning there.

    −log s + max(0, log ½ − log a), mean over layers and nouns: s is the share of the noun's
    attention that falls on its toy, a its mean over the toy's pixels. Without the second term
    every pixel leaves nearly all of its attention to the start token.

    Args:
        maps: each layer's [b, n, k] cross-attention, n = h·w pixels in row order.
        coverage: [b, toys, h, w] share of each latent pixel that a toy covers.
        nouns: (sample, toy, token) of each named toy.
    """
    samples, toys, tokens = torch.tensor(nouns).unbind(-1)
    inside = coverage[samples, toys].flatten(1)  # [nouns, n]
    loss = 0.0
    for attention in maps:
        columns = attention[samples, :, tokens]  # [nouns, n]
        on_toy = (columns * inside).sum(-1)  # [nouns]
        share = on_toy / columns.sum(-1).clamp_min(1e-8)
        mean = on_toy / inside.sum(-1).clamp_min(1e-8)
        loss = loss - share.clamp_min(1e-4).log().mean()
        loss = loss - (2 * mean).clamp(1e-4, 1).log().mean()
    return loss / len(maps)


def timestep_weights(snr: Tensor, most: float) -> Tensor:
    """Weight of each timestep's squared error of the noise, 1 on average, [timesteps].

    Min-SNR (Hang et al. 2023, arXiv 2303.09556) for the signal-to-noise ratios above ``most``, and
    1/√SNR (Yu et al. 2023, arXiv 2310.08442) for those below 1: the noisiest steps, where a caption
    decides what is drawn and where, would have no part in the loss otherwise.
    """
    weights = snr.clamp(max=most) / snr / snr.clamp(max=1).sqrt()
    return weights / weights.mean()


def train_unet(
    config: TrainConfig,
    shape: ToyboxConfig,
    folder: Path,
    data,
    scale: float,
    tokenizer,
    report=None,
    start: Path | None = None,
    processes: Processes | None = None,
):
    processes = processes or Processes("cpu")
    device = processes.device
    torch.manual_seed(config.seed + 1)
    unet = begin_from(toybox_model.build_unet(shape), start, "unet").to(device)
    text_encoder = toybox_model.build_text_encoder(shape, tokenizer)
    text_encoder = begin_from(text_encoder, start, "text_encoder").to(device)
    trainer = Trainer("unet", folder, [unet, text_encoder], config, config.lr, processes)
    scheduler = toybox_model.build_scheduler()
    alphas = scheduler.alphas_cumprod
    weights = timestep_weights(alphas / (1 - alphas), config.min_snr).to(device)
    recorder = Recorder()
    watched = [n for n in attention_layers(unet, "cross") if n.startswith("up_blocks.1.")]

    def batch(index: int):
        rng = np.random.default_rng((config.seed, 7, index))
        rows = rng.integers(config.scenes, size=config.batch)
        told = [caption(scene_of(config, int(row)), rng, config.bare_captions) for row in rows]
        silent = rng.random(config.batch) < config.caption_dropout
        rows, told, silent = (processes.share(part) for part in (rows, told, silent))
        texts = ["" if mute else c.text for c, mute in zip(told, silent, strict=True)]
        nouns = [  # each word is one token, after the start token
            (sample, toy, 1 + word)
            for sample, c in enumerate(told)
            if not silent[sample]
            for toy, word in zip(c.toys, c.nouns, strict=True)
        ]
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        rows = torch.from_numpy(rows)
        return data["latents"][rows].float() * scale, data["coverage"][rows].float(), ids, nouns

    def step(index: int) -> Tensor:
        index += config.skip
        *tensors, nouns = batch(index)
        latents, coverage, ids = (tensor.to(device) for tensor in tensors)
        draw = generator(config.seed, index)
        noise = torch.randn(config.batch, *latents.shape[1:], generator=draw)
        strata = torch.arange(config.batch) + torch.rand(config.batch, generator=draw)
        timesteps = (strata * len(alphas) / config.batch).long().clamp(max=len(alphas) - 1)
        noise, timesteps = (processes.share(part).to(device) for part in (noise, timesteps))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        hidden = text_encoder(ids).last_hidden_state
        predicted = unet(noisy, timesteps, hidden).sample
        error = (predicted - noise).square().mean((1, 2, 3))
        loss = (weights[timesteps] * error).mean()
        seen = [noun for noun in nouns if timesteps[noun[0]] < config.grounding_timesteps]
        if seen:
            maps = [recorder.maps[name] for name in watched]
            loss = loss + config.grounding_weight * grounding_loss(maps, coverage, seen)
        return loss

    def show(done: int) -> None:
        with trainer.ema.shown():
            report(unet, text_encoder, done)

    with processors(unet, {name: recorder.processor(name) for name in watched}):
        trainer.run(config.steps, step, report=report and show, report_every=config.sample_steps)
    trainer.ema.swap()
    return unet.eval(), text_encoder.eval(), trainer


# ----------------------------------------------------------------------------------------------
# the command


def check_work(work: Path, config: TrainConfig, start: Path | None) -> None:
    """Make the work folder, or raise UserError where it holds a training of another kind.

    The number of the UNet's steps may change, for more of them or an earlier cool-down, and how
    often it draws samples.
    """
    facts = {k: v for k, v in asdict(config).items() if k not in ("steps", "sample_steps")}
    facts = json.loads(json.dumps(facts | {"begin_from": str(start)}))
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
    parser.add_argument("--device", default="auto", help="auto, cuda (in bfloat16), mps or cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    for name, value in asdict(TrainConfig()).items():
        more = {"type": type(value)}
        if name == "kinds":
            more = {"nargs": "+", "choices": KINDS, "metavar": "KIND"}
        if name == "count_odds":
            more = {"nargs": 3, "type": float, "metavar": "ODDS"}
        parser.add_argument(f"--{name}", default=value, help=HELP[name], **more)
    return parser, parser.parse_args(argv)


def chosen(options: argparse.Namespace, processes: Processes) -> TrainConfig:
    """What the options ask for; a UserError for what makes no sense."""
    given = {field.name: getattr(options, field.name) for field in fields(TrainConfig)}
    given["kinds"] = distinct_kinds(given["kinds"])
    given["count_odds"] = odds = tuple(given["count_odds"])
    if not (min(odds) >= 0 and 0 < sum(odds) < math.inf):
        raise UserError("--count_odds takes three numbers from 0 on, not all of them 0")
    for name in ("vae_scenes", "vae_batch", "decoder_batch", "scenes", "batch", "sample_steps"):
        if given[name] < 1:
            raise UserError(f"--{name} is {given[name]}; give 1 or more")
    if options.begin_from is None and not given["vae_steps"]:
        raise UserError("--vae_steps 0 keeps the latents of --begin_from; give that or more steps")
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


def train(
    config: TrainConfig, work: Path, output: Path, start: Path | None, processes: Processes
) -> None:
    """Train what is not yet trained in ``work``, and write the pipeline."""
    shape = ToyboxConfig()
    began_from = read_record(start) if start else None
    with processes.first_alone():
        check_work(work, config, start)
    if start is not None and processes.is_first:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(start / "tokenizer" / name, work / name)
    vae, vae_trainer = train_vae(config, shape, work, start, processes)
    decoder_trainer = train_decoder(vae, config, shape, work, processes)
    quality = psnr(vae, config, shape)
    log.info("autoencoder: %.1f dB on held-out scenes", quality)
    with processes.first_alone():
        data = encode_scenes(vae, config, shape, work / "latents.pt")
    if start is None:
        scale = 1 / data["latents"].float().std().item()
    else:  # the UNet knows latents of this scale
        scale = AutoencoderKL.load_config(start / "vae")["scaling_factor"]
    vae.register_to_config(scaling_factor=scale)

    rng = np.random.default_rng(config.seed)
    texts = [caption(draw_scene(rng), rng).text for _ in range(5000)]  # the words of all kinds
    with processes.first_alone():
        tokenizer = toybox_model.build_tokenizer(texts, work)

    def report(unet, text_encoder, done: int) -> None:
        pipeline = toybox_model.build_pipeline(vae, text_encoder, tokenizer, unet)
        sample_grid(pipeline, work / f"samples_{done:06d}.png")

    unet, text_encoder, trainer = train_unet(
        config, shape, work, data, scale, tokenizer, report, start, processes
    )
    if not processes.is_first:
        return
    pipeline = toybox_model.build_pipeline(vae, text_encoder, tokenizer, unet)
    toybox_model.save_half(pipeline, output)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / name, output / "tokenizer" / name)
    trainers = (vae_trainer, decoder_trainer, trainer)
    if curves := {one.name: one.losses for one in trainers if one.losses}:
        plot_losses(output / "training.png", curves)
    record = {
        "train": asdict(config),
        "shape": asdict(shape),
        "psnr_db": quality,
        "seconds": {
            "autoencoder": vae_trainer.seconds,
            "decoder": decoder_trainer.seconds,
            "unet": trainer.seconds,
        },
        "processes": processes.count,
        "began_from": began_from,
    }
    write_json(output / "record.json", record)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        processes = Processes(choose_device(options.device))
        config = chosen(options, processes)
        output = options.output or options.work / "model"
        try:
            train(config, options.work, output, options.begin_from, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        processes.leave()


if __name__ == "__main__":
    main()
