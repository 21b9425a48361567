"""Options for models that are trained anew: rates of parts, a cooldown, and the probe."""

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_mige_train import data, options_of, work  # noqa: F401 (fixtures)

from imagelab.errors import UserError
from imagelab.processes import Processes
from mige.folder import load_parts
from mige.training.config import Recipe
from mige.training.plan import check_rates, make_plan
from mige.training.probe import Probe, other_pictures, other_words, undropped
from mige.training.run import make_model, make_samples
from mige.training.samples import Batch


def test_rates_rise_stay_and_fall():
    """Ten steps: two of warm-up, the last four fall as half a cosine."""
    recipe = Recipe(warmup_steps=2, cooldown=0.4)
    found = [recipe.factor(step, 10) for step in range(10)]
    falling = [0.5 + 0.5 * math.cos(math.pi * done / 4) for done in range(4)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, *falling])
    assert Recipe(warmup_steps=0).factor(9, 10) == 1.0


@pytest.mark.parametrize(
    "done, then, now, told",
    [
        (7, {"steps": 10, "cooldown": 0.4}, {"steps": 20}, None),  # update 6 had the whole rate
        (8, {"steps": 10, "cooldown": 0.4}, {"epochs": 1, "cooldown": 0.4}, None),
        (8, {"steps": 10}, {"steps": 20, "cooldown": 0.4}, None),
        (8, {"steps": 10, "cooldown": 0.4}, {"steps": 20}, "--steps 10 --cooldown 0.4, or start"),
        (8, {"epochs": 1, "cooldown": 0.4}, {"steps": 10}, "--steps 10 --cooldown 0.4, or start"),
        (8, {"steps": 20}, {"steps": 10, "cooldown": 0.4}, "with --cooldown 0.4 the rates of 10"),
        (8, {"steps": 10}, {"steps": 10, "cooldown": 0.4}, "with --cooldown 0.4 the rates of 10"),
        (11, {"steps": 20}, {"steps": 10}, "O has 11 steps already, and 10 are asked for; give"),
    ],
)
def test_a_length_may_change_until_rates_fall(done, then, now, told):
    """Of 100 records in batches of ten; a checkpoint may be older than --cooldown."""
    recipe = Recipe(batch_size=10, warmup_steps=0, **now)
    plan = SimpleNamespace(
        config=SimpleNamespace(recipe=recipe), which=range(100), output="O",
        steps=recipe.updates(100),
    )  # fmt: skip
    saved = SimpleNamespace(step=done, facts={"settings": then})
    with pytest.raises(UserError, match=told) if told else nullcontext():
        check_rates(plan, saved)


@pytest.fixture
def probe(work, model) -> Probe:  # noqa: F811
    config = options_of(model, "--batch_size", "6", "--micro_batch_size", "6")
    plan = make_plan(config, Processes("cpu"))
    parts = load_parts(plan.folder, left_out=["vae"])
    torch.nn.init.normal_(parts["fusion"].features.mix.weight, std=0.1)
    return Probe(make_model(plan, parts), make_samples(plan), "cpu")


def test_others_pictures_and_words(probe):
    (batch,) = probe.samples[0]
    (moved,) = other_pictures([batch])
    assert torch.equal(moved.vision[1:], batch.vision[:-1])
    assert torch.equal(moved.vision[0], batch.vision[-1])
    assert torch.equal(moved.latents[1:], batch.latents[:-1])
    assert moved.segments == batch.segments and torch.equal(moved.source, batch.source)
    (spoken,) = other_words([batch])
    assert [len(each) for each in spoken.segments] == [len(each) for each in batch.segments]
    assert sorted(map(str, spoken.segments)) == sorted(map(str, batch.segments))
    assert all(a != b for a, b in zip(spoken.segments, batch.segments, strict=True))
    assert torch.equal(spoken.vision, batch.vision)


def alone(batch: Batch, index: int) -> Batch:
    """One sample of a batch."""
    own = slice(sum(batch.counts[:index]), sum(batch.counts[: index + 1]))
    return replace(
        batch,
        **{name: getattr(batch, name)[index : index + 1] for name in EACH},
        vision=batch.vision[own],
        latents=batch.latents[own],
    )


EACH = ("tasks", "segments", "counts", "clean", "noise", "source", "timesteps", "draws")


def test_micro_batches_change_nothing_of_what_is_swapped(probe):
    (batch,) = probe.samples[0]
    singles = [alone(batch, index) for index in range(len(batch))]
    moved, (together,) = other_pictures(singles), other_pictures([batch])
    assert torch.equal(torch.cat([each.vision for each in moved]), together.vision)
    assert torch.equal(torch.cat([each.latents for each in moved]), together.latents)
    spoken, (together,) = other_words(singles), other_words([batch])
    assert tuple(each.segments[0] for each in spoken) == together.segments
    whole = probe.look(1, 2, Processes("cpu"))
    probe._batches = [undropped(each) for each in singles]
    for name, rise in probe.look(1, 2, Processes("cpu")).items():
        assert rise.item() == pytest.approx(whole[name].item(), rel=1e-3, abs=1e-6)


def test_a_sample_without_others_tells_nothing(probe, caplog):
    (batch,) = probe.samples[0]
    single = alone(batch, batch.counts.index(1))
    assert other_pictures([single]) is None and other_words([single]) is None
    probe._batches = [undropped(single)]
    with caplog.at_level(logging.WARNING):
        assert all(value.isnan() for value in probe.look(999, 10, Processes("cpu")).values())
    assert not caplog.messages


def test_the_rise_is_that_of_the_mean_error(probe):
    (batch,) = probe.samples[0]
    batch = undropped(batch)
    assert (batch.draws == 1).all()
    probe.model.eval()
    with torch.no_grad():
        plain, pictures, words = (
            probe.model(each).mse.mean().item()
            for each in (batch, *other_pictures([batch]), *other_words([batch]))
        )
    probe.model.train()
    state = torch.get_rng_state()
    found = probe.look(1, 2, Processes("cpu"))
    assert found["other pictures"].item() == pytest.approx(pictures / plain - 1, rel=1e-4, abs=1e-6)
    assert found["other words"].item() == pytest.approx(words / plain - 1, rel=1e-4, abs=1e-6)
    assert pictures != plain and words != plain
    assert probe.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(value.isnan() for value in probe.look(2, 2, Processes("cpu")).values())


def test_silence_is_told(probe, caplog):
    """A fusion whose projection is zero: no picture has an effect."""
    probe.model.parts["fusion"].projection.weight.data.zero_()
    with caplog.at_level(logging.WARNING):
        probe.look(9, 10, Processes("cpu"))  # 60 samples
        assert not caplog.messages
        found = probe.look(999, 10, Processes("cpu"))  # 6,000
    assert found["other pictures"] == 0
    assert any("with other pictures the error is 0.00% higher" in m for m in caplog.messages)
