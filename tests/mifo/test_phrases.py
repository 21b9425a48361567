"""Tokens that start as phrases, on toybox's text encoder."""

import pytest
import torch

from imagelab.models.stable_diffusion import load_base
from imagelab.prompts import encode_ids
from mifo.learning.phrases import fit_phrases
from mifo.tokens import add_asset_tokens, embed_as, initial_rows
from toybox.scenes.scenes import HUES

KINDS = ("balloon", "bear", "car", "cat", "fish", "fox", "lizard", "teapot")


@pytest.fixture(scope="module")
def base():
    return load_base("toybox")


@pytest.fixture(scope="module")
def ids(base):
    return add_asset_tokens(base.tokenizer, base.text_encoder, 3)


def states(base, prompts: list[str]) -> torch.Tensor:
    """Each prompt's state before its end token, [prompts, width]."""
    rows = torch.stack([encode_ids(base.tokenizer, prompt) for prompt in prompts])
    last = (rows == base.tokenizer.eos_token_id).int().argmax(dim=1) - 1
    with torch.no_grad():
        hidden = base.text_encoder(rows).last_hidden_state
    return hidden[torch.arange(len(rows)), last]


def test_tokens_say_their_phrases(base, ids):
    """All, alone and in company, are nearest to their own of 64 phrases; few means are."""
    sets = [
        ("teal teapot", "blue teapot", "pink fox"),
        ("blue car", "purple car", "green car"),
        ("orange cat", "yellow bear", "red balloon"),
    ]
    known = [f"{colour} {kind}" for colour in HUES for kind in KINDS]

    def read(rows, phrases, asset: int, others: tuple[int, ...] = ()) -> str:
        said = "".join(f"{phrases[i]} and " for i in others)
        wanted = states(base, [f"a photo of {said}{phrase}" for phrase in known])
        with embed_as(base.text_encoder, ids, rows):
            said = "".join(f"<asset{i}> and " for i in others)
            found = states(base, [f"a photo of {said}<asset{asset}>"])
        return known[torch.cdist(found, wanted).argmin().item()]

    right = {"means": 0, "alone": 0, "in company": 0}
    for phrases in sets:
        means = initial_rows(base.tokenizer, base.text_encoder, ids, phrases, seed=0)
        fitted = fit_phrases(base.tokenizer, base.text_encoder, ids, phrases, means)
        for i, phrase in enumerate(phrases):
            right["means"] += read(means, phrases, i) == phrase
            right["alone"] += read(fitted, phrases, i) == phrase
            right["in company"] += read(fitted, phrases, i, ((i + 2) % 3,)) == phrase
    assert right["means"] <= 4
    assert right["alone"] == right["in company"] == 9


def test_phrases_that_are_not_found_are_told(base, ids, monkeypatch, caplog):
    phrases = ("blue fish", "fox", "red fish")
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, phrases, seed=0)
    fit_phrases(base.tokenizer, base.text_encoder, ids, phrases, rows)
    assert not caplog.messages
    monkeypatch.setattr("mifo.learning.phrases.STEPS", 1)
    fit_phrases(base.tokenizer, base.text_encoder, ids, phrases, rows)
    told = [message.split(" could not")[0] for message in caplog.messages]
    assert told == ["<asset0>", "<asset2>"]
    assert "'red fish'" in caplog.messages[1]


def test_phrases_of_one_token_keep_their_rows_and_the_table_stays(base, ids):
    table = base.text_encoder.get_input_embeddings().weight
    before = table.detach().clone()
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, ("car", "red car", "fox"), seed=0)
    fitted = fit_phrases(
        base.tokenizer, base.text_encoder, ids, ("car", "red car", "fox"), rows.clone()
    )
    assert torch.equal(fitted[[0, 2]], rows[[0, 2]])
    assert (fitted[1] - rows[1]).norm() > 0.1 * rows[1].norm()
    assert not fitted.requires_grad and torch.equal(table, before)
    assert fit_phrases(base.tokenizer, base.text_encoder, ids, ("car",), rows) is rows


def test_one_phrase_for_all(base, ids):
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, ("red car",), seed=0)
    fitted = fit_phrases(base.tokenizer, base.text_encoder, ids, ("red car",), rows)
    assert (fitted - rows).norm(dim=1).min() > 0.1 * rows[0].norm()
    assert torch.equal(
        fit_phrases(base.tokenizer, base.text_encoder, ids, ("red car",), rows), fitted
    )
