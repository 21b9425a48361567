"""A training loop that knows no paper: steps, checkpoints, Ctrl-C, resuming, curves, seeds."""
