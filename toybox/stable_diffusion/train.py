"""Train toybox from nothing: the autoencoder, then the UNet with its text encoder.

Every random draw depends on the seed and the step alone, so a run may be stopped at any moment
(Ctrl-C) and, started again with the same command, ends where an unbroken one would have.
`torchrun --nproc_per_node N -m toybox.stable_diffusion.train` shares every batch over N processes.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from imagelab.cli import report_errors
from imagelab.io.tensors import write_tensors
from imagelab.models.device import choose_device
from imagelab.processes import Processes
from imagelab.training.interrupt import Interrupted
from toybox.classifier.network import load_classifier
from toybox.scenes.scenes import caption, draw_scene
from toybox.stable_diffusion.architecture import build_pipeline, build_tokenizer
from toybox.stable_diffusion.batches import Pictures
from toybox.stable_diffusion.between import measure_between
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.data import encode_scenes
from toybox.stable_diffusion.folders import (
    check_work,
    choose_output,
    copy_vocabulary,
    read_record,
    read_scale,
    sample_grid,
    write_pipeline,
)
from toybox.stable_diffusion.measures import psnr
from toybox.stable_diffusion.options import PARTS, choose_config, choose_shape, parse_args
from toybox.stable_diffusion.training import Run, Trained, train_decoder, train_unet, train_vae

log = logging.getLogger("toybox")


def train(run: Run, options: argparse.Namespace) -> None:
    """Train what is not yet trained in ``--work``, and write the pipeline."""
    start, processes = options.begin_from, run.processes
    record = {
        "shape": asdict(run.shape),
        "processes": processes.count,
        "began_from": read_record(start) if start else None,
        "fresh": options.fresh,
    }
    with processes.first_alone():
        output = choose_output(options.output, run, start, options.overwrite)
        check_work(run, start, options.fresh)
        if start and processes.is_first:
            copy_vocabulary(start / "tokenizer", run.work)
    pictures = Pictures(run.config, run.shape, processes)
    vae, course = train_vae(run, pictures)
    courses = {"autoencoder": course, "decoder": train_decoder(run, vae, pictures)}
    record["psnr_db"] = psnr(vae, run.config, run.shape)
    log.info("autoencoder: %.1f dB on held-out scenes", record["psnr_db"])
    with processes.first_alone():
        tokenizer = build_tokenizer(all_words(run.config.seed), run.work)
        cache = run.work / "latents.safetensors"
        data = encode_scenes(vae, run.config, run.shape, cache, tokenizer, options.workers)
    scale = read_scale(start) if start else 1 / data["latents"].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    trained = learn_to_draw(run, vae, tokenizer, data)
    if not processes.is_first:
        return
    courses["unet"] = trained.course
    steps = len(trained.course.losses)
    record["train"] = asdict(replace(run.config, steps=steps))
    record["seconds"] = {name: one.seconds for name, one in courses.items()}
    pipeline = build_pipeline(vae, trained.text_encoder, tokenizer, trained.unet)
    # what measurements alone need
    write_tensors(run.work / "looks.safetensors", trained.embedder.state_dict())
    if options.between:
        record["between"] = between(pipeline, trained.embedder, options.between, run.config)
    write_pipeline(pipeline, output, run.work, courses, record)


def learn_to_draw(run: Run, vae, tokenizer, data: dict[str, Tensor]) -> Trained:
    """The UNet and its text encoder, with sample grids on the way."""

    def report(unet, text_encoder, done: int) -> None:
        pipeline = build_pipeline(vae, text_encoder, tokenizer, unet)
        sample_grid(pipeline, run.work / f"samples_{done:06d}.png")

    return train_unet(run, data, vae.config.scaling_factor, tokenizer, report)


def all_words(seed: int) -> Iterator[str]:
    """Captions that hold the words of all kinds."""
    rng = np.random.default_rng(seed)
    for _ in range(5000):
        yield caption(draw_scene(rng), rng).text


def between(pipeline, embedder, images: int, config: TrainConfig) -> list[dict[str, float]]:
    """Hues between the named ones, from the weights as they are saved: clear, and half noise."""
    pipeline.to(dtype=torch.float16).to(torch.float32)
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
    parser, options = parse_args(argv, __doc__)
    with report_errors(parser, options.debug):
        processes = Processes(choose_device(options.device))
        start = options.begin_from
        parts = {part: start for part in ("vae", *PARTS) if start and part not in options.fresh}
        run = Run(
            choose_config(options, processes), choose_shape(options), options.work, processes,
            start=parts,
            until=None if options.minutes is None else started + 60 * options.minutes,
            graph=options.cuda_graph,
            compiled=options.compile,
        )  # fmt: skip
        try:
            train(run, options)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Interrupted):  # in all processes, and the first one still saves
                processes.leave()
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        processes.end()


if __name__ == "__main__":
    main()
