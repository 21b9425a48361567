"""What a LoRA, a model or a file has wrong."""


class LoraError(ValueError):
    """A LoRA, a LoRA file or a choice of layers that cannot be used: one sentence on why."""


def shown(value: object, limit: int = 100) -> str:
    """A value of a file as a message shows it: cut where it is long, and of a list its kind."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
