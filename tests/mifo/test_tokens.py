"""Asset tokens: added, given rows that alone change, found in a prompt."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from imagelab.prompts import (
    encode_ids,
)
from mifo.tokens import (
    ASSET,
    FUNCTION_WORDS,
    add_asset_tokens,
    embed_as,
    find_assets,
    initial_rows,
    token_roles,
    write_rows,
)

WORDS = 552  # of the tiny vocabulary, before any asset


@pytest.fixture
def tokenizer(tiny_sd):
    return CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")


@pytest.fixture
def text_encoder(tiny_sd):
    return CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").requires_grad_(False)


@pytest.fixture
def ids(tokenizer, text_encoder):
    """The ids of three added assets."""
    return add_asset_tokens(tokenizer, text_encoder, 3)


def table(text_encoder) -> torch.Tensor:
    return text_encoder.get_input_embeddings().weight.detach().clone()


# --- adding ----------------------------------------------------------------------------------


def test_added_assets_have_rows_of_their_own_and_change_no_other(tokenizer, text_encoder):
    before = table(text_encoder)
    ids = add_asset_tokens(tokenizer, text_encoder, 3)
    assert ids == [WORDS, WORDS + 1, WORDS + 2]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<asset0>", "<asset1>", "<asset2>"]
    after = table(text_encoder)
    assert torch.equal(after[:WORDS], before)
    assert torch.equal(after[WORDS:], torch.zeros(3, before.shape[1]))
    assert not text_encoder.get_input_embeddings().weight.requires_grad


def test_a_table_with_spare_rows_is_not_resized(tokenizer, text_encoder):
    text_encoder.resize_token_embeddings(WORDS + 8, mean_resizing=False)
    before = table(text_encoder)
    ids = add_asset_tokens(tokenizer, text_encoder, 2)
    after = table(text_encoder)
    assert after.shape == before.shape
    untouched = [row for row in range(len(before)) if row not in ids]
    assert torch.equal(after[untouched], before[untouched])
    assert not after[ids].any()


def test_assets_are_added_once(tokenizer, text_encoder, ids):
    with pytest.raises(ValueError, match="already has the token <asset0>.*--model_path"):
        add_asset_tokens(tokenizer, text_encoder, 1)
    assert len(table(text_encoder)) == WORDS + 3


# --- first values ----------------------------------------------------------------------------


def test_drawn_rows_are_fixed_by_the_seed(tokenizer, text_encoder, ids):
    torch.manual_seed(0)
    first = initial_rows(tokenizer, text_encoder, ids, (), seed=7)
    torch.manual_seed(1)
    assert torch.equal(initial_rows(tokenizer, text_encoder, ids, (), seed=7), first)
    other = initial_rows(tokenizer, text_encoder, ids, (), seed=8)
    assert (other - first).abs().min() > 0


def test_drawn_rows_are_spread_like_the_table(tokenizer, text_encoder, ids):
    weight = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[:WORDS, 0] = 5 + 0.1 * torch.linspace(-1, 1, WORDS)
        weight[:WORDS, 1] = 0.25
        weight[WORDS:] = 1e4  # the assets' own rows do not count
    many = [WORDS] * 2000
    rows = initial_rows(tokenizer, text_encoder, many, (), seed=0)
    assert rows[:, 0].mean().item() == pytest.approx(5, abs=0.02)
    assert rows[:, 0].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert (rows[:, 1] - 0.25).abs().max() < 1e-6


def test_a_scale_narrows_the_draw_around_the_mean(tokenizer, text_encoder, ids):
    mean = table(text_encoder)[:WORDS].mean(0)
    wide, narrow, none = (
        initial_rows(tokenizer, text_encoder, ids, (), seed=7, scale=scale) for scale in (1, 0.1, 0)
    )
    assert torch.allclose(narrow - mean, 0.1 * (wide - mean), atol=1e-6)
    assert torch.allclose(none, mean.expand_as(none))


def test_initializer_words(tokenizer, text_encoder, ids):
    weight = table(text_encoder)
    car, dog = tokenizer.convert_tokens_to_ids(["car</w>", "dog</w>"])
    rows = initial_rows(tokenizer, text_encoder, ids, ("car",), seed=0)
    assert torch.equal(rows, weight[[car, car, car]])
    rows = initial_rows(tokenizer, text_encoder, ids, ("dog", "car", "toy car"), seed=0)
    assert torch.equal(rows[:2], weight[[dog, car]])
    toy = tokenizer.convert_tokens_to_ids("toy</w>")
    assert torch.allclose(rows[2], (weight[toy] + weight[car]) / 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("car", "dog"), "has 2 entries for 3 instances; give one for all, or one for each"),
        (("car", "dog", " "), "' ' is empty"),
    ],
)
def test_initializer_words_that_do_not_fit(tokenizer, text_encoder, ids, words, message):
    with pytest.raises(ValueError, match=message):
        initial_rows(tokenizer, text_encoder, ids, words, seed=0)


# --- rows ------------------------------------------------------------------------------------


def states(tokenizer, text_encoder, prompt: str) -> torch.Tensor:
    return text_encoder(encode_ids(tokenizer, prompt)[None]).last_hidden_state


def test_lent_rows_read_like_written_ones(tokenizer, text_encoder, ids):
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    prompt = "a photo of <asset2> and <asset0> and <asset2>"
    without = states(tokenizer, text_encoder, prompt)
    with embed_as(text_encoder, ids, rows):
        lent = states(tokenizer, text_encoder, prompt)
    assert torch.equal(states(tokenizer, text_encoder, prompt), without)
    write_rows(text_encoder, ids, rows)
    assert torch.equal(states(tokenizer, text_encoder, prompt), lent)
    assert not torch.equal(lent, without)


def test_lent_rows_are_taken_back_after_an_exception(tokenizer, text_encoder, ids):
    without = states(tokenizer, text_encoder, "<asset0>")
    with pytest.raises(RuntimeError), embed_as(text_encoder, ids, torch.ones(3, 32)):
        raise RuntimeError
    assert torch.equal(states(tokenizer, text_encoder, "<asset0>"), without)


def test_training_changes_the_rows_of_the_prompts_assets_and_no_bit_of_the_table(
    tokenizer, text_encoder, ids
):
    text_encoder.requires_grad_(True)  # as in a full fine-tuning, where all else is trained
    embedding = text_encoder.get_input_embeddings().weight.requires_grad_(False)
    norm = next(p for name, p in text_encoder.named_parameters() if "final_layer_norm" in name)
    before, norm_before = table(text_encoder), norm.detach().clone()
    rows = torch.nn.Parameter(initial_rows(tokenizer, text_encoder, ids, (), seed=0))
    first = rows.detach().clone()
    trained = [p for p in text_encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([rows, *trained], lr=5e-3, weight_decay=0)
    for _ in range(3):
        with embed_as(text_encoder, ids, rows):
            loss = states(tokenizer, text_encoder, "a photo of <asset0> and <asset2>")[0, 4:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(table(text_encoder), before)
    assert embedding.grad is None
    changed = (rows != first).any(dim=1).tolist()
    assert changed == [True, False, True]
    assert not torch.equal(norm, norm_before)
    write_rows(text_encoder, ids, rows)
    assert torch.equal(table(text_encoder)[:WORDS], before[:WORDS])
    assert torch.equal(table(text_encoder)[WORDS:], rows)


# --- prompts ---------------------------------------------------------------------------------


def test_encoded_prompt(tokenizer):
    ids = encode_ids(tokenizer, "a photo of")
    assert ids.shape == (77,) and ids.dtype == torch.int64
    assert ids[:5].tolist() == [550, 320, 515, 516, 551]
    assert set(ids[5:].tolist()) == {tokenizer.pad_token_id}


def test_a_prompt_fills_the_model_to_the_last_token_and_no_further(tokenizer):
    assert encode_ids(tokenizer, "a " * 75)[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="has 76 tokens, and the model reads 75: shorten 'a a.*…'"):
        encode_ids(tokenizer, "a " * 76)


def test_positions_of_assets(tokenizer, ids):
    found = find_assets(tokenizer, "a photo of <asset2> and <asset0>", range(3))
    assert found == [("<asset2>", 4), ("<asset0>", 6)]
    assert find_assets(tokenizer, "a photo of grass", range(3)) == []


def test_the_same_asset_twice(tokenizer, ids):
    found = find_assets(tokenizer, "<asset1> on <asset0> and <asset1>", range(3))
    assert found == [("<asset1>", 1), ("<asset0>", 3), ("<asset1>", 5)]


def test_positions_where_the_prompt_holds_the_padding_token(tokenizer, ids):
    """SD 2 pads with "!", which is also a token that a prompt may hold."""
    assert tokenizer.pad_token == "!"
    prompt = "a dog! <asset0>!<asset1> and!"
    found = find_assets(tokenizer, prompt, range(3))
    assert found == [("<asset0>", 4), ("<asset1>", 6)]
    roles = token_roles(tokenizer, prompt, [[4], [6]])
    assert roles.end == 9 and roles.length == 77
    assert roles.filtered == (1, 3, 5, 7, 8)


def test_assets_are_not_mistaken_for_those_whose_number_they_begin(tokenizer, text_encoder):
    add_asset_tokens(tokenizer, text_encoder, 11)
    found = find_assets(tokenizer, "<asset10> and <asset1>", range(11))
    assert found == [("<asset10>", 1), ("<asset1>", 3)]


def test_an_unknown_asset(tokenizer, ids):
    with pytest.raises(ValueError, match="does not see the assets of the prompt"):
        find_assets(tokenizer, "a photo of <asset0> and <asset3>", range(3))
    with pytest.raises(ValueError, match="does not see the assets of the prompt"):
        find_assets(tokenizer, "a photo of <asset2>", range(2))


def test_an_asset_in_capitals_is_not_passed_over(tokenizer, ids):
    with pytest.raises(ValueError, match="does not see the assets.*'<asset0> and <asset1>'"):
        find_assets(tokenizer, "a photo of <ASSET0>", range(3))


@pytest.fixture(scope="module")
def three_assets(tiny_sd):
    """A tokenizer that knows three assets; tests only read it."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    tokenizer.add_tokens(["<asset0>", "<asset1>", "<asset2>"])
    return tokenizer


def counted(tokenizer, prompt) -> list[tuple[str, int]]:
    """Each asset and its position: one more than there are tokens in the text before it."""
    return [
        (match[0], 1 + len(tokenizer(prompt[: match.start()], add_special_tokens=False).input_ids))
        for match in ASSET.finditer(prompt)
    ]


ASSETS = st.sampled_from(["<asset0>", "<asset1>", "<asset2>"])
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8)
PIECES = ASSETS | st.sampled_from(["a", "photo", "of", "car.", "!", "!!", "Dog", "x-ray", "<", "é"])


@settings(deadline=None)
@given(pieces=st.lists(PIECES, max_size=10), glue=st.sampled_from([" ", "", "  ", ", "]))
def test_positions_in_any_prompt(three_assets, pieces, glue):
    prompt = glue.join(pieces)
    found = find_assets(three_assets, prompt, range(3))
    assert found == counted(three_assets, prompt)
    ids = encode_ids(three_assets, prompt).tolist()
    assert [three_assets.convert_ids_to_tokens(ids[at]) for _, at in found] == [
        piece for piece in pieces if piece.startswith("<asset")
    ]
    roles = token_roles(three_assets, prompt, [[at] for _, at in found])
    assert ids[roles.end] == three_assets.eos_token_id
    taken = {at for _, at in found}
    assert not taken & set(roles.filtered)
    words = {three_assets.decode([ids[at]]).strip() for at in roles.filtered}
    assert words <= FUNCTION_WORDS


@settings(deadline=None)
@given(before=ANY_TEXT, name=ASSETS, after=ANY_TEXT)
@example(before="", name="<asset0>", after="\u0338")  # which turns ">" into another letter
def test_beside_any_text_positions_are_right_or_refused(three_assets, before, name, after):
    prompt = before + name + after
    try:
        found = find_assets(three_assets, prompt, range(3))
    except ValueError as error:
        assert "write each as a word of its own" in str(error)
        assert not (before + after).isascii()
    else:
        assert found == counted(three_assets, prompt)


# --- roles -----------------------------------------------------------------------------------


def test_roles(tokenizer, ids):
    # 1 a, 2 photo, 3 of, 4 <asset0>, 5 and, 6 <asset1>, 7 on, 8 the, 9 grass, 10 end
    roles = token_roles(tokenizer, "A photo of <asset0> and <asset1> on the grass", [[4], [6]])
    assert roles.subjects == ((4,), (6,))
    assert roles.leading == (4, 6)
    assert roles.filtered == (1, 3, 5, 7, 8)
    assert roles.end == 10 and roles.length == 77


def test_a_subjects_function_words_are_not_filtered(tokenizer):
    # 1 a, 2 toy, 3 car, 4 on, 5 the, 6 grass
    roles = token_roles(tokenizer, "a toy car on the grass", [[1, 2, 3], [5, 6]])
    assert roles.filtered == (4,)
    assert roles.leading == (3, 6)


def test_the_leading_token_is_the_last_that_says_something(tokenizer):
    prompt = "a toy car on the grass"
    assert token_roles(tokenizer, prompt, [[2, 3, 4, 5]]).leading == (3,)
    assert token_roles(tokenizer, prompt, [[3, 2, 1]]).leading == (3,)
    assert token_roles(tokenizer, prompt, [[4, 5]]).leading == (5,)  # nothing better


def test_pieces_of_longer_words_are_not_function_words(tokenizer):
    """The tiny vocabulary spells most words in letters, and "i" and "a" are words as well."""
    assert tokenizer.tokenize("i nice xa a") == ["i</w>", *"nic", "e</w>", "x", "a</w>", "a</w>"]
    assert token_roles(tokenizer, "i nice xa a", []).filtered == (1, 8)


@pytest.mark.parametrize("word", ["the", "of", "and", "two", "left", "right", "top", "bottom"])
def test_function_words(word):
    assert word in FUNCTION_WORDS


@pytest.mark.parametrize("position", [0, -1, 7, 76])
def test_positions_outside_the_prompt(tokenizer, position):
    message = rf"--subject_token_indices names position {position}; .* have positions 1 to 6"
    with pytest.raises(ValueError, match=message):
        token_roles(tokenizer, "a toy car on the grass", [[2, 3], [position]])


@pytest.mark.parametrize("subjects", [[[2], [2]], [[2, 3, 2]]])
def test_a_token_belongs_to_one_subject(tokenizer, subjects):
    with pytest.raises(ValueError, match="names position 2 twice; give each token to one subject"):
        token_roles(tokenizer, "a toy car on the grass", subjects)
