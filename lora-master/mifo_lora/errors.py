"""What a LoRA, a model or a file has wrong."""


class LoraError(ValueError):
    """A LoRA, a file of one or a choice of layers that cannot be used: one sentence that says why."""
