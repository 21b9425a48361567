"""Rendered toy scenes with exact masks and true captions, from a seed."""
