"""CLIP's tokenizer, read as if from a stranger: its vocabulary and merges, and nothing else.

A tokenizer's files may name code, hold expressions that never end, or numbers at which the library
aborts the whole process. So these are read here, and written anew for the library to load.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from imagelab.errors import UserError
from imagelab.io.tensors import misfit, read_json

ADVICE = "fetch the model again or give another one"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL = ("unk_token", "bos_token", "eos_token", "pad_token")
MOST_TOKENS = 1_000_000
LONGEST = 100_000  # tokens of a text; some tokenizers say 10^30
#: What an added token says of itself.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def copy_clip_tokenizer(folder: Path, ours: Path) -> None:
    """Write what is known of a tokenizer's folder into a folder of our own.

    Raises UserError for a vocabulary, merges or special tokens that are none.
    """
    whole = _read_optional(folder / "tokenizer.json")
    vocabulary, merges = _read_words(folder, whole)
    config = _read_optional(folder / TOKENIZER_CONFIG)
    special = _read_optional(folder / "special_tokens_map.json") | config
    known = {
        key: _token(special[key], folder / TOKENIZER_CONFIG, key)
        for key in SPECIAL
        if special.get(key) is not None
    }
    longest = config.get("model_max_length", LONGEST)
    if type(longest) is not int or longest < 3:
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: model_max_length is {str(longest)[:40]}; {ADVICE}"
        )
    known["model_max_length"] = min(longest, LONGEST)
    known["added_tokens_decoder"] = _read_added(folder, whole, config, vocabulary)
    for name, facts in (("vocab.json", vocabulary), (TOKENIZER_CONFIG, known)):
        (ours / name).write_text(json.dumps(facts), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (ours / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_optional(path: Path) -> dict:
    """The facts in a JSON file, none where it is missing."""
    return read_json(path, {}, ADVICE, clip=True) if path.exists() or path.is_symlink() else {}


def _read_words(folder: Path, whole: dict) -> tuple[dict[str, int], list[list[str]]]:
    """The ids of tokens by their text, and the pairs that merge, in their order."""
    path = folder / "vocab.json"
    if path.exists():
        vocabulary = read_json(path, {}, ADVICE)
        merges = _read_merges(folder / "merges.txt")
    elif not whole:
        raise UserError(f"{folder} holds neither vocab.json nor tokenizer.json; {ADVICE}")
    else:
        path, model = folder / "tokenizer.json", whole.get("model")
        if wrong := misfit(model, {"vocab": dict, "merges": list}, "model"):
            raise UserError(f"{path}: {wrong}; {ADVICE}")
        vocabulary = model["vocab"]
        merges = [each.split(" ") if type(each) is str else each for each in model["merges"]]
    ids = list(vocabulary.values())
    if not ids or len(ids) > MOST_TOKENS or any(type(i) is not int or i < 0 for i in ids):
        raise UserError(f"{path} is no vocabulary of texts and their numbers from 0 on; {ADVICE}")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has several tokens of one number; {ADVICE}")
    if not all(_is_pair(each, vocabulary) for each in merges):
        raise UserError(f"{folder} merges what are no two tokens of its vocabulary; {ADVICE}")
    return vocabulary, merges


def _is_pair(merge: object, vocabulary: Mapping[str, int]) -> bool:
    """Are these two tokens of a vocabulary?"""
    return (
        type(merge) is list
        and len(merge) == 2
        and all(type(piece) is str and piece in vocabulary for piece in merge)
    )


def _read_merges(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; {ADVICE}") from error
    if not lines:
        raise UserError(f"there is no file {path}; {ADVICE}")
    start = 1 if lines[0].startswith("#version") else 0
    return [line.split(" ") for line in lines[start:] if line]


def _token(value: object, path: Path, key: str) -> str | dict:
    """A special token: its text, or what is known of it as an added one."""
    if type(value) is str:
        return value
    if wrong := misfit(value, {"content": str}, key):
        raise UserError(f"{path}: {wrong}; {ADVICE}")
    flags = {flag: value[flag] for flag in FLAGS if type(value.get(flag)) is bool}
    return {"__type": "AddedToken", "content": value["content"]} | flags


def _read_added(
    folder: Path, whole: Mapping, config: Mapping, vocabulary: Mapping[str, int]
) -> dict[str, dict]:
    """Tokens that were added to the vocabulary, such as ``<asset0>``, by their numbers."""
    found: dict[int, dict] = {}
    listed = whole.get("added_tokens", [])
    kept = config.get("added_tokens_decoder", {})
    also = _read_optional(folder / "added_tokens.json")
    for name, value in (("tokenizer.json", listed), (TOKENIZER_CONFIG, kept)):
        if type(value) is not (list if value is listed else dict):
            raise UserError(f"{folder / name}: its added tokens are none; {ADVICE}")
    pairs = [(each.get("id") if type(each) is dict else None, each) for each in listed]
    pairs += [(int(number) if number.isdecimal() else None, each) for number, each in kept.items()]
    pairs += [(number, {"content": text}) for text, number in also.items()]
    for number, each in pairs:
        if type(number) is not int or not 0 <= number < MOST_TOKENS or len(found) > MOST_TOKENS:
            raise UserError(f"{folder} adds a token of the number {str(number)[:40]}; {ADVICE}")
        token = _token(each, folder / TOKENIZER_CONFIG, f"added token {number}")
        token = {"content": token} if type(token) is str else token
        if vocabulary.get(token["content"], number) == number:
            found[number] = {key: value for key, value in token.items() if key != "__type"}
    return {str(number): found[number] for number in sorted(found)}
