"""Semantic synthesis: from a learned folder, a prompt and boxes to pictures."""
