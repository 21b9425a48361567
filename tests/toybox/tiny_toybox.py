"""What the tests of toybox's training share: a tiny shape, short runs, Ctrl-C."""

import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from imagelab.training.loop import Trainer
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.batches import Pictures
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.training import Run

SHAPE = ToyboxConfig(
    resolution=32,
    latent_channels=4,
    vae_channels=(8, 8, 8),
    unet_channels=(16, 32),
    head_channels=16,
    text_width=32,
    text_layers=1,
)
CONFIG = TrainConfig(
    vae_scenes=24, vae_steps=20, vae_batch=4, vae_crop=16, vae_lr=5e-3,
    decoder_steps=20, decoder_batch=4, decoder_lr=5e-3,
    scenes=24, steps=20, batch=4, lr=5e-3, warmup=2,
)  # fmt: skip
SHORT = replace(CONFIG, vae_steps=5, decoder_steps=5, steps=5)


def pictures_of(run: Run) -> Pictures:
    return Pictures(run.config, run.shape, run.processes)


@contextmanager
def ctrl_c_in_step(step: int):
    """Within, Ctrl-C is pressed in this step of every stage; the training must end by it."""
    update = Trainer.update

    def pressed(trainer, stage, at):
        if at == step:
            signal.raise_signal(signal.SIGINT)
        update(trainer, stage, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(Trainer, "update", pressed)
        yield


def assert_same(first, second) -> None:
    """Modules with the same weights, bit for bit."""
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
