"""The wording of prompts, to the letter: what a trained model was taught to read.

Everything here follows the release, so that its weights see what they have learned.
"""

import re
from collections.abc import Mapping

MARK = "<imagehere>"  # stands where a picture is meant
#: Blanks before something, if there are any. Without looking back, a long run of them would be
#: tried from each of its places.
_BEFORE = r"(?:(?<!\s)\s+)?"
#: How people write a mark, with the blanks around it; the second is not the model's own way.
WRITTEN = re.compile(rf"{_BEFORE}<\s*image(?:\s*here)?\s*>\s*", re.IGNORECASE)
SHORT = re.compile(rf"{_BEFORE}<\s*image\s*>\s*", re.IGNORECASE)
#: What the model does: paint subjects, edit a picture, edit it with a subject.
TASKS = ("subject", "edit", "subject_edit")
#: The sentences before a prompt, which a model's config holds.
PREFIXES = ("subject", "subject_inference", "edit", "subject_edit")
MOST_WORDS = 88
_REMOVED = re.compile(r"[.!\"()*#:;~]")
_BLANKS = re.compile(r"\s{2,}")
#: What calls the source picture, replaced one after the other.
_CALLS = (
    "the image", "this image", "this photo", "the photo", "the picture", "this picture",
)  # fmt: skip
_UNSAFE = re.compile(r'[\\*?:"<>|]')
LONGEST_NAME = 100


def split(prompt: str) -> list[str]:
    """The texts before, between and behind a prompt's marks; one more than there are marks."""
    return prompt.split(MARK)


def readable(text: str) -> str:
    """A prompt for people, with ``<image>`` for each mark."""
    return text.replace(MARK, " <image> ").strip()


def clean(text: str, most: int | None = MOST_WORDS) -> str:
    """Lower case, without some punctuation, blanks joined, at most so many words.

    Words are what single spaces divide: a single tab or newline stays within a word.
    """
    text = _BLANKS.sub(" ", _REMOVED.sub(" ", text.lower())).strip()
    return " ".join(text.split(" ")[:most])


def name_source(instruction: str, is_global: bool = False) -> str:
    """An edit's instruction with a mark for the picture, as MIGE was trained to read it.

    "the image" and its like become the mark. Without one, `` in<imagehere>`` is added, or
    `` of<imagehere>`` where the edit concerns the whole picture.
    """
    for call in _CALLS:
        pattern = rf"{_BEFORE}{call}\s*"
        instruction = re.sub(pattern, f" {MARK} ", instruction, flags=re.IGNORECASE)
    if MARK in instruction:
        return instruction
    return instruction.rstrip(".") + (" of" if is_global else " in") + MARK


def prompt_for(
    task: str,
    text: str,
    prefixes: Mapping[str, str],
    for_training: bool = False,
    most: int | None = MOST_WORDS,
) -> str:
    """The prompt that the tokenizer gets: a task's prefix and the cleaned text.

    In training, and for edits, the prefix stays as it is; for subjects and edits with a subject it
    is cleaned together with the text, and spends some of the 88 words. Subjects have a wording of
    their own for inference.

    Args:
        task: one of :data:`TASKS`.
        prefixes: the sentences, by the names in :data:`PREFIXES`.
        most: words after which a text is cut; None: none.
    """
    if for_training or task == "edit":
        return prefixes[task] + clean(text, most)
    return clean(prefixes["subject_inference" if task == "subject" else task] + text, most)


def safe_name(prompt: str) -> str:
    """A file name out of a prompt, as the release makes it."""
    return _UNSAFE.sub("_", prompt.replace("/", " or "))[:LONGEST_NAME]
