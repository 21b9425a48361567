"""Placeholders that say how toys look: their embeddings, captions, scenes and training."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_toybox import CONFIG, SHAPE, assert_same, ctrl_c_in_step

from imagelab.processes import Processes
from imagelab.training.callbacks import TimeBudget
from toybox.classifier.network import load_classifier
from toybox.scenes.scenes import Placement, Scene, caption, draw_scene, render
from toybox.scenes.toys import HUES, KINDS, Look
from toybox.stable_diffusion import stages, train
from toybox.stable_diffusion.architecture import (
    build_pipeline,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from toybox.stable_diffusion.batches import Batches
from toybox.stable_diffusion.between import measure_between
from toybox.stable_diffusion.data import (
    MAX_TOKENS,
    MAX_TOYS,
    Words,
    draw_caption,
    encode_scenes,
    scene_of,
)
from toybox.stable_diffusion.looks import (
    FEATURES,
    LookEmbedder,
    encode_text,
    features,
    placeholder_embeddings,
    with_free_looks,
)
from toybox.stable_diffusion.training import Run, train_unet

LOOKS = replace(CONFIG, scenes=70, steps=5, captions=2, mirrored=True, placeholders=0.5, mixed=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An autoencoder that has learned nothing, what it makes of scenes, and a tokenizer."""
    folder = tmp_path_factory.mktemp("looks")
    torch.manual_seed(0)
    vae = build_vae(SHAPE).eval().requires_grad_(False)
    tokenizer = build_tokenizer(train.all_words(0), folder)
    encoded = encode_scenes(vae, LOOKS, SHAPE, folder / "latents.safetensors", tokenizer)
    return vae, tokenizer, encoded


def three_toys(*looks: Look, ground: str | None = None) -> Scene:
    placed = (Placement(look, 0.2 + 0.3 * i, 0.5, 0.3) for i, look in enumerate(looks))
    return Scene(tuple(placed), ground, (120, 120, 120), 0)


# ----------------------------------------------------------------------------------------------
# embeddings


def test_the_placeholders_embedding_by_hand():
    table = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 16.0]])  # mean 3 and 12, std 2 and √12
    direction, noise = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
    made = placeholder_embeddings(direction, noise, torch.tensor([0.6]), table)
    expected = [3 + 2 * (0.8 + 0.3), 12 + 12**0.5 * (-0.8 + 1.2)]
    assert made.tolist() == pytest.approx(expected)


def test_features_say_kind_hue_and_gains():
    found = features(torch.tensor([2]), torch.tensor([[90.0, 0.8, 0.9]]))[0]
    assert found.shape == (FEATURES,)
    assert found[: len(KINDS)].nonzero().tolist() == [[2]]
    assert found[len(KINDS) :].tolist() == pytest.approx([0, 1, -1, 0], abs=1e-5)


def test_directions_have_mean_0_and_variance_1():
    directions = LookEmbedder(32)(100 * torch.randn(4, MAX_TOYS, FEATURES))
    assert directions.mean(-1).abs().max() < 1e-5
    assert directions.var(-1, correction=0).allclose(torch.ones(4, MAX_TOYS), atol=1e-3)


def test_a_placeholder_stands_where_a_words_embedding_would(data):
    _, tokenizer, _ = data
    encoder = build_text_encoder(SHAPE, tokenizer).eval()
    ids = tokenizer(["a red car", "a car"], padding="max_length", return_tensors="pt").input_ids
    word = encoder.get_input_embeddings().weight[ids[0, 2]]
    slots = torch.zeros_like(ids)
    slots[0, 2] = 2  # the second look, in place of "red"
    looks = torch.stack([torch.zeros_like(word), word]).expand(2, 2, -1)
    blank = ids.clone()
    blank[0, 2] = tokenizer.pad_token_id
    with torch.no_grad():
        plain = encoder(ids).last_hidden_state
        assert torch.equal(encode_text(encoder, blank, slots, looks), plain)
        assert torch.equal(encoder(ids).last_hidden_state, plain)  # the hook is gone


# ----------------------------------------------------------------------------------------------
# captions


def test_placeholders_are_named_in_their_order_and_without_articles():
    scene = three_toys(Look("car", 0), Look("fox", 120), Look("cat", 220), ground="in the snow")
    seen = set()
    for seed in range(40):
        worded = caption(scene, np.random.default_rng(seed), learned={0, 1, 2})
        seen.add(worded.text)
        words = worded.text.split()
        assert [words[noun] for noun in worded.nouns] == ["<asset0>", "<asset1>", "<asset2>"]
    assert "a photo of <asset0> and <asset1> and <asset2>" in seen
    assert "<asset0> and <asset1> and <asset2> in the snow" in seen
    assert len(seen) == 4


def test_placeholders_and_words_mix():
    scene = three_toys(Look("car", 0), Look("fox", 120))
    for seed in range(20):
        worded = caption(scene, np.random.default_rng(seed), learned={1})
        words = worded.text.split()
        nouns = {toy: words[noun] for toy, noun in zip(worded.toys, worded.nouns, strict=True)}
        assert nouns == {0: "car", 1: "<asset0>"}


@pytest.mark.parametrize(
    "hue, near, name", [(0, 0, "red"), (353, 8, "red"), (8.5, 8, None), (28, 0, "orange")]
)
def test_a_hue_is_named_only_where_the_name_is_near(hue, near, name):
    assert Look("car", hue).colour_within(near) == name
    worded = {
        caption(three_toys(Look("car", hue)), np.random.default_rng(seed), near=near).text
        for seed in range(30)
    }
    assert any(f"{name} car" in text for text in worded) == (name is not None)
    assert name or not set(" ".join(worded).split()) & set(HUES)


def test_a_caption_as_tokens(data):
    _, tokenizer, _ = data
    scene = three_toys(Look("tropical_fish", 0), Look("fox", 120))
    worded = caption(scene, np.random.default_rng(3), learned={1})
    tokens, slots, nouns = Words(tokenizer).encode(worded, {1})
    without = worded.text.replace("<asset0>", "!")
    assert [t for t, s in zip(tokens, slots, strict=True) if s == 0] == [
        t for t in tokenizer(without).input_ids if t not in tokenizer("!").input_ids[1:-1]
    ]
    assert slots[nouns[1]] == 2
    assert tokenizer.convert_ids_to_tokens(tokens[nouns[0]]) == "fish</w>"
    assert nouns[2] == 0


# ----------------------------------------------------------------------------------------------
# scenes


def test_free_looks_are_of_any_hue_and_often_alike():
    rng = np.random.default_rng(0)
    drawn = [with_free_looks(draw_scene(rng, 3), rng) for _ in range(300)]
    looks = [[placed.look for placed in scene.toys] for scene in drawn]
    hues = [look.hue for toys in looks for look in toys]
    assert len(np.unique(np.digitize(hues, range(0, 360, 30)))) == 12
    assert all(0.8 <= g <= 1 for toys in looks for t in toys for g in (t.saturation, t.value))
    one_kind = np.mean([len({look.kind for look in toys}) == 1 for toys in looks])
    one_hue = np.mean([len({look.hue for look in toys}) == 1 for toys in looks])
    assert one_kind == pytest.approx(1 / 3, abs=0.08)
    assert one_hue == pytest.approx(1 / 6, abs=0.07)


def test_the_share_of_free_looks_and_of_placeholders():
    config = replace(CONFIG, free_looks=0.5, placeholders=0.4, mixed=0.2)
    scenes = [scene_of(config, index) for index in range(300)]
    free = [scene.toys[0].look.colour is None for scene in scenes]
    assert np.mean(free) == pytest.approx(0.5, abs=0.1)
    rng = np.random.default_rng(0)
    learned = [len(draw_caption(config, scene, rng)[1]) / len(scene.toys) for scene in scenes]
    assert np.mean(learned) == pytest.approx(0.5, abs=0.1)
    named = replace(CONFIG, free_looks=0.0)
    assert scene_of(named, 5) == draw_scene(np.random.default_rng((named.seed, 5)))


def test_small_sprites_give_almost_the_same_picture():
    scene = draw_scene(np.random.default_rng(1), 2)
    whole, masks = render(scene, 64)
    small, others = render(scene, 64, sprites=64)
    apart = np.abs(np.asarray(whole, float) - np.asarray(small, float))
    assert apart.mean() < 2
    assert (masks != others).mean() < 0.01


def test_workers_change_nothing(data, tmp_path):
    vae, tokenizer, alone = data
    path = tmp_path / "latents.safetensors"
    shared = encode_scenes(vae, LOOKS, SHAPE, path, tokenizer, workers=2)
    assert all(torch.equal(shared[name], alone[name]) for name in alone)
    assert alone["latents"].shape == (140, 4, 8, 8)
    assert alone["ids"].shape == (70, 2, MAX_TOKENS)


def test_mirrored_scenes_have_mirrored_coverage(data):
    _, tokenizer, encoded = data
    batches = Batches(LOOKS, encoded, 1.0, tokenizer, SHAPE.text_width, Processes("cpu"))
    rows = torch.tensor([4, 4])
    latents, coverage = batches._scenes(rows, torch.tensor([False, True]))
    assert torch.equal(coverage[1], coverage[0].flip(-1))
    assert torch.equal(latents[1], encoded["latents"][70 + 4].float())


# ----------------------------------------------------------------------------------------------
# training


def test_the_share_of_a_noun_is_counted_over_the_whole_batch(data):
    """Two processes see halves of one batch; their weights of the grounding loss add up to 1."""
    _, tokenizer, encoded = data
    alone, shared = Processes("cpu"), [Processes("cpu"), Processes("cpu")]
    for index, one in enumerate(shared):
        one.index, one.count = index, 2
    config = replace(LOOKS, caption_dropout=0.2, grounding_timesteps=800, batch=8)
    whole, *halves = (
        Batches(config, encoded, 1.0, tokenizer, SHAPE.text_width, processes)(3)
        for processes in (alone, *shared)
    )
    assert whole.count == whole.named.sum() > 1
    assert 0 < halves[0].named.sum() != halves[1].named.sum()
    assert sum((half.named.sum() / half.count) / 2 for half in halves) == 1
    for name, tensor in whole._asdict().items():
        if name != "count":
            assert torch.equal(tensor[0::2], getattr(halves[0], name)), name
            assert torch.equal(tensor[1::2], getattr(halves[1], name)), name


def test_an_interrupted_run_with_placeholders_ends_as_an_unbroken_one(
    data, tmp_path, interruptible
):
    _, tokenizer, encoded = data
    unbroken = train_unet(Run(LOOKS, SHAPE, tmp_path / "whole"), encoded, 1.0, tokenizer)
    broken = Run(LOOKS, SHAPE, tmp_path / "broken")
    with ctrl_c_in_step(2):
        train_unet(broken, encoded, 1.0, tokenizer)
    resumed = train_unet(broken, encoded, 1.0, tokenizer)
    assert resumed.course.losses == unbroken.course.losses
    for part in ("unet", "text_encoder", "embedder"):
        assert_same(getattr(resumed, part), getattr(unbroken, part))
    first = resumed.embedder.layers[0].weight
    assert first.grad is not None and first.grad.abs().max() > 0  # it learns along


def test_a_run_of_a_given_time_ends_in_it(data, tmp_path, monkeypatch):
    _, tokenizer, encoded = data
    monkeypatch.setattr(TimeBudget, "WARMING", 5)
    until = time.monotonic() + 4
    run = Run(replace(LOOKS, cooldown=0.4), SHAPE, tmp_path, until=until)
    trained = train_unet(run, encoded, 1.0, tokenizer)
    assert abs(time.monotonic() - until) < 3
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert len(trained.course.losses) == steps > 10


class Replayed:
    """What a CUDA graph does, on the CPU: each step's gradients lie where the first ones did."""

    def __init__(self, inputs, loss, parameters):
        self.inputs, self.loss, self.parameters = inputs, loss, parameters

    def __call__(self, step):
        loss = self.loss(*self.inputs(step))
        made = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, made, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(gradient)
            elif gradient is not None:
                parameter.grad = gradient
        return loss.detach()


def test_gradients_of_a_graph_teach_the_same(data, tmp_path, monkeypatch):
    _, tokenizer, encoded = data
    plain = train_unet(Run(LOOKS, SHAPE, tmp_path / "plain"), encoded, 1.0, tokenizer)
    monkeypatch.setattr(stages, "GraphedGradients", Replayed)
    run = Run(LOOKS, SHAPE, tmp_path / "graph", graph=True)
    graphed = train_unet(run, encoded, 1.0, tokenizer)
    assert graphed.course.losses == plain.course.losses
    assert_same(graphed.unet, plain.unet)
    assert_same(graphed.embedder, plain.embedder)


def test_hues_between_the_named_ones_are_measured(data):
    vae, tokenizer, encoded = data
    torch.manual_seed(0)
    unet = build_unet(SHAPE).eval()
    pipeline = build_pipeline(vae, build_text_encoder(SHAPE, tokenizer).eval(), tokenizer, unet)
    embedder = LookEmbedder(SHAPE.text_width)
    found = measure_between(pipeline, embedder, load_classifier(), 3, 0, KINDS, share=0.5)
    assert 0 <= found["hue_error_degrees"] <= 180
    assert (found["images"], found["noise"]) == (3, 0.5)


def test_a_caption_that_is_left_out_names_no_toy_and_shows_no_look(data):
    _, tokenizer, encoded = data
    told, silent = (
        Batches(
            replace(LOOKS, caption_dropout=share, batch=8), encoded, 1.0, tokenizer,
            SHAPE.text_width, Processes("cpu"),
        )(3)
        for share in (0.0, 1.0)
    )  # fmt: skip
    assert told.slots.any() and told.nouns.any() and told.named.any()
    assert not (silent.slots.any() or silent.nouns.any() or silent.named.any())
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    assert (silent.ids == empty).all()
