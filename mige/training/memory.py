"""How much memory a training takes, before anything is loaded.

Weights, gradients and moments are counted on the meta device, where tensors have shapes alone.
Activations are what a batch leaves behind for the backward pass. They are counted on torch's fake
tensors, for which the kernels are chosen that real ones would have.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from mige.folder import config_of
from mige.method.loss import Diffusion
from mige.sizes import build
from mige.training.config import Recipe, TrainingConfig
from mige.training.model import (
    MODULES,
    TrainedModel,
    choose_trained,
    suited_attention,
    trained_parameters,
)
from mige.training.optimizer import moments_of
from mige.training.samples import Batch, Facts

FLOAT = 4  # bytes
PICTURES = 2  # references of the sample whose activations are counted
NAMES = ("_class_name", "model_type")  # in configs, of what is built


@dataclass(frozen=True)
class Estimate:
    """Numbers of weights, and bytes of a process."""

    trained: int
    frozen: int
    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.activations

    def __str__(self) -> str:
        def gib(value: int) -> str:
            return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"

        parts = ["weights", "gradients", "moments", "average", "activations"]
        told = ", ".join(f"{name} {gib(size)}" for name in parts if (size := getattr(self, name)))
        return (
            f"{self.trained:,} of {self.trained + self.frozen:,} weights learn; a process takes "
            f"about {gib(self.total)}: {told}"
        )


def estimate(
    folder: Path, config: TrainingConfig, processes: int, dtype: torch.dtype, device: str
) -> Estimate:
    """What a process of a training takes.

    Args:
        folder: of the model, of which no weights are read.
        processes: that share the batch.
        dtype: that is computed in, on a device.
    """
    recipe, running = config.recipe, config.running
    frozen_dtype = torch.float32 if running.shard else dtype
    model = empty_model(folder, recipe, dtype, frozen_dtype)
    named = trained_parameters(model)
    trained, moments = sum(p.numel() for p in named.values()), moments_of(named, recipe)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    share = processes if running.shard else 1
    samples = min(running.micro_batch_size, max(1, recipe.batch_size // processes))
    with suited_attention(device, dtype):
        fixed, each = batch_bytes(model, folder, running.gradient_checkpointing)
    return Estimate(
        trained,
        frozen,
        weights=(trained * FLOAT + frozen * frozen_dtype.itemsize) // share,
        gradients=trained * FLOAT // share,
        moments=moments * FLOAT // share,
        average=trained * FLOAT // share if recipe.ema else 0,
        activations=fixed + samples * each,
    )


def empty_model(
    folder: Path,
    recipe: Recipe,
    autocast: torch.dtype = torch.float32,
    frozen_dtype: torch.dtype = torch.float32,
) -> TrainedModel:
    """A model on the meta device with the sizes of a folder's, of which the same parts learn."""
    configs = {name: config_of(folder, name) for name in MODULES}
    parts = {
        name: build(name, {k: v for k, v in config.items() if k not in NAMES})
        for name, config in configs.items()
    }
    model = TrainedModel(parts, Diffusion(), end=0, round_timesteps=False, autocast=autocast)
    choose_trained(model, recipe, 0)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen_dtype)
    return model


def batch_bytes(model: TrainedModel, folder: Path, is_checkpointed: bool) -> tuple[int, int]:
    """Bytes of activations of a batch, and of each of its samples, with PICTURES references.

    The former are copies of weights in the precision of the computation, above all. With
    checkpoints, the inputs of the transformer's and of the text encoder's blocks, and all of one
    block, are kept. The model's own tensors become fake ones.
    """
    nothing = torch.zeros(1, 1, 1, 1)
    model.process.noised(nothing, nothing, torch.zeros(1, dtype=torch.long))  # makes its tables
    with FakeTensorMode(allow_non_fake_inputs=True):
        # on meta, attention would keep its maps, and weights would not be known again
        model.to_empty(device="cpu")
        one, two = (activation_bytes(model, blank_batch(folder, count)) for count in (1, 2))
    fixed, each = 2 * one - two, two - one
    if not is_checkpointed:
        return fixed, each
    trunk, text = model.parts["transformer"], model.parts["text_encoder"]
    size, patch = trunk.config.sample_size, trunk.config.patch_size
    tokens = (size // patch) ** 2 * trunk.config.num_attention_heads
    inputs = len(trunk.transformer_blocks) * tokens * trunk.config.attention_head_dim
    length = model.parts["fusion"].config.text_length
    inputs += len(text.encoder.block) * length * text.config.d_model
    blocks = len(trunk.transformer_blocks) + len(text.encoder.block)
    return fixed // blocks, FLOAT * inputs + each // blocks


def blank_batch(folder: Path, samples: int = 1) -> Batch:
    """Samples with PICTURES references each, and no content."""
    facts = Facts.of(folder)
    side, shape = facts.vision_side, facts.latent_shape
    count = min(PICTURES, facts.limits.slots)
    return Batch(
        tasks=("subject",) * samples,
        segments=([[0]] * (count + 1),) * samples,
        counts=(count,) * samples,
        clean=torch.zeros(samples, *shape),
        noise=torch.zeros(samples, *shape),
        source=torch.zeros(samples, *shape),
        timesteps=torch.zeros(samples, dtype=torch.long),
        draws=torch.zeros(samples),
        vision=torch.zeros(samples * count, 3, side, side),
        latents=torch.zeros(samples * count, *shape),
    )


def activation_bytes(model: TrainedModel, batch: Batch) -> int:
    """Bytes that a forward pass keeps for the backward pass, but for weights; each storage once."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept = []  # while they are, no other storage takes their place

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept.append(storage)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch)
    return sum(sizes.values())
