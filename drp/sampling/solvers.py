"""Solvers: the transitions Phi(x, predictions, a -> b) as rows of coefficients."""

from __future__ import annotations

from typing import Protocol

from drp.sampling.grids import Grid
from drp.sampling.rows import Row, prediction, state


class Solver(Protocol):
    """What a mode needs of a solver: a grid, and the row of every transition on it."""

    @property
    def grid(self) -> Grid:
        """The timesteps of the run."""
        ...

    def transition(self, a: int, b: int) -> Row:
        """Return x_b as a row over x_a and predictions at indices up to a, for 0 <= a < b <= N."""
        ...


class DDIM:
    """DDIM without noise (Song et al. 2021, equation 12 with eta = 0), for networks that predict the noise.

    x_b = (alpha_b / alpha_a) x_a + (sigma_b - sigma_a alpha_b / alpha_a) eps_a, for any b > a: its skip transitions
    are the same formula over a longer way.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def transition(self, a: int, b: int) -> Row:
        """Return the row of Phi(x_a, eps_a, a -> b)."""
        assert 0 <= a < b <= self.grid.steps
        scale = float(self.grid.alphas[b] / self.grid.alphas[a])
        return {state(a): scale, prediction(a): float(self.grid.sigmas[b] - self.grid.sigmas[a] * scale)}
