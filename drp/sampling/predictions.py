"""Prediction types: how a network's output determines the clean sample and the noise in its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

PREDICTION_TYPES = ("epsilon", "v", "sample", "flow")


class Estimates(NamedTuple):
    """data = data_x x + data_p p, epsilon = epsilon_x x + epsilon_p p, for input x and output p."""

    data_x: float
    data_p: float
    epsilon_x: float
    epsilon_p: float


def _epsilon(alpha: float, sigma: float) -> Estimates:
    """Ho et al. 2020: the output is the noise."""
    return Estimates(1 / alpha, -sigma / alpha, 0.0, 1.0)


def _v(alpha: float, sigma: float) -> Estimates:
    """Salimans and Ho 2022, appendix D: alpha epsilon - sigma data."""
    square = alpha**2 + sigma**2
    return Estimates(alpha / square, -sigma / square, sigma / square, alpha / square)


def _sample(alpha: float, sigma: float) -> Estimates:
    """Read the output as the clean sample."""
    return Estimates(0.0, 1.0, 1 / sigma, -alpha / sigma)


def _flow(alpha: float, sigma: float) -> Estimates:
    """Liu et al. 2023, Lipman et al. 2023: the velocity, epsilon - data."""
    total = alpha + sigma
    return Estimates(1 / total, -sigma / total, 1 / total, alpha / total)


_TYPES: dict[str, Callable[[float, float], Estimates]] = dict(
    zip(PREDICTION_TYPES, (_epsilon, _v, _sample, _flow), strict=True)
)


def estimates(prediction_type: str, alpha: float, sigma: float) -> Estimates:
    """Return how to read a prediction taken where the state is alpha data + sigma noise; sigma is above 0."""
    if prediction_type not in _TYPES:
        raise ValueError(f"unknown prediction type {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    if prediction_type == "epsilon" and alpha == 0:
        raise ValueError(
            "prediction_type is 'epsilon' and the first state holds no signal (alpha 0), where the noise says nothing "
            "of the data; choose a grid without zero-terminal SNR, or a network that predicts v"
        )
    return _TYPES[prediction_type](alpha, sigma)
