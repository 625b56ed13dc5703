"""DDIM, and ancestral samplers, which add noise."""

from __future__ import annotations

import math

from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination, data, epsilon, noise, state
from drp.sampling.solvers.base import Solver


class DDIM(Solver):
    """DDIM (Song et al. 2021, equation 12): x_b = alpha_b data + sqrt(sigma_b^2 - s^2) epsilon + s noise.

    s = eta sigma_b / sigma_a sqrt(1 - alpha_a^2 / alpha_b^2). With eta = 0 there is no noise, and the step equals
    Euler's in sigma / alpha, first-order DPM-Solver and first-order DEIS; on a flow-matching grid it is Euler's there.
    """

    def __init__(self, grid: Grid, prediction_type: str = "epsilon", eta: float = 0.0) -> None:
        super().__init__(grid, prediction_type)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; give 0 (no noise) to 1 (as much as DDPM)")
        self.eta = eta
        self.adds_noise = eta > 0

    def step(self, k: int) -> LinearCombination:
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.grid.landing(k)
        s = self.eta * sigma_b / sigma * math.sqrt(max(0.0, 1 - (alpha / alpha_b) ** 2))
        return {data(k): alpha_b, epsilon(k): math.sqrt(max(0.0, sigma_b**2 - s**2)), noise(k): s}


class DDPM(Solver):
    """DDPM's ancestral sampling (Ho et al. 2020, equations 6 and 7).

    variance: "small", the posterior's, or "large", the step's beta. The step from timestep 0 adds no noise.
    """

    adds_noise = True

    def __init__(self, grid: Grid, prediction_type: str = "epsilon", variance: str = "small") -> None:
        super().__init__(grid, prediction_type)
        if variance not in ("small", "large"):
            raise ValueError(
                f"variance is {variance!r}; choose 'small' or 'large' (a learnt one is not linear in the output)"
            )
        self.variance = variance

    def step(self, k: int) -> LinearCombination:
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        beta = 1 - (alpha / alpha_b) ** 2
        kept = (sigma_b / sigma) ** 2
        variance = beta * kept if self.variance == "small" else beta
        fresh = math.sqrt(variance) if self.grid.timesteps[k] > 0 else 0.0
        return {data(k): alpha_b * beta / sigma**2, state(k): alpha / alpha_b * kept, noise(k): fresh}


class EulerAncestral(Solver):
    """Euler in sigma / alpha to below the next noise level, then noise up to that level (Crowson's k-diffusion)."""

    adds_noise = True

    def step(self, k: int) -> LinearCombination:
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        rho, rho_b = sigma / alpha, sigma_b / alpha_b
        up = rho_b * math.sqrt(max(0.0, 1 - (rho_b / rho) ** 2))
        down = math.sqrt(max(0.0, rho_b**2 - up**2))
        return {data(k): alpha_b, epsilon(k): alpha_b * down, noise(k): alpha_b * up}
