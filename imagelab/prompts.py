"""Prompts: what may not be in them, and their token ids."""

import re

import torch
from torch import Tensor

from imagelab.errors import UserError, shorten

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
#: Weights of other programs; the first group is what they weigh.
WEIGHTED = re.compile(rf"\(([^()]+):(\s*)({NUMBER})\s*\)")  # (word:1.3)
EMPHASISED = re.compile(r"\(\(([^()]+)\)\)|\[([^\[\]]+)\]|\{([^{}]+)\}")  # ((word)), [word], {word}
TAG = re.compile(r"<([^<>:\s]+):([^<>]*)>")  # <lora:name:1>, <name:1.2>
EMBEDDING = re.compile(r"\bembedding:[^\s,()]+")
ESCAPED = re.compile(r"\\[()\[\]{}]")
#: What ends in one of these is a time, a ratio or a verse: (12:30), (16:9), (John 3:16).
NUMERAL = re.compile(r"(?:^|\s)[\d.:/]+$")


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


def check_prompt(text: str, name: str) -> None:
    """Raises UserError for a prompt that is no UTF-8 text, or holds weights of other programs.

    ``name`` is what a message calls it, such as --prompt.

    A1111 and ComfyUI read ``(word:1.3)``, ``((word))``, ``[word]`` and ``<lora:name:1>``; here they
    would be words that a picture may show. Plain parentheses are text: "a cat (sitting)".
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} {shorten(text)!r} is not UTF-8 text; write it in a terminal, or a script, "
            "of that encoding"
        ) from None
    if found := _find_foreign(text):
        written, why, advice = found
        raise UserError(f"{name} writes {shorten(written)!r}, and {why}; {advice}")


def _find_foreign(text: str) -> tuple[str, str, str] | None:
    """What a prompt writes that only other programs read, why not here, and what to do."""
    weights = "weights are not supported"
    for found in WEIGHTED.finditer(text):
        words, space, number = found[1], found[2], found[3]
        is_text = NUMERAL.search(words) or (space and number.isdigit())  # (3:4) or (page: 7)
        if not is_text:
            return found[0], weights, f"write {shorten(words.strip())!r}"
    if found := TAG.search(text):
        kind, rest = found[1], found[2]
        if kind.lower() in ("lora", "lyco", "lycoris"):
            advice = "leave it out, and give the file with --lora, its strength with --lora_scale"
            return found[0], "a prompt loads no LoRA", advice
        if re.fullmatch(rf"\s*{NUMBER}\s*", rest):
            return found[0], weights, f"write {shorten(f'<{kind}>')!r}"
        return found[0], "this is not supported", "leave it out"
    if found := EMPHASISED.search(text):
        words = next(group for group in found.groups() if group).strip()
        if re.search(r"[|:]", words):
            return found[0], "words that change are not supported", "write one of them alone"
        return found[0], weights, f"write {shorten(words)!r}"
    if found := EMBEDDING.search(text):
        return found[0], "a prompt loads no file", "give it with --tokens, and write its <name>"
    if found := ESCAPED.search(text):
        return found[0], "parentheses are text", f"write {found[0][1]!r} without the backslash"
    return None
