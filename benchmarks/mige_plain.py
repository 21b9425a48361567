"""MIGE in the plain order of work: the numbers of :mod:`mige`, with nothing saved.

It is there to be compared with, in what it computes (tests/benchmarks/test_mige_benchmark.py) and
in what it costs (benchmarks/mige.py). It follows the order of the authors' release:

- every denoising step runs all encoders again (vision encoder, Q-Former, fusion, text encoder),
  once for all branches of the guidance;
- all slots for pictures are encoded, those that stay blank too;
- an edit has three branches, also where one of them cancels.

Axes: s slots, g branches, c latent channels, h and w rows and columns, k tokens, d width of the
text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagelab.training.seeds import generator_for
from mige.config import Guidance
from mige.method.encoder import embed_instruction, embed_patches, encode_text, see
from mige.method.guidance import Branch, guide
from mige.method.instruction import Embedded
from mige.method.prediction import predict
from mige.pictures import crop, letterbox, to_pixels, to_vision
from mige.pipeline import MigePipeline
from mige.request import Request

SUBJECT = (Branch(False, False), Branch(True, False))
EDIT = (Branch(False, False), Branch(False, True), Branch(True, True))


@dataclass(frozen=True)
class Inputs:
    """What the encoders read of a request.

    Attributes:
        segments: token ids before, between and behind the marks.
        seen: [s, 3, h, w], as the vision encoder reads pictures; zeros in blank slots.
        latents: [s, c, h, w], unscaled; zeros in blank slots.
        source: [c, h, w], scaled; zeros where nothing is edited.
        branches: of the guidance.
    """

    segments: list[list[int]]
    seen: Tensor
    latents: Tensor
    source: Tensor
    branches: tuple[Branch, ...]


@torch.no_grad()
def prepare(pipeline: MigePipeline, request: Request, seed: int) -> Inputs:
    """Read a request's pictures, with the draws of the pipeline."""
    vae, size, slots = pipeline.vae, pipeline.size, pipeline.config.slots
    side, latent = pipeline.vision_encoder.config.image_size, pipeline.noise(request, seed)
    seen = torch.zeros(slots, 3, side, side, device=pipeline.device)
    latents = torch.zeros(slots, *latent.shape, device=pipeline.device)
    source = torch.zeros_like(latents[0])
    fit = letterbox if request.source is None else crop
    for index, picture in enumerate(request.pictures):
        pixels = to_pixels(fit(picture, size.width, size.height))[None]
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist

        def draw(*labels, of=posterior) -> Tensor:
            noise = torch.randn(latent.shape, generator=generator_for(seed, *labels))
            return of.mean[0].float() + of.std[0].float() * noise.to(of.mean.device)

        seen[index] = to_vision(picture, side).to(seen)
        latents[index] = draw("reference", request.name, index)
        if index == request.source:
            again = request.task == "subject_edit"
            drawn = draw("source", request.name) if again else latents[index]
            source = drawn * vae.config.scaling_factor
    asked = SUBJECT if request.source is None else EDIT
    return Inputs(pipeline.segments(request), seen, latents, source, asked)


def encode(parts, inputs: Inputs, end: int) -> Embedded:
    """States [k, d] of an instruction, and their mask [k]; every slot goes through the encoders.

    Args:
        parts: has the pipeline's parts by name.
        end: id of the end token.
    """
    meaning = see(parts.vision_encoder, parts.qformer, parts.fusion, inputs.seen)
    vectors = parts.fusion(meaning, embed_patches(parts.transformer, inputs.latents))
    embedded = embed_instruction(parts.fusion, parts.text_encoder, inputs.segments, vectors, end)
    return Embedded(encode_text(parts.text_encoder, embedded), embedded.mask)


def predict_branches(
    parts, inputs: Inputs, encoded: Embedded, latents: Tensor, timestep: Tensor, rounds: bool
) -> Tensor:
    """The noise [g, 1, c, h, w] in latents [1, c, h, w], for each branch."""
    null, none = parts.fusion.null_text.to(encoded.embeddings), torch.zeros_like(inputs.source)
    count = len(inputs.branches)
    noise, _ = predict(
        parts.transformer,
        latents.repeat(count, 1, 1, 1),
        torch.stack([inputs.source if branch.source else none for branch in inputs.branches]),
        timestep.expand(count),
        torch.stack([encoded.embeddings if branch.text else null for branch in inputs.branches]),
        encoded.mask.repeat(count, 1),
        rounds,
    )
    return noise[:, None]


@torch.no_grad()
def denoise(pipeline: MigePipeline, inputs: Inputs, noise: Tensor, guidance: Guidance) -> Tensor:
    """:meth:`mige.pipeline.MigePipeline.denoise` of one picture: latents [1, c, h, w]."""
    latents = noise[None].to(inputs.source)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(guidance.steps, device=latents.device)
    for timestep in scheduler.timesteps:
        encoded = encode(pipeline, inputs, pipeline.tokenizer.eos_token_id)
        predicted = predict_branches(
            pipeline, inputs, encoded, latents, timestep, pipeline.config.round_timesteps
        )
        guided = guide(predicted, guidance.text_scale, guidance.image_scale)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
