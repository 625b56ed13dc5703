"""What every solver is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination
from drp.sampling.predictions import estimates


class Solver(ABC):
    """The ordinary steps on a grid; longer ones are made of them (`drp.sampling.plan.transition`).

    The state is in the coordinates in which the network takes it, x_k = alpha_k data + sigma_k noise, so a solver that
    is usually written in others (x / alpha for Euler's) is written in these here, and nothing has to scale inputs.
    `history` is how many indices before k the step from k uses, `adds_noise` whether it draws any, `prediction_type`
    what the network predicts (`drp.sampling.predictions`).
    """

    history: int = 0
    adds_noise: bool = False

    def __init__(self, grid: Grid, prediction_type: str = "epsilon") -> None:
        self.grid = grid
        self.prediction_type = prediction_type
        for k in range(grid.steps):
            estimates(prediction_type, *self.at(k))  # refuses what says nothing of the data

    @abstractmethod
    def step(self, k: int) -> LinearCombination:
        """Return x_{k+1} as a row over states, data and epsilon estimates at k and up to `history` before, and noise.

        `noise(k)` are standard normal numbers, drawn for this step alone. 0 <= k < N.
        """

    def stands_still(self, k: int) -> bool:
        """Whether the step from k leads to the same noise level again, to rounding: x_{k+1} = x_k.

        It is so where named sigmas end at that of the first training timestep, and the grid does too.
        """
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        return math.isclose(alpha, alpha_b, rel_tol=1e-13) and math.isclose(sigma, sigma_b, rel_tol=1e-13)

    def at(self, k: int) -> tuple[float, float]:
        """Return alpha and sigma at an index."""
        return float(self.grid.alphas[k]), float(self.grid.sigmas[k])


def order_at(k: int, steps: int, order: int, lower_at_end: bool) -> int:
    """Return the order that a multistep solver uses at step k: it has k earlier estimates.

    `lower_at_end`: the last step is of first order, the one before of second at most.
    """
    return min(order, k + 1, steps - k if lower_at_end else order)
