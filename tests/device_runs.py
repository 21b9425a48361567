"""Runs of the real commands on a device, and what came of them, for the tests of devices.

Whatever these tests touch of the project below its commands is here, in the last section.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import semantic_learning
import semantic_synthesis
from imagelab.boxes import Box
from imagelab.models.stable_diffusion import load_base
from imagelab.prompts import encode_ids
from imagelab.sampling import Step, denoise
from mifo.learning.prediction import predicting
from mifo.learning.views import Batch
from mifo.method.control import BoxControl
from mifo.method.guidance import GuidanceConfig
from mifo.method.layers import supervised_layers
from mifo.method.learning_loss import learning_loss
from mifo.method.sampling import BoxSampling
from mifo.tokens import add_asset_tokens, embed_as, find_assets, token_roles, write_rows

PROMPT = "a photo of <asset0> and <asset1>"
#: Two steps of each stage, the first one with the reward.
STEPS = ["--train_steps", "2", "--reward_steps", "1", "--finetune_steps", "2"]
#: Guided, then with regions made anew.
PAINTING = ["--seed", "7", "--num_inference_steps", "3", "--guidance_steps", "1"]
PAINTING += ["--guidance_iterations", "2", "--refine_every", "1"]
#: Learning the whole model.
FULL = ["--finetune", "full", "--finetune_learning_rate", "1e-4"]


def learn(argv: list[str], folder: Path, *options: str) -> Path:
    """A learning run with further options, which win over those of ``argv``; what it wrote."""
    semantic_learning.main([*argv, "--output_dir", str(folder), *options, "--debug"])
    return folder / "toys"


def paint(learned: Path, folder: Path, *options: str) -> np.ndarray:
    """The pictures of a learned folder, float [pictures, rows, columns, 3], 0 to 255."""
    places = f"--models_dir {learned.parent} --model_id {learned.name} --output_path {folder}"
    argv = [*places.split(), *PAINTING, "--prompt", PROMPT, *options, "--debug"]
    semantic_synthesis.main(argv)
    pictures = []
    for path in sorted((folder / learned.name).glob("[0-9]*.png")):
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB")).astype(float))
    return np.stack(pictures)


def tensors_of(learned: Path) -> dict[str, torch.Tensor]:
    """All tensors of a learned folder, by their names."""
    found = {}
    for path in sorted(learned.rglob("*.safetensors")):
        where = path.relative_to(learned).as_posix()
        found |= {f"{where}: {name}": tensor for name, tensor in load_file(path).items()}
    return found


def on(kind: str, precision: str) -> list[str]:
    return ["--device", kind, "--mixed_precision", precision]


def losses_of(learned: Path) -> dict[str, float]:
    return json.loads((learned / "manifest.json").read_text())["final_losses"]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of any number in tensors of the same names."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@contextmanager
def counted_updates() -> Iterator[list[torch.optim.Optimizer]]:
    """Within, the list grows by each update of an optimiser."""
    updates = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: updates.append(optimizer))
    try:
        yield updates
    finally:
        hook.remove()


@contextmanager
def stopped_after(count: int) -> Iterator[None]:
    """Within, Ctrl-C is pressed at an update of the optimiser; the command must end by it."""

    def press(*_) -> None:
        if len(updates) == count:
            signal.raise_signal(signal.SIGINT)

    with counted_updates() as updates:
        hook = register_optimizer_step_post_hook(press)
        former = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
        try:
            with pytest.raises(SystemExit) as stop:
                yield
        finally:
            signal.signal(signal.SIGINT, former)
            hook.remove()
    assert stop.value.code == 130


# ----------------------------------------------------------------------------------------------
# below the commands


def step_losses(folder: Path) -> list[float]:
    """The loss of each step of an unfinished run, whose output folder is given."""
    return load_file(folder / ".toys.work" / "checkpoint.safetensors")["curves.loss"].tolist()


@torch.no_grad()
def predicted_noise(model: Path, device: str) -> torch.Tensor:
    """A model's prediction for latents and a prompt, computed on a device."""
    base = load_base(str(model))
    base.unet.to(device)
    base.text_encoder.to(device)
    latents = torch.randn(
        1, base.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    text = base.encode_text(["a photo of a chair"])
    return base.predict(latents, torch.tensor([500], device=device), text).cpu()


class Golden:
    """A learning step of the golden arrays, on a device."""

    def __init__(self, golden: dict, model: Path, stage: int, attention_loss: str, device: str):
        self.base = load_base(str(model))
        tokenizer = self.base.tokenizer
        self.ids = add_asset_tokens(tokenizer, self.base.text_encoder, 3)
        self.layers = supervised_layers(self.base.unet, (64, 64), stage)
        self.attention_loss = attention_loss
        for module in (self.base.unet, self.base.text_encoder):
            module.to(device).requires_grad_(stage == 2)
        self.rows = golden["asset_embeddings"].to(device, copy=True).requires_grad_()
        subset, prompts = golden["token_subset"].tolist(), golden["input_ids"][None]
        if stage == 2:
            class_ids = encode_ids(tokenizer, "a photo of a chair")[None]
            prompts = torch.cat([class_ids, prompts])
        self.batch = Batch(
            latents=golden["latents"].to(device),
            noise=golden["noise"].to(device),
            timesteps=golden["timesteps"].to(device),
            input_ids=prompts.to(device),
            masks=golden["masks"][subset].float().to(device),
            positions=[golden["input_ids"].tolist().index(self.ids[asset]) for asset in subset],
        )

    def learn(self) -> None:
        """The loss, its gradients, and on the way the UNet's ``prediction``."""
        with (
            embed_as(self.base.text_encoder, self.ids, self.rows),
            predicting(self.base, self.batch, self.layers) as found,
        ):
            self.prediction = found.predicted.detach().cpu()
            self.loss = learning_loss(
                found.predicted, found.target, found.maps, self.batch.masks, self.attention_loss
            ).total
            self.loss.backward()


def golden_painting(golden: dict, model: Path, device: str) -> list[Step]:
    """What each step of the golden painting computes, on a device."""
    base = load_base(str(model))
    prompt = "a photo of <asset0> and <asset1> on the grass"
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, 3)
    base.unet.to(device)
    base.text_encoder.to(device)
    write_rows(base.text_encoder, ids, golden["asset_embeddings"])
    with torch.no_grad():
        text = base.encode_text(["", prompt])
    subjects = [[at] for _, at in find_assets(base.tokenizer, prompt, range(3))]
    tokens = token_roles(base.tokenizer, prompt, subjects)
    boxes = [Box(*map(float, box)) for box in golden["boxes"]]
    latents, steps = golden["initial_latents"].to(device), []
    control = BoxControl(base.unet, tokens, boxes, tuple(latents.shape[-2:]), [0])
    sampling = BoxSampling(base, control, text[1:], 20, GuidanceConfig())
    denoise(base, latents, text, 20, 7.5, sampling, steps.append)
    return steps
