"""UniPC, with its corrector merged into the next step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination, Symbol, add, data, epsilon, state
from drp.sampling.solvers.base import Solver, order_at


class UniPC(Solver):
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), multistep predictor and corrector.

    The network and callbacks get the predicted state. The prediction there corrects it, and the next step starts from
    the corrected state. Predictor and corrector start from the same state, so their difference consists of estimates
    only, and the correction is part of the next step's linear combination.

    order: 1 to 3.
    variant: "bh1" or "bh2", the paper's two choices of B(h).
    of: integrate the "data" or the "epsilon" estimates.
    corrector: False for UniP.
    """

    def __init__(
        self,
        grid: Grid,
        prediction_type: str = "epsilon",
        order: int = 2,
        variant: str = "bh2",
        of: str = "data",
        corrector: bool = True,
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(grid, prediction_type)
        if order not in (1, 2, 3):
            raise ValueError(f"order is {order}; choose 1, 2 or 3")
        if variant not in ("bh1", "bh2"):
            raise ValueError(f"variant is {variant!r}; choose 'bh1' or 'bh2'")
        if of not in ("data", "epsilon"):
            raise ValueError(f"of is {of!r}; choose 'data' or 'epsilon'")
        if of == "epsilon" and grid.sigmas[-1] == 0:
            raise ValueError("of is 'epsilon', which divides by the last sigma, and that is 0; choose 'data'")
        self.order, self.variant, self.of, self.corrector = order, variant, of, corrector
        self.lower_order_final = lower_order_final
        self.history = order if corrector else order - 1
        self._lambdas = grid.lambdas.tolist()
        self._term: Callable[[int], Symbol] = data if of == "data" else epsilon

    def step(self, k: int) -> LinearCombination:
        """Return x_{k+1}, from the state that the prediction at k has corrected."""
        (alpha, sigma), (alpha_b, sigma_b) = self.at(k), self.at(k + 1)
        if self.of == "data":
            base, c = sigma_b / sigma, alpha_b - sigma_b * alpha / sigma
        else:
            base, c = alpha_b / alpha, sigma_b - alpha_b * sigma / alpha
        corrected = add((1.0, {state(k): 1.0}), (1.0, self._correction(k)))
        if self.stands_still(k):
            return corrected
        return add((base, corrected), (c, {self._term(k): 1.0}), (1.0, self._residue(k, self._order_at(k), False)))

    def _order_at(self, k: int) -> int:
        n = self.grid.steps
        return 1 if self.grid.sigmas[k + 1] == 0 else order_at(k, n, self.order, self.lower_order_final)

    def _correction(self, k: int) -> LinearCombination:
        """Return the correction of the state at k by the prediction there: corrector minus predictor."""
        if k == 0 or not self.corrector:
            return {}
        order = self._order_at(k - 1)
        return add((1.0, self._residue(k - 1, order, True)), (-1.0, self._residue(k - 1, order, False)))

    def _residue(self, k: int, order: int, corrects: bool) -> LinearCombination:
        """Return the terms of the step from k beyond first order; if `corrects`, with the estimate at k + 1."""
        if order == 1 and not corrects:
            return {}
        nodes = [k - j for j in range(1, order)] + ([k + 1] if corrects else [])
        lambdas = self._lambdas
        h = lambdas[k + 1] - lambdas[k]
        hh = -h if self.of == "data" else h
        b_h = hh if self.variant == "bh1" else math.expm1(hh)
        r = np.array([(lambdas[i] - lambdas[k]) / h for i in nodes])
        if len(r) == 1 and (order == 2 or corrects):
            rho = np.array([0.5])  # B(h) is chosen so that this is exact enough (remark after equation 11).
        else:
            rho = np.linalg.solve(np.vander(r, len(r), increasing=True).T, _right_hand_side(hh, b_h, len(r)))
        scale = -float(self.grid.alphas[k + 1] if self.of == "data" else self.grid.sigmas[k + 1]) * b_h
        parts = (
            (scale * float(weight / ratio), {self._term(i): 1.0, self._term(k): -1.0})
            for weight, ratio, i in zip(rho, r, nodes, strict=True)
        )
        return add(*parts)


def _right_hand_side(hh: float, b_h: float, count: int) -> list[float]:
    """Return phi_{i+1}(hh) i! hh / B(h) for i = 1..count (equation 9)."""
    phi, factorial, values = math.expm1(hh) / hh - 1, 1, []
    for i in range(1, count + 1):
        values.append(phi * factorial / b_h)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    return values
