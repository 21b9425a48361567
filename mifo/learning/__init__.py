"""Semantic learning: from one photo with masks to a learned folder."""
