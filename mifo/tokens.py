"""Placeholder tokens: add them, give them rows of their own, find them in a prompt."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from imagelab.errors import UserError, shorten, shown
from imagelab.prompts import encode_ids
from imagelab.training.seeds import generator_for
from mifo.method.regions import TokenRoles

ASSET = re.compile(r"<asset\d+>")
#: Words that no pixel can show: hidden from every pixel while boxes are in control.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no all both half such
    what which whose my your his her its our their one two three four five six seven eight nine
    ten eleven twelve dozen hundred first second third
    about above across after against along amid among around as at before behind below beneath
    beside besides between beyond by despite down during except for from in inside into near of
    off on onto opposite out outside over past per since than through throughout to toward
    towards under underneath until up upon via with within without
    and or but nor so yet if because although though while whereas unless whether
    is are was were be been being am do does did has have had can could will would shall should
    may might must not i you he she it we they me him them us there here who whom
    left right top bottom , . ; : ! ? - ( ) ' "
    """.split()  # noqa: SIM905 (a list of one word a line would be five times as long)
)


def asset_token(i: int) -> str:
    """The placeholder token of mask `i`."""
    return f"<asset{i}>"


def view_prompt(assets: tuple[int, ...]) -> str:
    """The prompt of a view: (2, 0) gives "a photo of <asset2> and <asset0>"."""
    return f"a photo of {' and '.join(asset_token(i) for i in assets)}"


def add_asset_tokens(tokenizer, text_encoder, count: int) -> list[int]:
    """Add ``<asset0>`` … as :func:`add_tokens` does; returns their ids."""
    return add_tokens(tokenizer, text_encoder, [asset_token(i) for i in range(count)])


def add_tokens(tokenizer, text_encoder, names: list[str]) -> list[int]:
    """Add tokens by these names, and as many rows to the embedding table; returns their ids.

    The new rows are zero until :func:`write_rows` sets them, or :func:`embed_as` stands in for
    them; no other row changes.
    """
    known = set(names) & set(tokenizer.get_vocab())
    if known:
        raise UserError(
            f"the base model already has the token {min(known)}: give --model_path a base model, "
            "not the result of an earlier learning"
        )
    tokenizer.add_tokens(names)
    ids = tokenizer.convert_tokens_to_ids(names)
    table = text_encoder.get_input_embeddings()
    if max(ids) >= table.num_embeddings:
        trains = table.weight.requires_grad
        text_encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        text_encoder.get_input_embeddings().weight.requires_grad_(trains)
    write_rows(text_encoder, ids, torch.zeros(len(ids), table.embedding_dim))
    return ids


def initial_rows(
    tokenizer,
    text_encoder,
    ids: Sequence[int],
    words: Sequence[str],
    seed: int,
    scale: float = 1.0,
) -> Tensor:
    """First values of the asset rows, float32 [assets, width].

    Without ``words`` they are drawn from a normal of the table's own mean and ``scale`` times its
    deviation in each channel, fixed by the seed. With words, one entry for all assets or one for
    each, a row is the mean of the rows of its words.

    Raises UserError for another number of entries, and for an empty one.
    """
    table = text_encoder.get_input_embeddings().weight.detach().float().cpu()
    count = len(ids)
    if not words:
        base = table[: min(ids)]
        draw = torch.randn(count, table.shape[1], generator=generator_for(seed, "asset rows"))
        return base.mean(0) + scale * base.std(0) * draw
    words = list(words) * count if len(words) == 1 else list(words)
    if len(words) != count:
        raise UserError(
            f"--initializer_tokens has {len(words)} entries for {count} instances; give one for "
            'all, or one for each, in quotes if it is of several words: "blue car" "teal car"'
        )
    pieces = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    for word, tokens in zip(words, pieces, strict=True):
        if not tokens:
            raise UserError(
                f"--initializer_tokens: {shorten(word)!r} is empty; give a word such as 'car'"
            )
    return torch.stack([table[tokens].mean(0) for tokens in pieces])


@torch.no_grad()
def write_rows(text_encoder, ids: Sequence[int], rows: Tensor) -> None:
    """Write rows [assets, width] into the embedding table."""
    weight = text_encoder.get_input_embeddings().weight
    weight[list(ids)] = rows.to(weight)


@contextmanager
def embed_as(text_encoder, ids: Sequence[int], rows: Tensor) -> Iterator[None]:
    """Within, the asset tokens embed as ``rows`` [assets, width], which may require gradients.

    The table itself is not touched, so no other row can change.
    """

    def replace(module, arguments, embedded: Tensor) -> Tensor:
        input_ids = arguments[0]
        for index, token in enumerate(ids):
            chosen = (input_ids == token)[..., None]
            embedded = torch.where(chosen, rows[index].to(embedded.dtype), embedded)
        return embedded

    handle = text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def find_assets(tokenizer, prompt: str, known: Sequence[int]) -> list[tuple[str, int]]:
    """(name, position) of each asset in a prompt, in its order; positions count the start token.

    Raises UserError unless the tokenizer sees them all, with one of the ``known`` numbers each.
    """
    ids = encode_ids(tokenizer, prompt).tolist()
    wanted = {tokenizer.convert_tokens_to_ids(name): name for name in map(asset_token, known)}
    found = [(wanted[token], at) for at, token in enumerate(ids) if token in wanted]
    if [name for name, _ in found] != ASSET.findall(prompt):
        raise UserError(
            f"the tokenizer does not see the assets of the prompt {shorten(prompt)!r}: write each "
            "as a word of its own, such as '<asset0> and <asset1>'"
        )
    return found


def _function_words(tokenizer, ids: Sequence[int]) -> set[int]:
    """Positions of the tokens that are a function word or digit each, not part of another word."""
    added = tokenizer.get_added_vocab()
    pieces = tokenizer.convert_ids_to_tokens(ids)
    closed = [piece.endswith("</w>") or piece in added for piece in pieces]
    words = [piece.removesuffix("</w>") for piece in pieces]
    return {
        at
        for at in range(1, len(ids))
        if closed[at - 1] and closed[at] and (words[at] in FUNCTION_WORDS or words[at].isdigit())
    }


def token_roles(tokenizer, prompt: str, subjects: Sequence[Sequence[int]]) -> TokenRoles:
    """Roles of a prompt's tokens, given the positions of each subject's tokens.

    A subject's leading token is its last one that is not a function word.
    """
    ids = encode_ids(tokenizer, prompt).tolist()
    end = ids.index(tokenizer.eos_token_id)
    listed = [position for positions in subjects for position in positions]
    taken = set(listed)
    for position in sorted(taken):
        if not 0 < position < end:
            raise UserError(
                f"--subject_token_indices names position {shown(position)}; the prompt's tokens "
                f"have positions 1 to {end - 1}"
            )
        if listed.count(position) > 1:
            raise UserError(
                f"--subject_token_indices names position {position} twice; give each token to "
                "one subject"
            )
    empty = _function_words(tokenizer, ids[:end])
    leading = tuple(
        next((at for at in sorted(positions, reverse=True) if at not in empty), max(positions))
        for positions in subjects
    )
    return TokenRoles(
        subjects=tuple(tuple(positions) for positions in subjects),
        filtered=tuple(sorted(empty - taken)),
        end=end,
        length=len(ids),
        leading=leading,
    )
