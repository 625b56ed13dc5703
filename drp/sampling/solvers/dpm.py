"""Multistep DPM-Solver and DPM-Solver++, for the ordinary and the stochastic differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable

from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination, Symbol, add, data, epsilon, noise, state
from drp.sampling.solvers.base import Solver, order_at

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SHORT_RUN = 15
"""In runs of fewer steps, the last steps are of lower order."""


class DPMSolver(Solver):
    """DPM-Solver++ (Lu et al. 2022b, algorithm 2 and appendix B) and DPM-Solver (Lu et al. 2022a), multistep.

    The exponential integrator in lambda: x_b = base x_a + c (D0 + D1 (...) + D2 (...)), where D1 and D2 are the first
    and second divided differences of the data estimates (the epsilon estimates without ++), times h.

    order: 1 to 3, as far as there are earlier estimates.
    lower_order_final: in runs of fewer than 15 steps, the last step is of first order, and the one before of second.
        A step to zero noise is always of first order.
    variant: "midpoint" or "heun", the weight of the second-order term.
    """

    def __init__(
        self,
        grid: Grid,
        prediction_type: str = "epsilon",
        order: int = 2,
        algorithm: str = "dpmsolver++",
        variant: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
    ) -> None:
        super().__init__(grid, prediction_type)
        if order not in (1, 2, 3):
            raise ValueError(f"order is {order}; choose 1, 2 or 3")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {algorithm!r}; choose one of {', '.join(ALGORITHMS)}")
        if variant not in ("midpoint", "heun"):
            raise ValueError(f"variant is {variant!r}; choose 'midpoint' or 'heun'")
        if algorithm.startswith("sde") and order == 3:
            raise ValueError(f"order is 3, which {algorithm} does not have; choose 1 or 2, or dpmsolver++")
        if not algorithm.endswith("++") and grid.sigmas[-1] == 0:
            raise ValueError(f"{algorithm} divides by the last sigma, which is 0; make the grid with end='sigma_min'")
        self.order, self.algorithm, self.variant = order, algorithm, variant
        self.lower_order_final, self.euler_at_final = lower_order_final, euler_at_final
        self.history = order - 1
        self.adds_noise = algorithm.startswith("sde")
        self._lambdas = grid.lambdas.tolist()

    def step(self, k: int) -> LinearCombination:
        if self.stands_still(k):
            return {state(k): 1.0}
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        h = self._lambdas[k + 1] - self._lambdas[k]
        shrink = sigma_b * alpha / (alpha_b * sigma)  # e^-h, which is finite even where lambda is not
        term: Callable[[int], Symbol] = data
        match self.algorithm:
            case "dpmsolver++":
                base, c, weights = sigma_b / sigma, alpha_b * (1 - shrink), _weights(-h)
                fresh = 0.0
            case "sde-dpmsolver++":
                base, c, weights = sigma_b / sigma * shrink, alpha_b * (1 - shrink**2), _weights(-2 * h)
                fresh = sigma_b * math.sqrt(1 - shrink**2)
            case "dpmsolver":
                base, c, weights = alpha_b / alpha, -sigma_b * math.expm1(h), _weights(h)
                fresh, term = 0.0, epsilon
            case _:
                base, c, weights = alpha_b / alpha, -2 * sigma_b * math.expm1(h), _weights(h)
                fresh, term = sigma_b * math.sqrt(math.expm1(2 * h)), epsilon
        order = self._order_at(k)
        differences = self._differences(k, order, h, term)
        row: list[tuple[float, LinearCombination]] = [
            (base, {state(k): 1.0}),
            (c, {term(k): 1.0}),
            (fresh, {noise(k): 1.0}),
        ]
        if order == 2 and self.variant == "midpoint":
            row.append((c / 2, differences[0]))
        else:
            row.extend((c * weight, difference) for weight, difference in zip(weights, differences, strict=False))
        return add(*row)

    def _order_at(self, k: int) -> int:
        n = self.grid.steps
        if k == n - 1 and (self.euler_at_final or self.grid.sigmas[n] == 0):
            return 1
        return order_at(k, n, self.order, self.lower_order_final and n < SHORT_RUN)

    def _differences(self, k: int, order: int, h: float, term: Callable[[int], Symbol]) -> list[LinearCombination]:
        """Return D1 and D2, as far as the order needs them."""
        if order == 1:
            return []
        r = [(self._lambdas[k - j] - self._lambdas[k - j - 1]) / h for j in range(order - 1)]
        first = [add((1 / r[j], {term(k - j): 1.0, term(k - j - 1): -1.0})) for j in range(order - 1)]
        if order == 2:
            return first
        bend = add((1.0, first[0]), (-1.0, first[1]))
        return [add((1.0, first[0]), (r[0] / (r[0] + r[1]), bend)), add((1 / (r[0] + r[1]), bend))]


def _weights(z: float) -> tuple[float, float]:
    """Return the weights of D1 and D2 relative to D0: phi_2 / phi_1 and phi_3 / phi_1 at z."""
    if math.isinf(z):
        return 0.0, 0.0
    if abs(z) < 1e-4:  # The differences below would cancel.
        return 1 / 2 - z / 12, 1 / 6 - z / 24
    whole = math.expm1(z)
    return (whole / z - 1) / whole, ((whole - z) / z**2 - 0.5) / whole
