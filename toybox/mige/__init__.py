"""A very small MIGE of the full one's classes, trained on triplets of toys."""

from pathlib import Path

#: The model folder that ships.
FOLDER = Path(__file__).parent / "weights"
