"""Whether MIGE's tasks help each other, and what its pictures are for: the paper's ablations."""
