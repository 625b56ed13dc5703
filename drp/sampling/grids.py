"""Grids: the timesteps of a run, and how much signal and noise a state has at each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]

TRAINING_STEPS = 1000


def scaled_linear_alpha_bars(beta_start: float = 0.00085, beta_end: float = 0.012) -> Float64s:
    """Return alpha-bar of the 1,000 training timesteps: float64 [1000], falling from near 1 to near 0.

    The square roots of the betas are evenly spaced (Rombach et al. 2022, the schedule of Stable Diffusion).
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, TRAINING_STEPS, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float64)


@dataclass(frozen=True)
class Grid:
    """The N steps of a run, at indices 0..N.

    `timesteps` are t_0 > ... > t_{N-1}, float64 [N]: where the denoiser is evaluated. `alphas` and `sigmas` are
    float64 [N + 1]: the state at index k is `alphas[k] * data + sigmas[k] * noise`. Index N is the sample itself.
    """

    timesteps: Float64s
    alphas: Float64s
    sigmas: Float64s

    @property
    def steps(self) -> int:
        """N."""
        return len(self.timesteps)

    @property
    def lambdas(self) -> Float64s:
        """log(alpha / sigma) at 0..N: half the log of the signal-to-noise ratio; infinite where there is no noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)


def scaled_linear(steps: int) -> Grid:
    """Return `steps` timesteps spread evenly over the scaled-linear schedule, the last training timestep first.

    The spacing is "trailing" (Lin et al. 2024, table 2); the end is free of noise: alpha_N = 1, sigma_N = 0.
    """
    if not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"steps is {steps}; choose 1 to {TRAINING_STEPS}, the number of training timesteps")
    timesteps = np.round(np.arange(steps, 0, -1) * (TRAINING_STEPS / steps)) - 1
    alpha_bars = np.append(scaled_linear_alpha_bars()[timesteps.astype(np.int64)], 1.0)
    return Grid(timesteps, np.sqrt(alpha_bars), np.sqrt(1.0 - alpha_bars))
