"""How much noise each timestep has.

The released model has betas in equal steps, and predicts the noise. Two usual choices of latent
diffusion are there for models that are trained anew: betas whose roots are in equal steps (Rombach
et al., arXiv 2112.10752), and the prediction of v = α n − σ x₀ (Salimans and Ho, arXiv 2202.00512).
"""

import numpy as np

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")


def make_betas(schedule: str, start: float, end: float, timesteps: int) -> np.ndarray:
    """β of each timestep, float64 [timesteps], from ``start`` to ``end``."""
    if schedule == "linear":
        return np.linspace(start, end, timesteps)
    return np.linspace(start**0.5, end**0.5, timesteps) ** 2
