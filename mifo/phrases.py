"""Asset tokens that begin as phrases: "blue car" in one token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mifo.instance import view_prompt
from mifo.tokens import encode_ids, initializer_pieces, lend_rows

STEPS = 300
STEP_SIZE = 0.4  # of the first step, in deviations of the embedding table


def fit_phrases(
    tokenizer, text_encoder, ids: Sequence[int], phrases: Sequence[str], rows: Tensor
) -> Tensor:
    """Rows with which the asset tokens read like phrases, [assets, width].

    No mean of two words' embeddings says what the two words say one after the other. So the rows
    of phrases of several tokens are moved, by Adam, until the text encoder's states in prompts
    with the assets are those in the same prompts with the phrases: an asset's own state that of
    its phrase's last token, and the end's that of the end. The prompts name each asset alone, and
    first and second of two. A phrase of one token keeps its row, which says it exactly.

    Args:
        ids: the asset tokens, which tokenizer and text encoder have got.
        phrases: one for all assets, or one for each.
        rows: [assets, width], where they start.
    """
    count = len(ids)
    pieces = initializer_pieces(tokenizer, count, phrases)
    moving = torch.tensor([len(tokens) > 1 for tokens in pieces], device=rows.device)
    if not moving.any():
        return rows
    views = [(i,) for i in range(count)]
    views += [(i, (i + 1) % count) for i in range(count if count > 1 else 0)]
    prompts, spelled, pairs = [], [], []
    for sample, view in enumerate(views):
        prompt = encode_ids(tokenizer, view_prompt(view)).tolist()
        prompt = prompt[: prompt.index(tokenizer.eos_token_id) + 1]
        words = []
        for position, token in enumerate(prompt):
            words += pieces[ids.index(token)] if token in ids else [token]
            if token in ids or token == tokenizer.eos_token_id:
                pairs.append((sample, position, len(words) - 1))
        prompts.append(torch.tensor(prompt, device=rows.device))
        spelled.append(torch.tensor(words, device=rows.device))
    samples, ours, theirs = torch.tensor(pairs, device=rows.device).unbind(-1)
    prompts, spelled = (  # each state depends on what comes before it alone, so any padding will do
        pad_sequence(some, batch_first=True, padding_value=tokenizer.eos_token_id)
        for some in (prompts, spelled)
    )
    with torch.no_grad():
        goal = text_encoder(spelled).last_hidden_state[samples, theirs]
    deviation = text_encoder.get_input_embeddings().weight[: min(ids)].std().item()
    fitted = rows.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([fitted], lr=STEP_SIZE * deviation)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in tqdm(range(STEPS), "initial tokens", unit="step"):
        with lend_rows(text_encoder, ids, torch.where(moving[:, None], fitted, rows)):
            states = text_encoder(prompts).last_hidden_state[samples, ours]
        loss = ((states - goal).square().sum(-1) / goal.square().sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward(inputs=[fitted])
        optimizer.step()
        schedule.step()
    return torch.where(moving[:, None], fitted.detach(), rows)
