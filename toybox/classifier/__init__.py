"""A small classifier of the kinds and hues of toys in pictures."""
