"""A very small MIGE of the full one's classes, trained on triplets of toys."""
