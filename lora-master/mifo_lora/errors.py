"""What a LoRA, a model or a file has wrong."""


class LoraError(ValueError):
    """A LoRA, a LoRA file or a choice of layers that cannot be used: one sentence on why."""
