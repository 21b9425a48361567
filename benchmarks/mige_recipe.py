"""Measure what a step of toybox's MIGE costs: `python -m benchmarks.mige_recipe`.

Ways to compute and to update take turns on one batch of random numbers; a time is the median of the
repeats after one run to warm up. A step is what `mige.train` makes: loss, gradients, update.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import CLOCK_NAMES
from benchmarks.table import (
    add_measuring_options,
    medians,
    parse_measuring_options,
    write_table,
)
from imagelab.cli import HelpFormatter
from mige.folder import find_folder, load_parts
from mige.training.config import Recipe
from mige.training.memory import blank_batch
from mige.training.model import (
    TrainedModel,
    choose_trained,
    suited_attention,
    trained_parameters,
)
from mige.training.optimizer import make_optimizer
from mige.training.samples import Batch

#: Of a way: the precision, whether attention is computed as training has it, and the optimiser.
WAYS = {
    "float32, AdamW": (torch.float32, True, "adamw"),
    "float32, Muon": (torch.float32, True, "muon"),
    "bf16 with the fused attention, AdamW": (torch.bfloat16, False, "adamw"),
    "bf16, AdamW": (torch.bfloat16, True, "adamw"),
    "bf16, Muon": (torch.bfloat16, True, "muon"),
}
HEADINGS = ("way", "a step, s", "of the first")


def make_batch(folder: Path, samples: int, device: str) -> Batch:
    """Samples of noise, with two pictures each."""
    batch, generator = blank_batch(folder, samples), torch.Generator().manual_seed(0)
    names = ("clean", "noise", "source", "vision", "latents")
    noise = {name: torch.randn(getattr(batch, name).shape, generator=generator) for name in names}
    return replace(batch, **noise, timesteps=torch.full((samples,), 500)).to(device)


def make_step(name: str, folder: Path, batch: Batch, device: str) -> Callable[[], None]:
    """One update of a model of its own."""
    dtype, is_suited, optimizer = WAYS[name]
    model = TrainedModel.of_parts(load_parts(folder, left_out=["vae"]), autocast=dtype)
    recipe = Recipe(learning_rate=1e-9, optimizer=optimizer)
    choose_trained(model, recipe, 0)
    model.to(device)
    update = make_optimizer(trained_parameters(model), recipe)

    def step() -> None:
        update.zero_grad(set_to_none=True)
        with suited_attention(device, dtype) if is_suited else nullcontext():
            model(batch).loss.mean().backward()
            update.step()

    return step


def measure(args: argparse.Namespace) -> list[list[str]]:
    """The rows of the table."""
    folder = find_folder("toybox")
    batch = make_batch(folder, args.batch_size, args.device)
    steps = {name: make_step(name, folder, batch, args.device) for name in WAYS}
    for step in steps.values():
        step()
    taken = medians(steps, args)
    first = next(iter(taken.values()))
    return [[name, f"{time:.3f}", f"{time / first:.2f}"] for name, time in taken.items()]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mige_recipe", description=__doc__,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16)
    add_measuring_options(parser, repeats=7, name="latest_recipe")
    args = parse_measuring_options(parser, argv)
    if args.batch_size < 1:
        parser.error("--batch_size starts at 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    text = (
        f"A step of {args.batch_size} samples; median {CLOCK_NAMES[args.clock]} of {args.repeats} "
        "alternating repeats."
    )
    write_table(args, text, HEADINGS, measure(args))


if __name__ == "__main__":
    main()
