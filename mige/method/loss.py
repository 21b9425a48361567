"""The training loss: noise, and how the variance is to be interpolated (MIGE, section 3.4).

It is that of improved diffusion models (Nichol and Dhariwal, arXiv 2102.09672) with its own tables.
Axes: b samples, c latent channels, h and w latent rows and columns.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mige.method.schedule import make_betas

#: Values are compared as if latents were pictures in [-1, 1] of 256 levels.
HALF_LEVEL = 1 / 255
EDGE = 0.999
LEAST = 1e-12  # of a probability


class Terms(NamedTuple):
    """Each sample's terms, float32 [b]: squared error, variational bound in bits, their sum."""

    mse: Tensor
    bound: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Diffusion:
    """The forward process, and what a model says of it (see :mod:`mige.method.schedule`)."""

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    @classmethod
    def of(cls, scheduler) -> "Diffusion":
        """That of a :class:`~mige.method.sampler.ContinuousDPMSolver`."""
        config = scheduler.config
        return cls(
            config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule,
            config.prediction_type,
        )  # fmt: skip

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ x₀ + √(1 − ᾱ) n, for latents [b, c, h, w] and timesteps int [b]."""
        table = _table(self)
        return (
            _at(table["alpha_bar"].sqrt(), timesteps, clean) * clean
            + _at((1 - table["alpha_bar"]).sqrt(), timesteps, clean) * noise
        )

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model is to predict, [b, c, h, w]: the noise n, or v = √ᾱ n − √(1 − ᾱ) x₀."""
        if self.prediction_type == "epsilon":
            return noise
        return self.noised(noise, -clean, timesteps)

    def noise_in(self, noised: Tensor, timesteps: Tensor, predicted: Tensor) -> Tensor:
        """The noise e that a model means, [b, c, h, w]: its prediction, or √ᾱ v + √(1 − ᾱ) x_t."""
        if self.prediction_type == "epsilon":
            return predicted
        return self.noised(predicted, noised, timesteps)

    def loss(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        predicted: Tensor,
        variance: Tensor,
    ) -> Terms:
        """mean (target − prediction)² + the bound of step t, in which the prediction is held fixed.

        The error of v is that of the noise over ᾱ: it tells as much of the noisiest steps as of all
        others, where instructions alone say what is to be painted.

        Args:
            clean, noise: x₀ and n, [b, c, h, w].
            timesteps: int [b].
            predicted, variance: the model's outputs, [b, c, h, w]; the variance from −1 (the
                posterior's) to 1 (β).
        """
        mse = _mean((self.target(clean, noise, timesteps) - predicted).square())
        noised = self.noised(clean, noise, timesteps)
        meant = self.noise_in(noised, timesteps, predicted.detach())
        bound = self.bound(clean, noised, timesteps, meant, variance)
        return Terms(mse, bound, mse + bound)

    def bound(
        self, clean: Tensor, noised: Tensor, timesteps: Tensor, predicted: Tensor, variance: Tensor
    ) -> Tensor:
        """The variational bound of a step, in bits a value, [b].

        KL(q(x_{t−1} | x_t, x₀) ‖ p(x_{t−1} | x_t)), and at t = 0 −log p(x₀ | x₁).
        """
        table = _table(self)

        def at(name: str) -> Tensor:
            return _at(table[name], timesteps, clean)

        restored = at("restore_noised") * noised - at("restore_noise") * predicted
        mean = at("mean_clean") * restored + at("mean_noised") * noised
        true_mean = at("mean_clean") * clean + at("mean_noised") * noised
        share = (variance + 1) / 2
        log_variance = share * at("log_beta") + (1 - share) * at("log_posterior")
        divergence = gaussian_divergence(true_mean, at("log_posterior"), mean, log_variance)
        likelihood = discretised_likelihood(clean, mean, log_variance / 2)
        is_last = (timesteps == 0).to(clean.device)
        bits = torch.where(is_last, -_mean(likelihood), _mean(divergence))
        return bits / math.log(2)


def gaussian_divergence(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL of a normal distribution from another, in nats, value by value."""
    return 0.5 * (
        -1.0
        + other_log_variance
        - log_variance
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
    )


def discretised_likelihood(values: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log p of values that stand for 256 levels in [-1, 1], under a normal distribution.

    Its distribution function is taken from tanh (√(2/π) (z + 0.044715 z³)); the lowest and the
    highest level reach to infinity.
    """
    inverse, centred = (-log_deviation).exp(), values - mean

    def below(edge: float) -> Tensor:
        z = inverse * (centred + edge)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    low, high = below(-HALF_LEVEL), below(HALF_LEVEL)
    chosen = torch.where(values < -EDGE, high, torch.where(values > EDGE, 1 - low, high - low))
    return chosen.clamp(min=LEAST).log()


@cache
def _table(diffusion: Diffusion) -> dict[str, Tensor]:
    """What the process says of each timestep, float64 [timesteps]."""
    betas = torch.from_numpy(
        make_betas(
            diffusion.beta_schedule, diffusion.beta_start, diffusion.beta_end, diffusion.timesteps
        )
    )
    alpha_bar = (1 - betas).cumprod(0)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    posterior = betas * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]  # which is 0, and has no logarithm
    return {
        "alpha_bar": alpha_bar,
        "log_beta": betas.log(),
        "log_posterior": posterior.log(),
        "restore_noised": (1 / alpha_bar).sqrt(),
        "restore_noise": (1 / alpha_bar - 1).sqrt(),
        "mean_clean": betas * before.sqrt() / (1 - alpha_bar),
        "mean_noised": (1 - before) * (1 - betas).sqrt() / (1 - alpha_bar),
    }


def _at(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Float32 [b, 1, 1, 1] values of a table at timesteps [b], where another tensor is."""
    return table[timesteps.cpu()].float().to(like.device)[:, None, None, None]


def _mean(values: Tensor) -> Tensor:
    """[b], over c, h and w."""
    return values.flatten(1).mean(1)
