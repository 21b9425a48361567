"""Painting on a pretend GPU: what is left on the wrong device there, fails here."""

import numpy as np
import pytest
import torch
from conftest import picture
from pretend_device import pretend

from mige import edit, generate
from mige.pipeline import MigePipeline

DOG, SOURCE = picture(0, 40, 30), picture(2, 32, 32)
KINDS = ("cuda", "mps")
REQUESTS = {
    "subject": ("a <image> on the beach", [DOG], None),
    "edit": ("make it snow", [], SOURCE),
    "subject_edit": ("replace <image> with <image>", [DOG], SOURCE),
}


def painted(pipeline, name: str) -> np.ndarray:
    instruction, images, source = REQUESTS[name]
    found = pipeline(instruction, images, source, steps=2, seed=3, image_scale=1.5, num_images=2)
    return np.stack([np.asarray(image) for image in found.images]).astype(int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REQUESTS)
def test_pictures_are_those_of_the_cpu(model, kind, name):
    wanted = painted(MigePipeline.from_pretrained(model), name)
    with pretend(kind):
        found = painted(MigePipeline.from_pretrained(model).to(kind), name)
    assert abs(found - wanted).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_on_a_device(model, kind):
    with pretend(kind):
        pipeline = MigePipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(kind)
        assert pipeline.vae.dtype == torch.float32
        painted(pipeline, "subject_edit")


@pytest.mark.parametrize("command", [generate, edit])
def test_the_commands_on_a_device(model, place, command, capsys):
    subject = ["--prompt", "a <image> on it", "--images", "dog.png"]
    source = ["--instruction", "make it snow", "--source", "in.png"]
    options = subject if command is generate else source
    with pretend("cuda"):
        command.main(
            ["--model", str(model), *options, "--steps", "2", "--seed", "3", "--device", "cuda"]
        )
    assert "0000.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", REQUESTS)
def test_offloaded_parts_come_when_they_work(model, name, monkeypatch):
    wanted = painted(MigePipeline.from_pretrained(model), name)
    with pretend("cuda"):
        pipeline = MigePipeline.from_pretrained(model)
        pipeline.enable_model_cpu_offload(device="cuda")
        places = []
        pipeline.transformer.register_forward_hook(
            lambda *_: places.append(
                (pipeline.text_encoder.device.type, pipeline.transformer.device.type)
            )
        )
        found = painted(pipeline, name)
        assert set(places) == {("cpu", "cuda")}
    assert abs(found - wanted).max() <= 1
