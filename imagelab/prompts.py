"""Prompts as token ids."""

import torch
from torch import Tensor

from imagelab.errors import UserError


def encode_ids(tokenizer, prompt: str) -> Tensor:
    """Token ids int64 [tokens] of a prompt, padded; a UserError when it is too long."""
    limit = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", max_length=limit, truncation=False).input_ids
    if len(ids) > limit:
        raise UserError(
            f"the prompt has {len(ids) - 2} tokens, and the model reads {limit - 2}: shorten "
            f"{shorten(prompt)!r}"
        )
    return torch.tensor(ids)


def shorten(text: str, limit: int = 60) -> str:
    """A text of at most ``limit`` characters, for a message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
