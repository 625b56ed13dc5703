"""Solvers that fit a polynomial to the last noise estimates: linear multistep, DEIS, pseudo-numerical methods, Heun."""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.polynomial import Polynomial

from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination, add, epsilon, state
from drp.sampling.solvers.base import Solver, order_at

SHORT_RUN = 15
"""In runs of fewer steps, the last steps of DEIS are of lower order."""

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the last one to four derivatives, the newest first."""


def _lagrange(nodes: Sequence[float], j: int) -> Polynomial:
    """Return the polynomial that is 1 at node j and 0 at the others."""
    product = Polynomial([1.0])
    for i, node in enumerate(nodes):
        if i != j:
            product = product * Polynomial([-node, 1.0]) / (nodes[j] - node)
    return product


class LinearMultistep(Solver):
    """Linear multistep in rho = sigma / alpha (Crowson's k-diffusion): d(x / alpha) / d rho = epsilon.

    The polynomial through the last `order` noise estimates, integrated exactly.
    """

    def __init__(self, grid: Grid, prediction_type: str = "epsilon", order: int = 4) -> None:
        super().__init__(grid, prediction_type)
        if not 1 <= order <= 8:
            raise ValueError(f"order is {order}; choose 1 to 8")
        self.order, self.history = order, order - 1
        self._rhos = (grid.sigmas / grid.alphas).tolist()

    def step(self, k: int) -> LinearCombination:
        if self.stands_still(k):
            return {state(k): 1.0}
        (alpha, _), (alpha_b, _) = self.at(k), self.at(k + 1)
        order = min(self.order, k + 1)
        start, end = self._rhos[k], self._rhos[k + 1]
        # Nodes are relative to the step's start, in units of its length: high powers of rho itself would cancel.
        nodes = [(self._rhos[k - j] - start) / (end - start) for j in range(order)]
        areas = [float(_lagrange(nodes, j).integ()(1.0)) * (end - start) for j in range(order)]
        return add(
            (alpha_b / alpha, {state(k): 1.0}), *((alpha_b * c, {epsilon(k - j): 1.0}) for j, c in enumerate(areas))
        )


class DEIS(Solver):
    """DEIS (Zhang and Chen 2023), with the polynomial through the noise estimates in log rho, rho = sigma / alpha.

    order: 1 to 3.
    lower_order_final: in runs of fewer than 15 steps, the last steps are of lower order. A step to zero noise is always
        of first order.
    """

    def __init__(
        self, grid: Grid, prediction_type: str = "epsilon", order: int = 2, lower_order_final: bool = True
    ) -> None:
        super().__init__(grid, prediction_type)
        if order not in (1, 2, 3):
            raise ValueError(f"order is {order}; choose 1, 2 or 3")
        self.order, self.history, self.lower_order_final = order, order - 1, lower_order_final
        self._logs = (-grid.lambdas).tolist()

    def step(self, k: int) -> LinearCombination:
        if self.stands_still(k):
            return {state(k): 1.0}
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        n = self.grid.steps
        order = 1 if sigma_b == 0 else order_at(k, n, self.order, self.lower_order_final and n < SHORT_RUN)
        rho, rho_b = sigma / alpha, sigma_b / alpha_b
        if order == 1:
            areas = [rho_b - rho]
        else:
            # With u = log(rho_t / rho_k), the integral over rho is rho_k times that of e^u p(u) over u.
            nodes = [self._logs[k - j] - self._logs[k] for j in range(order)]
            end = self._logs[k + 1] - self._logs[k]
            areas = [rho * _exponential_area(_lagrange(nodes, j), end) for j in range(order)]
        return add(
            (alpha_b / alpha, {state(k): 1.0}), *((alpha_b * c, {epsilon(k - j): 1.0}) for j, c in enumerate(areas))
        )


def _exponential_area(p: Polynomial, end: float) -> float:
    """Integrate e^u p(u) from 0 to `end`: e^u (p - p' + p'' - ...)."""
    primitive, derivative = Polynomial([0.0]), p
    for i in range(len(p.coef)):
        primitive = primitive + (-1) ** i * derivative
        derivative = derivative.deriv()
    return float(math.exp(end) * primitive(end) - primitive(0.0))


class IPNDM(Solver):
    """The improved pseudo-numerical method: DDIM with an Adams-Bashforth mean of the last noise estimates, up to 4.

    (Liu et al. 2022, without the Runge-Kutta start.) If the first state has no signal, its data estimate is 0.
    """

    history = 3

    def step(self, k: int) -> LinearCombination:
        weights = ADAMS_BASHFORTH[min(k, 3)]
        mean: LinearCombination = {epsilon(k - j): weight for j, weight in enumerate(weights)}
        return _ddim(self.at(k), self.grid.landing(k), k, mean)


class PNDM(Solver):
    """Pseudo linear multistep (Liu et al. 2022) with a Heun step at the start, for networks that predict the noise.

    The grid is of family "pndm", which has the second timestep twice.
    """

    history = 4

    def __init__(self, grid: Grid, prediction_type: str = "epsilon") -> None:
        super().__init__(grid, prediction_type)
        if prediction_type != "epsilon":
            raise ValueError(
                f"prediction_type is {prediction_type!r}; PNDM averages raw outputs, which only means something for "
                "'epsilon'; choose 'ipndm', which averages noise estimates"
            )

    def step(self, k: int) -> LinearCombination:
        if k == 1:
            return _ddim(self.at(0), self.grid.landing(1), 0, {epsilon(0): 0.5, epsilon(1): 0.5})
        previous = [j for j in range(k, -1, -1) if j != 1][:4]  # Only the Heun step uses the prediction at 1.
        mean: LinearCombination = {
            epsilon(j): weight for j, weight in zip(previous, ADAMS_BASHFORTH[len(previous) - 1], strict=True)
        }
        return _ddim(self.at(k), self.grid.landing(k), k, mean)


def _ddim(here: tuple[float, float], there: tuple[float, float], k: int, mean: LinearCombination) -> LinearCombination:
    """Return DDIM's step from x_k with the noise `mean`."""
    (alpha, sigma), (alpha_b, sigma_b) = here, there
    scale = alpha_b / alpha if alpha > 1e-8 else 0.0
    return add((scale, {state(k): 1.0}), (sigma_b - scale * sigma, mean))


class Heun(Solver):
    """Heun's method in rho = sigma / alpha (Karras et al. 2022, algorithm 1), on a grid of family "heun".

    Each noise level is there twice. The step from the second of them starts again from the previous level, with the
    mean of the noise estimates at both ends. The last step, to zero noise, is Euler's.
    """

    history = 1

    def step(self, k: int) -> LinearCombination:
        (alpha_b, sigma_b), start = self.at(k + 1), k - k % 2
        alpha, sigma = self.at(start)
        if k % 2 == 0:
            mean: LinearCombination = {epsilon(k): 1.0}
        else:
            mean = {epsilon(start): 0.5, epsilon(k): 0.5}
        change = alpha_b * (sigma_b / alpha_b - sigma / alpha)
        return add((alpha_b / alpha, {state(start): 1.0}), (change, mean))
