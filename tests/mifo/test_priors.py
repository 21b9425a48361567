"""Class images: how each is made, and which cached set serves which run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import stream_of
from PIL import Image

from imagelab.models.base import Posterior
from mifo.learning import priors
from mifo.learning.priors import class_latents, encode_class_images

SIZE = (2, 3)


@pytest.fixture
def painted(monkeypatch):
    """What is given to the sampler, which hands its noise back; each call is listed."""
    calls = []

    def denoise(model, noise, text, steps, scale):
        calls.append(SimpleNamespace(noise=noise, text=text, steps=steps, scale=scale))
        return noise

    monkeypatch.setattr(priors, "denoise", denoise)
    return calls


@pytest.fixture
def make(tmp_path):
    """Make class images of 4 channels with settings; the cache is tmp_path/cache."""

    def run(count=3, **settings):
        model = SimpleNamespace(
            digest=settings.pop("digest", "a model"),
            configs=settings.pop("configs", "its configs"),
            dtype=settings.pop("dtype", torch.float32),
            device="cpu",
            latent_channels=4,
            encode_text=lambda prompts: prompts,
        )
        given = {
            "prompt": "a toy",
            "size": SIZE,
            "seed": 5,
            "batch": 2,
            "cache": tmp_path / "cache",
        }
        return class_latents(model, count=count, **(given | settings))

    return run


def seed_of(seed: int, index: int) -> int:
    return stream_of(seed, "class image", index).initial_seed()


def test_each_class_image_has_noise_of_its_own_seed(make, painted):
    wanted = [
        torch.randn(4, *SIZE, generator=stream_of(seed_of(5, index), "noise")) for index in range(3)
    ]
    assert torch.equal(make(), torch.stack(wanted))
    assert [len(call.noise) for call in painted] == [2, 1]


def test_class_images_are_painted_from_the_prompt_against_an_empty_one(make, painted):
    make(count=1)
    (call,) = painted
    assert (call.text, call.steps, call.scale) == (["", "a toy"], 25, 7.5)


def test_the_batch_changes_no_class_image(make, painted, tmp_path):
    sets = [make(count=5, batch=batch, cache=tmp_path / str(batch)) for batch in (1, 2, 5)]
    assert torch.equal(sets[0], sets[1]) and torch.equal(sets[0], sets[2])


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a dog"}, {"seed": 6}, {"size": (3, 2)}, {"digest": "another"},
        {"configs": "others"},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_a_set_serves_its_own_prompt_seed_size_model_and_precision_alone(
    make, painted, tmp_path, other
):
    make()
    painted.clear()
    make(**other)
    assert len(painted) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    painted.clear()
    make()
    make(**other)
    assert painted == []


def test_a_larger_set_serves_a_smaller_count_and_a_smaller_one_is_added_to(make, painted):
    three = make(3)
    painted.clear()
    assert torch.equal(make(2), three[:2])
    assert painted == []
    five = make(5)
    assert torch.equal(five[:3], three)
    assert [len(call.noise) for call in painted] == [2]
    assert torch.equal(make(5, seed=5), five)


def test_own_pictures_are_fitted_by_a_central_crop_and_encoded_by_their_mean(tmp_path):
    """A picture twice as wide as needed: its left and right quarters are cut off."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 12:36] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    seen = []

    def encode(pixels):
        seen.append(pixels)
        return Posterior(torch.full((1, 4, *SIZE), 2.0), torch.full((1, 4, *SIZE), 9.0))

    model = SimpleNamespace(encode=encode, vae_factor=8)
    latents = encode_class_images(model, [tmp_path / "wide.png"], SIZE)
    assert torch.equal(latents, torch.full((1, 4, *SIZE), 2.0))
    colour = torch.tensor([1.0, -1.0, 0.4 - 1])[None, :, None, None]
    torch.testing.assert_close(seen[0], colour.expand(1, 3, 16, 24))


def test_what_is_added_to_a_set_is_what_a_larger_set_would_have_had(make, painted, tmp_path):
    make(3)
    assert torch.equal(make(5), make(5, cache=tmp_path / "another"))
