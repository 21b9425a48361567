"""What toybox's MIGE learns to read from: views, triplets, what is asked of them, and by whom."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_toy_mige import TINY, the_tokenizer, the_vae, tiny_model
from torch.nn import functional as F

from mige.pictures import to_vision
from toybox.mige import heads, views
from toybox.mige.measures import calibrate, states_of_tokens
from toybox.mige.reading import (
    ASKED,
    HUE_WORDS,
    KIND_WORDS,
    Readings,
    Remembered,
    States,
    Truth,
    draw_readings,
    look,
    read_states,
    source_kinds,
    starts,
    words_of,
)
from toybox.scenes.toys import KINDS
from toybox.scenes.triplets import WORDS, draw_triplet


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    return draw_readings(the_vae(), 0, "train", 12, TINY.vision_side)


@pytest.fixture(scope="module")
def readings(data) -> Readings:
    return Readings(data, the_tokenizer())


# ----------------------------------------------------------------------------------------------
# views


def test_a_view_is_what_the_vision_encoder_reads():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((128, 128))
    seen = views.as_seen(torch.from_numpy(views.small(picture, 64).copy())[None])
    assert torch.allclose(seen[0], to_vision(picture, 64), atol=1e-6)


def test_views_say_which_toy_is_where():
    rendered = views.render_views(0, "train", 12, 64)
    assert rendered["pixels"].shape == (12, 3, 64, 64) and rendered["toys"].shape == (12, 64, 64)
    for index in range(12):
        there = set(rendered["toys"][index].unique().tolist()) - {0}
        kinds = rendered["kinds"][index]
        assert there == {1 + at for at in range(3) if kinds[at]}
        for toy in there:  # its pixels differ from what the ground has
            inside = rendered["toys"][index] == toy
            assert 10 < inside.sum() < 64 * 64 * 0.7
    again, other = (views.render_views(0, split, 12, 64) for split in ("train", "test"))
    assert all(torch.equal(rendered[key], again[key]) for key in again)
    assert not any(torch.equal(a, b) for a in rendered["pixels"] for b in other["pixels"])


def by_hand() -> dict[str, torch.Tensor]:
    """A view of 8×8: toy 1, of kind 5, at 90°, has the left half; toy 2, of kind 7, a column."""
    toys = torch.zeros(1, 8, 8, dtype=torch.uint8)
    toys[:, :, :4], toys[:, :, 7] = 1, 2
    pixels = (toys[:, None] * 80).expand(1, 3, 8, 8)
    return {
        "pixels": pixels, "toys": toys, "kinds": torch.tensor([[5, 7, 0]], dtype=torch.uint8),
        "hues": torch.tensor([[90.0, 180.0, 0.0]]),
    }  # fmt: skip


def test_patches_have_shares_of_kinds_and_hues():
    batch = views.batch_of(by_hand(), torch.tensor([0]), patch=4)
    assert batch.shares.shape == (1, 3, 2, 2)
    assert batch.shares[0, :, 0].tolist() == [[1, 0], [0, 0.25], [0, 0]]
    kinds = batch.of_kinds()
    assert kinds[0, [0, 5, 7], 1].tolist() == [[0, 0.75], [1, 0], [0, 0.25]]
    assert kinds.sum() == 4
    hues = batch.of_hues()[0, :, 0]  # cosine and sine of the two upper patches
    assert torch.allclose(hues, torch.tensor([[0, -0.25], [1, 0]]), atol=1e-6)


def test_the_truth_moves_with_the_picture():
    data = by_hand()

    def upper_row(*move: int) -> list[float]:
        batch = views.varied(data, torch.tensor([0]), 1, torch.tensor([move]))
        toys = (batch.shares * torch.tensor([1, 2, 3])[:, None, None]).sum(1)
        assert torch.allclose(batch.pictures, views.as_seen(80 * toys[:, None].expand(1, 3, 8, 8)))
        return toys[0, 0].tolist()

    assert upper_row(4, 4, 0) == [1, 1, 1, 1, 0, 0, 0, 2]
    assert upper_row(0, 4, 1) == [2, 0, 0, 0, 1, 1, 1, 1]
    assert upper_row(8, 6, 0) == [1, 1, 0, 0, 0, 2, 2, 2]
    assert upper_row(4, 1, 0) == [1, 1, 1, 1, 1, 1, 1, 0]
    moves = views.draw_moves(np.random.default_rng(0), 400)
    assert [column.unique().tolist() for column in moves.T] == [
        list(range(9)), list(range(9)), [0, 1],
    ]  # fmt: skip
    assert 0.4 < moves[:, 2].float().mean() < 0.6


def test_losses_of_views_by_hand():
    batch = views.batch_of(by_hand(), torch.tensor([0]), patch=4)
    even = torch.zeros(1, 1 + len(KINDS), 2, 2)
    losses = heads.view_losses(even, torch.zeros(1, 2, 2, 2), batch)
    assert losses["view_kinds"].item() == pytest.approx(math.log(25))
    # 1² in each left patch, .25² in each right one, over the 2.5 patches that toys cover
    assert losses["view_hue"].item() == pytest.approx((2 + 2 / 16) / 2.5)
    assert losses["loss"] == losses["view_kinds"] + losses["view_hue"]
    angles = torch.tensor([[[0.0, -1], [0, -1]], [[1, 0], [1, 0]]])[None]
    sure = 50 * batch.of_kinds()
    assert heads.view_losses(sure, angles, batch)["view_hue"].item() == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------------------------
# triplets


@pytest.mark.parametrize("op", ["recolour", "replace", "add", "remove", "move", "ground"])
def test_kinds_of_a_source(op):
    for index in range(3):
        triplet = draw_triplet(1, "train", index, "edit", op)
        told = {KINDS[at] for at in np.flatnonzero(source_kinds(triplet))}
        kinds = {toy.look.kind for toy in triplet.toys}
        new = {toy.look.kind for toy in triplet.toys if toy.is_new}
        if op == "remove":
            assert told == kinds | {triplet.gone.look.kind}
        elif op == "add":
            assert told == kinds - new and new
        elif op == "replace":
            assert told == kinds - new | {triplet.gone.look.kind} and not told & new
        else:
            assert told == kinds


def test_subjects_have_no_source():
    assert not source_kinds(draw_triplet(1, "train", 0, "subject", "two")).any()


def test_words_of_a_prompt():
    told = words_of("replace the red tropical fish in<imagehere>with<imagehere>")
    assert sorted(WORDS[at] for at in np.flatnonzero(told)) == [
        "fish", "in", "red", "replace", "the", "tropical", "with",
    ]  # fmt: skip
    assert [WORDS[at] for at in HUE_WORDS][:2] == ["red", "orange"] and len(HUE_WORDS) == 8
    assert {"tropical", "fish"} < {WORDS[at] for at in KIND_WORDS}
    assert "red" not in {WORDS[at] for at in KIND_WORDS}


def test_a_batch_says_what_its_triplets_mean(readings):
    rows = [7, 8, 5]  # of 8 the source is second; of 5 the first toy is the second reference
    batch, truth = readings.read(rows)
    at = 0
    for place, row in enumerate(rows):
        triplet = draw_triplet(0, "train", row)
        assert ASKED[truth.asked[place]] == f"{triplet.task} {triplet.op}"
        assert batch.tasks[place] == triplet.task
        assert truth.words[place].tolist() == words_of(triplet.prompt).tolist()
        assert batch.counts[place] == len(triplet.entities) == len(batch.segments[place]) - 1
        looks = {toy.reference: toy.look for toy in triplet.toys if toy.reference is not None}
        for slot, picture in enumerate(triplet.entities):
            assert torch.allclose(batch.vision[at], to_vision(picture, 64), atol=1e-6)
            pixels = torch.from_numpy(np.asarray(picture) / 127.5 - 1).float().permute(2, 0, 1)
            latents = the_vae().encode(pixels[None]).latent_dist.mean[0]  # unscaled
            assert torch.allclose(batch.latents[at], latents, atol=0.01)
            if slot == triplet.source:
                assert truth.kind[at] == -1 and truth.kinds[at].any()
            else:
                assert KINDS[truth.kind[at]] == looks[slot].kind and not truth.kinds[at].any()
                angle = math.radians(looks[slot].hue)
                wanted = torch.tensor([math.cos(angle), math.sin(angle)])
                assert torch.allclose(truth.hue[at], wanted, atol=1e-5)
            at += 1
    assert at == len(batch.vision) == len(batch.latents)
    assert batch.latents.shape[1:] == (12, 16, 16)


def test_prompts_have_the_prefix_that_training_reads(readings):
    first = {segments[0][0] for segments in readings.segments}
    tokens = the_tokenizer().convert_ids_to_tokens(sorted(first))
    assert set(tokens) <= {"▁compose", "▁edit", "▁combine"}


def test_pictures_begin_where_their_vectors_stand(readings):
    assert starts([[5], [7, 8], []], 3) == [1, 6]
    model = tiny_model()
    batch, _ = readings.read([0, 1, 2, 3])
    embedded, fused = model.embed(batch), model.fuse(batch.vision, batch.latents)
    at = 0
    for row, segments in enumerate(batch.segments):
        for start in starts(segments, 3):
            assert torch.equal(embedded.embeddings[row, start : start + 3], fused[at])
            at += 1
    states = read_states(model, batch)
    assert states.pictures.shape == (at, 3, 32) and states.end.shape == (4, 32)
    for row in range(4):  # each instruction alone, with all of its padding, is read the same
        alone = read_states(model, readings.read([row])[0])
        assert torch.allclose(alone.end[0], states.end[row], atol=1e-5)


def test_what_was_seen_once_is_read_as_the_picture_is(readings):
    model = tiny_model()
    encoder = model.parts["vision_encoder"]
    norm = encoder.post_layernorm  # as if it had learned: twice is not the same as once
    norm.weight.data[:], norm.bias.data[:] = torch.linspace(0.2, 2, 32), torch.linspace(1, -1, 32)
    model.parts["vision_encoder"] = Remembered(encoder)
    kept = Readings(readings.data, the_tokenizer(), seen=look(encoder, readings.data["pixels"]))
    remembered = read_states(model, kept.read([1, 4])[0])
    model.parts["vision_encoder"] = encoder
    seen = read_states(model, readings.read([1, 4])[0])
    assert torch.allclose(remembered.pictures, seen.pictures, atol=0.02)
    assert not torch.allclose(seen.pictures[0], seen.pictures[1], atol=0.02)


def test_each_layer_of_the_caption_projection_gives_the_deviation_1(readings):
    model, batch = tiny_model(), readings.some()
    layer = model.parts["transformer"].caption_projection
    layer.linear_1.weight.data *= 5  # what the second layer reads is not of its size yet
    calibrate(model, batch)
    states = states_of_tokens(model, batch)
    for values in (layer.linear_1(states), layer(states)):
        assert values.var(0).mean().item() == pytest.approx(1, rel=1e-4)


# ----------------------------------------------------------------------------------------------
# what is asked


def test_losses_of_readings_by_hand():
    truth = Truth(
        asked=torch.tensor([0, 3]),
        words=torch.zeros(2, len(WORDS), dtype=torch.bool),
        kind=torch.tensor([4, -1, 2]),  # the second picture is a source
        hue=torch.tensor([[1.0, 0], [9, 9], [0, 1]]),
        kinds=torch.zeros(3, len(KINDS), dtype=torch.bool),
        cells=torch.full((3, 2, 3), 0.5),
    )
    answers = {
        "kind": torch.zeros(3, len(KINDS)), "hue": torch.zeros(3, 2),
        "kinds": torch.zeros(3, len(KINDS)), "asked": torch.zeros(2, len(ASKED)),
        "words": torch.zeros(2, len(WORDS)), "cells": torch.zeros(3, 2, 3),
    }  # fmt: skip
    losses = heads.reading_losses(answers, truth)
    wanted = {
        "kind": math.log(24),  # two references, by two instructions
        "hue": 1.0,
        "kinds": 12 * math.log(2),  # 24 kinds of one source, by two instructions
        "cells": 18 * 0.25 / 2,
        "words": len(WORDS) * math.log(2),
        "asked": math.log(len(ASKED)),
    }
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value), name
    assert losses["loss"].item() == pytest.approx(sum(wanted.values()))


def test_a_hue_is_right_within_25_degrees():
    truth = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    angles = torch.tensor([24.9, 25.1, 180.0]).deg2rad()
    found = 0.3 * torch.stack([angles.cos(), angles.sin()], -1)
    assert heads.is_near(found, truth).tolist() == [True, False, False]


def test_shares_of_right_answers(readings):
    cells = torch.tensor([-1.0, 1.0] * 9)[: len(readings.data["kind"])]
    asked = replace(readings, cells=cells[:, None, None].expand(-1, 2, 3))

    class Knows(torch.nn.Module):
        """Answers from the truth, but is wrong in the first instruction and its pictures."""

        def forward(self, states):
            truth = asked.read(list(range(12)))[1]
            kind = F.one_hot(truth.kind.clamp_min(0), len(KINDS)).float()
            op = F.one_hot(truth.asked, len(ASKED)).float()
            words, kinds = truth.words.float() - 0.5, truth.kinds.float() - 0.5
            op[0], words[0] = op[0].roll(1), -words[0]
            return {
                "kind": kind, "hue": truth.hue, "kinds": kinds, "asked": op, "words": words,
                "cells": 0.5 * truth.cells,
            }  # fmt: skip

    found = heads.measure_readings(tiny_model(), Knows(), asked, batch=12)
    right = dict.fromkeys(("kind", "hue", "source_kinds"), 1)
    explained = 1 - 0.25 / cells.var(correction=0).item()
    wanted = right | dict.fromkeys(("asked", "named_kinds", "named_hues"), 11 / 12)
    assert found == pytest.approx(wanted | {"cells": explained})


def test_each_query_has_a_cell_of_its_own(readings):
    assert [heads.grid_of(queries) for queries in (8, 3, 4, 6, 1)] == [
        (2, 4), (1, 3), (2, 2), (2, 3), (1, 1),
    ]  # fmt: skip

    class Sees(torch.nn.Module):
        """A toy of 90° covers the lower right quarter of 8×8 patches, surely."""

        def forward(self, encoder, pictures):
            logits, hues = torch.zeros(1, 1 + len(KINDS), 8, 8), torch.zeros(1, 2, 8, 8)
            logits[:, 0] = 50
            logits[:, :2, 4:, 4:] = torch.tensor([0, 50.0])[:, None, None]
            hues[:, 1] = 1
            return logits, hues

    encoder = tiny_model().parts["vision_encoder"]
    cells = heads.cells_of(encoder, Sees(), torch.zeros(1, 65, 32), queries=8)
    assert cells.shape == (1, 8, 3)
    wanted = torch.zeros(8, 3)
    wanted[6:] = torch.tensor([1.0, 0, 1])  # the last two of the lower row
    assert torch.allclose(cells[0], wanted, atol=1e-6)


# ----------------------------------------------------------------------------------------------
# the silent death


def test_deviations_of_what_the_fusion_says_by_hand():
    def between(values) -> list[float]:
        return list(heads.deviations(torch.tensor(values).float()[:, :, None]).values())

    assert between([[0, 0], [2, 2]]) == pytest.approx([1, 0])  # two pictures, two queries
    assert between([[0, 2], [0, 2]]) == pytest.approx([0, 1])
    assert between([[0, 2], [2, 4]]) == pytest.approx([math.sqrt(1 / 2)] * 2)
    assert between([[3, 3], [3, 3]]) == [0, 0]


def test_a_q_former_that_says_the_same_of_all_pictures_is_seen(readings):
    model, some = tiny_model(), readings.some()
    alive = heads.collapse(model, some.vision, some.latents)
    last = model.parts["qformer"].encoder.layer[-1].output_query
    with torch.no_grad():
        last.LayerNorm.weight.zero_()
    dead = heads.collapse(model, some.vision, some.latents)
    for name in ("between_pictures", "between_queries"):
        assert dead[name] < 1e-3 < 0.05 < alive[name] <= 1


def test_queries_are_asked_one_by_one():
    asks = heads.ReadingHeads(width=2, queries=3)
    states = States(torch.arange(6.0).reshape(1, 3, 2), torch.zeros(1, 2))
    turned = States(states.pictures.flip(1), states.end)
    assert not torch.allclose(asks(states)["kind"], asks(turned)["kind"])
    one, two = (asks(each)["cells"] for each in (states, turned))
    assert torch.allclose(one, two.flip(1))  # the same weights for each
    wanted = asks.hue.weight @ torch.arange(6.0) + asks.hue.bias
    assert torch.allclose(asks(states)["hue"][0], wanted)
