"""The parts that learn, and the loss of a batch.

Axes: b samples, r pictures of all their marks, k tokens, d width of the text.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from imagelab.training.seeds import generator_for
from mifo_lora import inject, lora_parameters
from mige.method.dropout import choose_dropped, drop
from mige.method.encoder import (
    VISION_NORM_EPS,
    embed_instructions,
    embed_patches,
    encode_text,
    see,
)
from mige.method.instruction import Embedded
from mige.method.loss import Diffusion, Terms
from mige.method.prediction import predict
from mige.training.config import LORA_PARTS, Recipe
from mige.training.samples import Batch

#: Parts of the pipeline that a step computes with.
MODULES = ("transformer", "fusion", "qformer", "text_encoder", "vision_encoder")
LORA_TARGETS = {
    "transformer": tuple(
        f"{layer}.{name}"
        for layer in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    "text_encoder": tuple(f"SelfAttention.{name}" for name in "qkvo"),
}


class TrainedModel(nn.Module):
    """All that a step computes with; calling it gives the loss of each sample of a batch.

    Args:
        parts: modules by the names in :data:`MODULES`.
        end: id of an instruction's last token.
        round_timesteps: see :class:`~mige.pipeline.MigePipeline`.
        autocast: precision of the computation; float32 for none.
        always_sees: run the vision side for batches without pictures, too: processes that share
            weights have to work alike.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        process: Diffusion,
        *,
        end: int,
        round_timesteps: bool,
        autocast: torch.dtype = torch.float32,
        always_sees: bool = False,
    ):
        super().__init__()
        self.parts = nn.ModuleDict({name: parts[name] for name in MODULES})
        self.process, self.end = process, end
        self.round_timesteps, self.autocast = round_timesteps, autocast
        self.always_sees = always_sees
        self.parts["vision_encoder"].post_layernorm.eps = VISION_NORM_EPS

    @classmethod
    def of_parts(cls, parts: Mapping, **settings) -> "TrainedModel":
        """The model of what :func:`~mige.folder.load_parts` read.

        Args:
            settings: ``autocast`` and ``always_sees``, as above.
        """
        return cls(
            parts,
            Diffusion.of(parts["scheduler"]),
            end=parts["tokenizer"].eos_token_id,
            round_timesteps=parts["round_timesteps"],
            **settings,
        )

    def forward(self, batch: Batch) -> Terms:
        """The terms of each sample's loss, float32 [b]."""
        device = batch.clean.device.type
        is_cast = self.autocast != torch.float32
        # autocast's cache would hold a copy of all weights until the end
        cast = torch.autocast(device, self.autocast, cache_enabled=False) if is_cast else None
        with cast or nullcontext():
            embedded = self.embed(batch)
            text = encode_text(self.parts["text_encoder"], embedded)
            text, source = drop(
                choose_dropped(batch.draws), text, self.parts["fusion"].null_text, batch.source
            )
            noised = self.process.noised(batch.clean, batch.noise, batch.timesteps)
            predicted, variance = predict(
                self.parts["transformer"],
                noised,
                source,
                batch.timesteps.to(batch.clean),
                text,
                embedded.mask,
                self.round_timesteps,
            )
        return self.process.loss(batch.clean, batch.noise, batch.timesteps, predicted, variance)

    def embed(self, batch: Batch) -> Embedded:
        """The instructions of a batch as the text encoder reads them: [b, k, d] and [b, k]."""
        parts, vectors = self.parts, [None] * len(batch)
        if len(batch.vision):
            fused = self.fuse(batch.vision, batch.latents)
            vectors = [each if len(each) else None for each in fused.split(batch.counts)]
        embeddings, mask = embed_instructions(
            parts["fusion"], parts["text_encoder"], batch.segments, vectors, self.end
        )
        if self.always_sees and not len(batch.vision):
            blank = batch.vision.new_zeros(1, *batch.vision.shape[1:])
            nothing = self.fuse(blank, batch.latents.new_zeros(1, *batch.latents.shape[1:]))
            embeddings = embeddings + 0 * nothing.sum()
        return Embedded(embeddings, mask)

    def fuse(self, vision: Tensor, latents: Tensor) -> Tensor:
        """Vectors [r, q, d] of pictures."""
        fusion = self.parts["fusion"]
        meaning = see(self.parts["vision_encoder"], self.parts["qformer"], fusion, vision)
        patches = embed_patches(self.parts["transformer"], latents)
        return fusion(meaning.to(fusion.dtype), patches.to(fusion.dtype))


def choose_trained(model: TrainedModel, recipe: Recipe, seed: int) -> None:
    """Let the parts of a recipe learn, whole or through a LoRA, and nothing else."""
    model.requires_grad_(False).eval()
    for name in recipe.parts:
        if name == "vision_norm":
            model.parts["vision_encoder"].post_layernorm.float().requires_grad_(True)
            continue
        part = model.parts[name].train()
        if recipe.lora_rank and name in LORA_PARTS:
            generator = generator_for(seed, "lora", name)
            inject(part, LORA_TARGETS[name], recipe.lora_rank, generator=generator)
            for parameter in lora_parameters(part):
                parameter.requires_grad_(True)
        else:
            part.requires_grad_(True)
    if recipe.dropout is not None:
        set_dropout(model, recipe.dropout)


def set_dropout(model: TrainedModel, rate: float) -> None:
    """Give every dropout within Q-Former and text encoder a rate; attention has it as a number."""
    for name in ("qformer", "text_encoder"):
        for module in model.parts[name].modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
            for attribute in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, rate)


def trained_parameters(model: TrainedModel) -> dict[str, nn.Parameter]:
    """What learns, by its name in the model, each tensor once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learned_whole(recipe: Recipe) -> list[str]:
    """Modules whose weights all learn, so that they have to be in float32."""
    names = [name for name in recipe.parts if name in MODULES]
    return [name for name in names if not (recipe.lora_rank and name in LORA_PARTS)]


def checkpointed(model: TrainedModel) -> None:
    """Keep no activations within transformer and text encoder: compute them twice."""
    model.parts["transformer"].enable_gradient_checkpointing()
    text = model.parts["text_encoder"]
    text.activation_checkpointing_enable({"use_reentrant": False})
    # also where it does not learn; the layers within its blocks, and their dropout, stay at rest
    for block in text.encoder.block:
        block.training = True


def blocks(model: TrainedModel) -> Iterator[nn.Module]:
    """The layers that make up most of the model, from the outside in."""
    yield from model.parts["vision_encoder"].encoder.layers
    yield from model.parts["text_encoder"].encoder.block
    yield from model.parts["transformer"].transformer_blocks


def suited_attention(device: str, dtype: torch.dtype) -> AbstractContextManager:
    """Within, attention is computed in the way that is fastest to train in a precision.

    In bf16 the backward pass of the CPU's fused kernel takes up all that is won elsewhere. With
    plain matrices a step is faster than in float32 (benchmarks/results/mige_recipe_cpu.md).
    """
    is_slow = device == "cpu" and dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()


@contextmanager
def at_rest(model: TrainedModel) -> Iterator[None]:
    """Within, nothing is dropped; the model and torch's random numbers are then as before."""
    was_training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            for module, value in was_training.items():
                module.training = value
