"""Training toybox on a real CUDA GPU: CUDA graphs, and going on from a checkpoint."""

import pytest
import torch
from tiny_toybox import SHAPE, SHORT, ctrl_c_in_step

from imagelab.processes import Processes
from toybox.stable_diffusion import train, training
from toybox.stable_diffusion.architecture import build_tokenizer, build_vae
from toybox.stable_diffusion.data import encode_scenes
from toybox.stable_diffusion.training import Run, train_unet

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.usefixtures("interruptible"),
]


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Train the UNet in a folder; the losses of its steps."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    vae = build_vae(SHAPE).to("cuda").eval().requires_grad_(False)
    tokenizer = build_tokenizer(train.all_words(0), folder)
    encoded = encode_scenes(vae, SHORT, SHAPE, folder / "latents.safetensors", tokenizer)

    def run(work, graph=False):
        made = Run(SHORT, SHAPE, work, Processes("cuda"), graph=graph)
        return train_unet(made, encoded, 1.0, tokenizer).course.losses

    return run


def test_a_graph_teaches_as_plain_steps_do(learn, tmp_path):
    plain, graphed = learn(tmp_path / "plain"), learn(tmp_path / "graph", graph=True)
    assert graphed == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("graph", [False, True])
def test_a_resumed_run_ends_as_an_unbroken_one(learn, tmp_path, monkeypatch, graph):
    monkeypatch.setattr(training, "READ_EVERY", 2)
    whole = learn(tmp_path / "whole", graph)
    with ctrl_c_in_step(2):
        learn(tmp_path / "broken", graph)
    assert learn(tmp_path / "broken", graph) == pytest.approx(whole, rel=0.01)
