"""A toy MIGE painted from held-out items, judged, and what is written of it."""
