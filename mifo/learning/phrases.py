"""Asset tokens that begin as phrases: "blue car" in one token."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from imagelab.prompts import encode_ids
from mifo.tokens import embed_as, initializer_pieces, view_prompt

logger = logging.getLogger(__name__)

STEPS = 300  # from each start
STEP_SIZE = 0.8  # of the first step, in deviations of the embedding table
SAID = 0.3  # squared distance from the wanted state, in its square; toybox: 0.05, 0.9 for a miss


def fit_phrases(
    tokenizer, text_encoder, ids: Sequence[int], phrases: Sequence[str], rows: Tensor
) -> Tensor:
    """Rows with which the asset tokens read like phrases, [assets, width].

    No mean of two words' embeddings says what the two words say one after the other. So the rows
    of phrases of several tokens are moved, by Adam, until the text encoder's states in prompts
    with the assets are those in the same prompts with the phrases: an asset's own state that of
    its phrase's last token, and the end's that of the end, where the asset stands alone. The
    prompts name each asset alone, and first and second of two. A phrase of one token keeps its
    row, which says it exactly.

    Some descents end at a look-alike ("red fish" for "blue fish"). So there are three starts, each
    for the assets that do not say their phrases by then: the row of the phrase's last token, the
    given row, and the row of the phrase's first token. Warns of phrases that none of them finds.

    Args:
        ids: the asset tokens, which tokenizer and text encoder have got.
        phrases: one for all assets, or one for each.
        rows: [assets, width], the means.
    """
    count = len(ids)
    pieces = initializer_pieces(tokenizer, count, phrases)
    moving = torch.tensor([len(tokens) > 1 for tokens in pieces], device=rows.device)
    if not moving.any():
        return rows
    prompts, spelled, (samples, ours, theirs) = _said_twice(tokenizer, ids, pieces, rows.device)
    with torch.no_grad():
        goal = text_encoder(spelled).last_hidden_state[samples, theirs]

    def distances(candidates: Tensor) -> Tensor:  # of each pair
        with embed_as(text_encoder, ids, torch.where(moving[:, None], candidates, rows)):
            states = text_encoder(prompts).last_hidden_state[samples, ours]
        return (states - goal).square().sum(-1) / goal.square().sum(-1)

    table = text_encoder.get_input_embeddings().weight.detach()
    step_size = STEP_SIZE * table[: min(ids)].std().item()
    first, last = (table[[tokens[end] for tokens in pieces]] for end in (0, -1))
    best, least = rows, torch.full((count,), torch.inf, device=rows.device)
    for start in (last, rows, first):
        missing = least > SAID
        if not missing.any():
            break
        fitted = _descend(distances, torch.where(missing[:, None], start, best), step_size)
        with torch.no_grad():  # of what each asset says alone
            apart = distances(fitted)[: 2 * count].view(count, 2).amax(dim=1)
        best = torch.where((apart < least)[:, None], fitted, best)
        least = torch.minimum(least, apart)
    for index in (least > SAID).nonzero().flatten().tolist():
        logger.warning(
            "<asset%d> could not be made to say %r; it starts from the nearest that was found",
            index,
            phrases[index % len(phrases)],
        )
    return torch.where(moving[:, None], best, rows)


def _said_twice(
    tokenizer, ids: Sequence[int], pieces: Sequence[list[int]], device
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with the assets, the same with their phrases, and what has to be equal in both.

    Returns:
        token ids [s, n] and [s, m], and pairs [3, p]: a sample, a position in each of the two.
        First come two pairs an asset, its own position and the end of the prompt that it has alone.
    """
    count = len(ids)
    views = [(i,) for i in range(count)]
    views += [(i, (i + 1) % count) for i in range(count if count > 1 else 0)]
    prompts, spelled, pairs = [], [], []
    for sample, view in enumerate(views):
        prompt = encode_ids(tokenizer, view_prompt(view)).tolist()
        prompt = prompt[: prompt.index(tokenizer.eos_token_id) + 1]
        words = []
        for position, token in enumerate(prompt):
            words += pieces[ids.index(token)] if token in ids else [token]
            if token in ids or (len(view) == 1 and token == tokenizer.eos_token_id):
                pairs.append((sample, position, len(words) - 1))
        prompts.append(torch.tensor(prompt, device=device))
        spelled.append(torch.tensor(words, device=device))
    # Each state depends on what comes before it alone, so any padding will do.
    padded = (pad_sequence(some, True, tokenizer.eos_token_id) for some in (prompts, spelled))
    return *padded, torch.tensor(pairs, device=device).T


def _descend(distances: Callable[[Tensor], Tensor], start: Tensor, step_size: float) -> Tensor:
    rows = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=step_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in tqdm(range(STEPS), "initial tokens", unit="step"):
        optimizer.zero_grad()
        distances(rows).mean().backward(inputs=[rows])
        optimizer.step()
        schedule.step()
    return rows.detach()
