"""The views that learning draws: their distribution, the order of the draws, and what is fed.

Numbers are worked out by hand, with random streams of the tests' own.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import stream_of
from torch.nn import functional as F
from transformers import CLIPTokenizer

from imagelab.models.base import Posterior
from mifo.learning.views import Batch, View, Views, sample_view
from mifo.tokens import asset_token, view_prompt

SEED = 6
SIDE, LATENT = 16, 2  # of the picture and of its latents
#: The picture: red falls to the right, green falls downwards, blue is at its least.
COLUMNS = torch.linspace(255, 0, SIDE).round()
PICTURE = torch.stack([COLUMNS.expand(SIDE, SIDE), COLUMNS[:, None].expand(SIDE, SIDE)])
PICTURE = torch.cat([PICTURE, torch.zeros(1, SIDE, SIDE)])


def fake_code(pixels: torch.Tensor) -> Posterior:
    """Moments [1, 2, 2, 2] of pixels [1, 3, 16, 16]; not those of the mirrored pixels mirrored."""
    pooled = F.avg_pool2d(pixels[:, :2], SIDE // LATENT)
    place = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    return Posterior(pooled + place, 0.5 + 0.1 * place + pooled.square())


@pytest.fixture(scope="module")
def fake(tiny_sd):
    """A model that encodes as `fake_code` does, the ids of its three assets, and an instance."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    tokenizer.add_tokens(["<asset0>", "<asset1>", "<asset2>"])
    ids = tokenizer.convert_tokens_to_ids(["<asset0>", "<asset1>", "<asset2>"])
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    model = SimpleNamespace(tokenizer=tokenizer, encode=fake_code, scheduler=scheduler)
    masks = np.zeros((3, SIDE, SIDE), dtype=bool)
    for asset in range(3):  # each at another place, none its own mirror image
        masks[asset, asset : asset + 4, asset : asset + 6] = True
    image = PICTURE.byte().permute(1, 2, 0).numpy()
    return model, ids, SimpleNamespace(image=image, masks=masks)


@pytest.fixture
def views(fake):
    model, ids, instance = fake
    return Views(model, instance, ids, "cpu", seed=SEED)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.latents, batch.noise, batch.timesteps, batch.input_ids, batch.masks]


def test_views_are_uniform_and_reproducible():
    count, draws = 3, 6000
    generator = torch.Generator().manual_seed(0)
    views = [sample_view(count, generator) for _ in range(draws)]
    tally = Counter(view.assets for view in views)
    # 3 ordered views of size 1, 6 of size 2, 6 of size 3; every size has a third of the draws.
    assert len(tally) == 15
    for assets, seen in tally.items():
        expected = draws / 3 / {1: 3, 2: 6, 3: 6}[len(assets)]
        assert abs(seen - expected) < 5 * expected**0.5
    flips = sum(view.flip for view in views)
    assert abs(flips - draws / 2) < 5 * (draws / 4) ** 0.5

    torch.manual_seed(1)  # the global generator has no say
    generator = torch.Generator().manual_seed(0)
    assert [sample_view(count, generator) for _ in range(50)] == views[:50]


def test_the_documented_order_of_draws():
    generator, again = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(20):
        size = int(torch.randint(1, 6, (), generator=again))
        assets = tuple(torch.randperm(5, generator=again).tolist()[:size])
        flip = bool(torch.randint(0, 2, (), generator=again))
        assert sample_view(5, generator) == View(assets, flip)


def test_prompts():
    assert asset_token(12) == "<asset12>"
    assert view_prompt((2, 0)) == "a photo of <asset2> and <asset0>"
    assert view_prompt((1,)) == "a photo of <asset1>"


# ----------------------------------------------------------------------------------------------
# what a step is fed


def drawn_by_hand(seed: int, stage: int, step: int) -> View:
    draw = stream_of(seed, "view", stage, step)
    size = int(torch.randint(1, 4, (), generator=draw))
    assets = tuple(torch.randperm(3, generator=draw).tolist()[:size])
    return View(assets, bool(torch.randint(0, 2, (), generator=draw)))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("step", range(8))
def test_a_batch_by_hand(views, fake, stage, step):
    model, ids, instance = fake
    view = drawn_by_hand(SEED, stage, step)
    batch = views.draw(stage, step)
    pixels = PICTURE / 127.5 - 1
    mean, deviation = fake_code((pixels.flip(-1) if view.flip else pixels)[None])
    posterior = torch.randn(2, 2, 2, generator=stream_of(SEED, "posterior", stage, step))
    assert torch.allclose(batch.latents, mean + deviation * posterior, atol=1e-6)
    noise = torch.randn(2, 2, 2, generator=stream_of(SEED, "noise", stage, step))
    assert torch.equal(batch.noise, noise[None])
    timestep = torch.randint(0, 1000, (), generator=stream_of(SEED, "timestep", stage, step))
    assert batch.timesteps.tolist() == [int(timestep)]
    prompt = "a photo of " + " and ".join(f"<asset{asset}>" for asset in view.assets)
    row = model.tokenizer(prompt, padding="max_length", max_length=77).input_ids
    assert batch.input_ids.tolist() == [row]
    # start, a, photo, of, asset, and, asset, and, asset
    assert batch.positions == [4, 6, 8][: len(view.assets)]
    assert [row[at] for at in batch.positions] == [ids[asset] for asset in view.assets]
    masks = np.stack([instance.masks[asset] for asset in view.assets])
    masks = masks[..., ::-1] if view.flip else masks
    assert batch.masks.dtype == torch.float32
    assert np.array_equal(batch.masks.numpy(), masks)


@pytest.mark.parametrize("stage", [1, 2])
def test_those_batches_are_of_all_kinds(stage):
    """Mirrored and not, of one asset and of more, in rising and falling order."""
    drawn = [drawn_by_hand(SEED, stage, step) for step in range(8)]
    assert {view.flip for view in drawn} == {True, False}
    assert {len(view.assets) for view in drawn} == {1, 2, 3}
    orders = {view.assets == tuple(sorted(view.assets)) for view in drawn if len(view.assets) > 1}
    assert orders == {True, False}


def test_the_class_sample_comes_first_and_has_streams_of_its_own(views, fake):
    model, prior = fake[0], torch.arange(5.0)[:, None, None, None].expand(5, 2, 2, 2)
    chosen = []
    for step in range(8):
        batch = views.draw(2, step, prior, "a photo of a chair")
        alone = views.draw(2, step)
        index = torch.randint(0, 5, (), generator=stream_of(SEED, "class image", 2, step))
        chosen.append(int(index))
        assert torch.equal(batch.latents[0], torch.full((2, 2, 2), float(index)))
        noise = torch.randn(2, 2, 2, generator=stream_of(SEED, "class noise", 2, step))
        assert torch.equal(batch.noise[0], noise)
        timestep = torch.randint(0, 1000, (), generator=stream_of(SEED, "class timestep", 2, step))
        assert batch.timesteps[0] == timestep
        row = model.tokenizer("a photo of a chair", padding="max_length", max_length=77).input_ids
        assert batch.input_ids[0].tolist() == row
        for ours, theirs in zip(tensors(batch)[:4], tensors(alone)[:4], strict=True):
            assert ours.shape[0] == 2 and torch.equal(ours[1:], theirs)
        assert torch.equal(batch.masks, alone.masks) and batch.positions == alone.positions
    assert len(set(chosen)) > 2


def test_a_step_draws_the_same_whatever_was_drawn_before(views, fake):
    model, ids, instance = fake
    drawn = [views.draw(1, step) for step in range(6)]
    torch.manual_seed(5)
    alone = Views(model, instance, ids, "cpu", seed=SEED).draw(1, 5)
    for ours, theirs in zip(tensors(alone), tensors(drawn[5]), strict=True):
        assert torch.equal(ours, theirs)


def test_steps_stages_and_seeds_draw_differently(views, fake):
    model, ids, instance = fake
    other = Views(model, instance, ids, "cpu", seed=SEED + 1)
    batches = [views.draw(1, 0), views.draw(1, 1), views.draw(2, 0), other.draw(1, 0)]
    noises = [batch.noise.flatten()[0].item() for batch in batches]
    latents = [batch.latents.flatten()[0].item() for batch in batches]
    assert len(set(noises)) == len(set(latents)) == 4
    timesteps = [views.draw(stage, step).timesteps.item() for stage in (1, 2) for step in range(50)]
    assert len(set(timesteps)) > 85


def test_timesteps_are_uniform_below_the_models_own_number(fake):
    model, ids, instance = fake
    model = SimpleNamespace(**vars(model))
    model.scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=4))
    views = Views(model, instance, ids, "cpu", seed=0)
    tally = Counter(views.draw(1, step).timesteps.item() for step in range(400))
    assert set(tally) == {0, 1, 2, 3}
    assert all(abs(count - 100) < 5 * 75**0.5 for count in tally.values())
