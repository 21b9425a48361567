"""Pictures, masks and tensors: read with care, written whole."""
