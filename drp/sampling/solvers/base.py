"""The base class of solvers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination
from drp.sampling.predictions import estimates


class Solver(ABC):
    """The single steps on a grid, of which skip transitions are composed (`drp.sampling.plan.transition`).

    The state has the coordinates of the network's input, x_k = alpha_k data + sigma_k noise. Solvers that are usually
    written in other coordinates (x / alpha for Euler) are rewritten, so that inputs need no scaling.

    history: the number of indices before k that the step from k uses.
    adds_noise: whether steps add noise.
    prediction_type: what the network predicts (`drp.sampling.predictions`).
    """

    history: int = 0
    adds_noise: bool = False

    def __init__(self, grid: Grid, prediction_type: str = "epsilon") -> None:
        self.grid = grid
        self.prediction_type = prediction_type
        for k in range(grid.steps):
            estimates(prediction_type, *self.at(k))  # Raises ValueError if a prediction does not determine the data.

    @abstractmethod
    def step(self, k: int) -> LinearCombination:
        """Return x_{k+1} as a linear combination, 0 <= k < N.

        Its terms are states, data and epsilon estimates at k and up to `history` indices before, and `noise(k)`, the
        standard normal numbers drawn for this step.
        """

    def stands_still(self, k: int) -> bool:
        """Whether the step from k ends at the same noise level, up to rounding, so that x_{k+1} = x_k.

        This is so where named sigmas end at the sigma of the first training timestep, and the grid does too.
        """
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        return math.isclose(alpha, alpha_b, rel_tol=1e-13) and math.isclose(sigma, sigma_b, rel_tol=1e-13)

    def at(self, k: int) -> tuple[float, float]:
        return float(self.grid.alphas[k]), float(self.grid.sigmas[k])


def order_at(k: int, steps: int, order: int, lower_at_end: bool) -> int:
    """Return the order of a multistep solver at step k, where there are k earlier estimates.

    With `lower_at_end`, the last step is of first order, and the step before it of second order at most.
    """
    return min(order, k + 1, steps - k if lower_at_end else order)
