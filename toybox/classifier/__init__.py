"""A small classifier that tells kinds and hues of toys in pictures."""
