"""A Stable Diffusion small enough to ship: its architecture, training, measures and weights."""

from pathlib import Path

#: The pipeline folder that ships.
FOLDER = Path(__file__).parent / "weights"
