"""Schedules: how much signal is left at each training timestep, and how noise levels are spread over a run."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]

TRAINING_STEPS = 1000

KARRAS_RHO = 7.0
"""What Karras et al. 2022 and diffusers' schedulers use."""

RHO_RANGE = (0.1, 1000.0)
"""Beyond this range, powers of the noise levels overflow or become equal."""

SCHEDULE_NAMES = ("linear", "scaled_linear", "cosine")


def scaled_linear_alpha_bars(beta_start: float = 0.00085, beta_end: float = 0.012) -> Float64s:
    """Return alpha-bar of the 1,000 training timesteps: float64 [1000], falling from near 1 to near 0.

    The square roots of the betas are evenly spaced (Rombach et al. 2022, the schedule of Stable Diffusion).
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, TRAINING_STEPS, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float64)


def linear_alpha_bars(beta_start: float = 0.0001, beta_end: float = 0.02) -> Float64s:
    """Return alpha-bar where the betas are evenly spaced (Ho et al. 2020): float64 [1000]."""
    return np.cumprod(1.0 - np.linspace(beta_start, beta_end, TRAINING_STEPS, dtype=np.float64), dtype=np.float64)


def cosine_alpha_bars(largest_beta: float = 0.999) -> Float64s:
    """Return alpha-bar of the squared cosine (Nichol and Dhariwal 2021, equation 17): float64 [1000]."""
    t = np.arange(TRAINING_STEPS + 1, dtype=np.float64) / TRAINING_STEPS
    curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1.0 - np.minimum(1 - curve[1:] / curve[:-1], largest_beta), dtype=np.float64)


def zero_terminal_snr(alpha_bars: Float64s) -> Float64s:
    """Shift and scale so that the last timestep holds no signal (Lin et al. 2024, algorithm 1)."""
    roots = np.sqrt(alpha_bars)
    return np.asarray(((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2, dtype=np.float64)


def alpha_bars(schedule: str | Float64s, zero_snr: bool = False) -> Float64s:
    """Return a schedule by name, or check one of the caller's own: float64 [T], falling, within [0, 1]."""
    if isinstance(schedule, str):
        match schedule:
            case "linear":
                values = linear_alpha_bars()
            case "scaled_linear":
                values = scaled_linear_alpha_bars()
            case "cosine":
                values = cosine_alpha_bars()
            case _:
                raise ValueError(
                    f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULE_NAMES)}, or give alpha-bar of "
                    "every training timestep"
                )
    else:
        values = np.asarray(schedule, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2 or not (np.all(np.diff(values) < 0) and 0 <= values[-1] < values[0] < 1):
            raise ValueError(
                "schedule is not a decreasing sequence of numbers between 0 and 1; give alpha-bar: cumprod(1 - beta)"
            )
    return zero_terminal_snr(values) if zero_snr else values


def karras(low: float, high: float, steps: int, rho: float = KARRAS_RHO) -> Float64s:
    """Spread noise levels evenly in sigma^(1/rho) (Karras et al. 2022, equation 5): float64 [steps], falling."""
    if not RHO_RANGE[0] <= rho <= RHO_RANGE[1]:
        raise ValueError(f"rho is {rho}; give a number from {RHO_RANGE[0]:g} to {RHO_RANGE[1]:g}, 7 is usual")
    ramp = np.linspace(0, 1, steps)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, dtype=np.float64)


def exponential(low: float, high: float, steps: int) -> Float64s:
    """Spread noise levels evenly in log sigma: float64 [steps], falling."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(low: float, high: float, steps: int, a: float = 0.6, b: float = 0.6) -> Float64s:
    """Spread noise levels as quantiles of a Beta distribution (Lee et al. 2024): float64 [steps], falling.

    The quantile function is SciPy's, which drp does not otherwise need; ValueError if it is not installed.
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError:
        raise ValueError("sigmas is 'beta', which needs SciPy; pip install scipy, or choose 'karras'") from None
    quantiles = distribution.ppf(1 - np.linspace(0, 1, steps), a, b)
    return np.asarray(low + quantiles * (high - low), dtype=np.float64)


SIGMAS = {"karras": karras, "exponential": exponential, "beta": beta}


def spread(name: str, low: float, high: float, steps: int, rho: float = KARRAS_RHO) -> Float64s:
    """Return noise levels by the name of their spacing, `rho` being Karras'; ValueError for an unknown one."""
    if name not in SIGMAS:
        raise ValueError(f"unknown sigmas {name!r}; choose one of {', '.join(SIGMAS)}, or give numbers")
    return karras(low, high, steps, rho) if name == "karras" else SIGMAS[name](low, high, steps)
