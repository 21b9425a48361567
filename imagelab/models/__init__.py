"""Base models: found, checked and loaded; one module a family."""
