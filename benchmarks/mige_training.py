"""Measure a training step of MIGE beside the plain order: `python -m benchmarks.mige_training`.

Both sides share one random model and one batch, of all three tasks, and take turns; a time is the
median of the repeats after one run to warm up. A step is the loss, its gradients and an update of
AdamW. Before that, on the CPU, which computes in float32, the losses have to be equal within 1e-5.
On CUDA, in bf16, nothing is asked of them: the table says how far they are apart. The plain order
is the release's: each sample's blank slots go through the vision encoder, the Q-Former and the
fusion like its pictures.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import CLOCK_NAMES, peak_bytes
from benchmarks.mige_cases import END, MODELS, SLOTS, build_parts
from benchmarks.table import (
    add_measuring_options,
    medians,
    parse_measuring_options,
    write_table,
)
from imagelab.cli import HelpFormatter
from mige.method.encoder import embed_instruction
from mige.method.instruction import Embedded
from mige.method.loss import Diffusion
from mige.training.config import Recipe
from mige.training.model import TrainedModel, checkpointed, choose_trained, trained_parameters
from mige.training.samples import Batch

TOLERANCE = 1e-5
#: Pictures of the samples of a batch: two subjects, an edit, an edit with a subject.
COUNTS, TASKS = (1, 2, 1, 2), ("subject", "subject", "edit", "subject_edit")
WAYS = {
    "all weights": {},
    "all weights, checkpointed": {"is_checkpointed": True},
    "a LoRA of rank 16, checkpointed": {"is_checkpointed": True, "lora_rank": 16},
}
HEADINGS = (
    "what learns", "plain, s", "MIGE, s", "times faster", "plain, MB", "MIGE, MB",
    "times smaller", "losses apart",
)  # fmt: skip


class PlainModel(TrainedModel):
    """The same numbers, with every slot of every sample encoded."""

    def embed(self, batch: Batch) -> Embedded:
        vision = batch.vision.new_zeros(len(batch), SLOTS, *batch.vision.shape[1:])
        latents = batch.latents.new_zeros(len(batch), SLOTS, *batch.latents.shape[1:])
        given = zip(
            batch.vision.split(batch.counts), batch.latents.split(batch.counts), strict=True
        )
        for index, (seen, drawn) in enumerate(given):
            vision[index, : len(seen)], latents[index, : len(drawn)] = seen, drawn
        vectors = self.fuse(vision.flatten(0, 1), latents.flatten(0, 1)).split(SLOTS)
        fusion, text_encoder = self.parts["fusion"], self.parts["text_encoder"]
        found = [
            embed_instruction(fusion, text_encoder, segments, mine, END)
            for segments, mine in zip(batch.segments, vectors, strict=True)
        ]
        return Embedded(*(torch.stack(each) for each in zip(*found, strict=True)))


def make_batch(model: str, device: str) -> Batch:
    """Samples of noise."""
    sizes, generator = MODELS[model], torch.Generator().manual_seed(0)
    side, latent = 14 * sizes.vision_patches, (4, sizes.latents, sizes.latents)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count = len(COUNTS)
    return Batch(
        tasks=TASKS,
        segments=tuple([[4 + i] for i in range(n + 1)] for n in COUNTS),
        counts=COUNTS,
        clean=noise(count, *latent),
        noise=noise(count, *latent),
        source=noise(count, *latent),
        timesteps=torch.tensor([10, 300, 600, 900]),
        draws=torch.ones(count),
        vision=noise(sum(COUNTS), 3, side, side),
        latents=noise(sum(COUNTS), *latent),
    ).to(device)


def make_model(
    kind: type[TrainedModel], args: argparse.Namespace, is_checkpointed: bool, lora_rank: int
) -> TrainedModel:
    """A model of which the release's choice learns, without dropout."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    parts = build_parts(MODELS[args.model], args.device)
    model = kind(parts, Diffusion(), end=END, round_timesteps=False, autocast=dtype)
    choose_trained(model, Recipe(lora_rank=lora_rank, dropout=0.0), 0)
    if is_checkpointed:
        checkpointed(model)
    return model.to(args.device)


def make_step(model: TrainedModel, batch: Batch) -> Callable[[], Tensor]:
    """One update; what is returned is the loss before it."""
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch).loss.mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(name: str, args: argparse.Namespace) -> list[str]:
    """The cells of a row of the table."""
    settings = {"is_checkpointed": False, "lora_rank": 0} | WAYS[name]
    batch = make_batch(args.model, args.device)
    sides = {
        side: make_step(make_model(kind, args, **settings), batch)
        for side, kind in (("plain", PlainModel), ("ours", TrainedModel))
    }
    losses = {side: step().item() for side, step in sides.items()}
    apart = abs(losses["ours"] - losses["plain"]) / abs(losses["plain"])
    if args.device == "cpu" and not apart <= TOLERANCE:
        raise AssertionError(f"the losses of {name} are {apart:.2g} apart")
    peaks = {side: peak_bytes(step, args.device) / 2**20 for side, step in sides.items()}
    taken = medians(sides, args)
    return [
        name, f"{taken['plain']:.2f}", f"{taken['ours']:.2f}",
        f"{taken['plain'] / taken['ours']:.2f}", f"{peaks['plain']:.0f}", f"{peaks['ours']:.0f}",
        f"{peaks['plain'] / peaks['ours']:.2f}", f"{apart:.1e}",
    ]  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mige_training", description=__doc__,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", choices=MODELS, default="mid", help="full: on CUDA alone")
    parser.add_argument("--what", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    add_measuring_options(parser, repeats=3, name="latest_training")
    args = parse_measuring_options(parser, argv)
    if args.model == "full" and args.device != "cuda":
        parser.error("--model full needs a CUDA device; give mid or tiny")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    text = (
        f"A step of {len(COUNTS)} samples with {sum(COUNTS)} pictures, model {args.model}; median "
        f"{CLOCK_NAMES[args.clock]} of {args.repeats} alternating repeats; memory is that beyond "
        "the weights."
    )
    write_table(args, text, HEADINGS, [measure(name, args) for name in args.what])


if __name__ == "__main__":
    main()
