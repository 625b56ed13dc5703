"""DDIM and what it is equal to."""

from __future__ import annotations

from drp.sampling.rows import Row, data, epsilon
from drp.sampling.solvers.base import Solver


class DDIM(Solver):
    """DDIM without noise (Song et al. 2021, equation 12 with eta = 0): x_b = alpha_b data_a + sigma_b epsilon_a."""

    def step(self, k: int) -> Row:
        """Return the row of x_{k+1}."""
        return {data(k): float(self.grid.alphas[k + 1]), epsilon(k): float(self.grid.sigmas[k + 1])}
