"""DPM-Solver++(2M) on the release's own times (Lu et al., arXiv 2211.01095).

diffusers' solver rounds times to whole training steps. The release goes through continuous ones,
between which log α is piecewise linear; with these the same solver gives the same latents.
"""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.configuration_utils import register_to_config

from mige.method.schedule import make_betas

LAST_TIME = 1e-3  # where sampling ends; 1 is pure noise
FEW_STEPS = 10  # below which the last step is of first order


class ContinuousDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++(2M) whose times are t = linspace(1, 0.001, steps + 1).

    The model sees 1000 t − 1, a float, at all but the last of them.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type="sigma_min",
            timestep_spacing="linspace",
            lambda_min_clipped=-1e9,  # nothing is clipped; JSON has no infinity
        )

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Lay out the steps, in :attr:`timesteps` [steps] and :attr:`sigmas` [steps + 1]."""
        super().set_timesteps(num_inference_steps, device=device)
        times = np.linspace(1.0, LAST_TIME, num_inference_steps + 1)
        alpha, sigma = self.schedule(times)
        self.sigmas = torch.from_numpy(sigma / alpha).float()
        total = self.config.num_train_timesteps
        self.timesteps = torch.from_numpy(total * times[:-1] - 1).float().to(device)
        self.register_to_config(lower_order_final=num_inference_steps < FEW_STEPS)
        self.set_begin_index(0)

    def schedule(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """α and σ [n] at continuous times [n] from 0 to 1, float64.

        log α goes piecewise linearly through ((i + 1) / steps, ½ log ᾱᵢ).
        """
        config = self.config
        total = config.num_train_timesteps
        betas = make_betas(config.beta_schedule, config.beta_start, config.beta_end, total)
        knots = 0.5 * np.log1p(-betas).cumsum()
        log_alpha = np.interp(times, np.arange(1, total + 1) / total, knots)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
