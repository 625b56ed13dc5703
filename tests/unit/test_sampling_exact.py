"""Where the exact solution is known: orders of convergence, of solvers and of drafts."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from drp.sampling.drafts import PAPER, DraftRule
from drp.sampling.grids import Grid
from drp.sampling.linear import LinearCombination
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Sequential
from drp.sampling.plan import transition
from drp.sampling.reference import run_reference
from drp.sampling.solvers import DDIM, DEIS, DPMSolver, Heun, LinearMultistep, Solver, UniPC

MEAN, WIDTH = 0.4, 0.7


def even_grid(steps: int, low: float = -4.0, high: float = 3.0) -> Grid:
    """Even steps in lambda; the timestep is the index."""
    lambdas = np.linspace(low, high, steps + 1)
    alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    return Grid(np.arange(steps, dtype=np.float64), alphas, np.exp(-lambdas) * alphas)


def doubled(grid: Grid) -> Grid:
    """As Heun's method goes over it."""
    twice = np.append(np.repeat(np.arange(grid.steps), 2)[1:], grid.steps)
    return Grid(np.arange(len(twice) - 1, dtype=np.float64), grid.alphas[twice], grid.sigmas[twice])


class Gaussian:
    """The exact denoiser of data from N(MEAN, WIDTH^2), which predicts the noise, and the exact solution."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.spread = np.sqrt(grid.alphas**2 * WIDTH**2 + grid.sigmas**2)

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        k = int(t[0])
        alpha, sigma = float(self.grid.alphas[k]), float(self.grid.sigmas[k])
        return sigma * (x - alpha * MEAN) / float(self.spread[k]) ** 2

    def solution(self, x: Tensor, a: int, b: int) -> Tensor:
        """Every state keeps its quantile."""
        quantile = (x - float(self.grid.alphas[a]) * MEAN) / float(self.spread[a])
        return float(self.grid.alphas[b]) * MEAN + float(self.spread[b]) * quantile


X = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]


def error(solver: Solver) -> float:
    gaussian = Gaussian(solver.grid)
    samples = run_reference(gaussian, solver, Sequential(), X, {}).samples
    return float((samples - gaussian.solution(X, 0, solver.grid.steps)).abs().max())


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (DDIM, 1),
        (lambda g: DPMSolver(g, order=1), 1),
        (lambda g: DPMSolver(g, order=2), 2),
        (lambda g: DPMSolver(g, order=2, variant="heun"), 2),
        (lambda g: DPMSolver(g, order=2, algorithm="dpmsolver"), 2),
        # As published, and in diffusers, the third-order term is half of what a polynomial would have: no third order.
        (lambda g: DPMSolver(g, order=3), 2),
        (lambda g: DPMSolver(g, order=3, algorithm="dpmsolver"), 2),
        (lambda g: DEIS(g, order=2), 2),
        (lambda g: DEIS(g, order=3), 3),
        (lambda g: LinearMultistep(g, order=2), 2),
        (lambda g: UniPC(g, order=1), 2),
        (lambda g: UniPC(g, order=2, lower_order_final=False), 3),
        (lambda g: UniPC(g, order=2, corrector=False), 2),
        (lambda g: UniPC(g, order=3, lower_order_final=False), 4),
        (lambda g: Heun(doubled(g)), 2),
    ],
)
def test_order_of_convergence(make, order: int) -> None:  # type: ignore[no-untyped-def]  # makers of many kinds
    # The first steps of a multistep solver are of lower order; from here on the data estimate hardly moves yet.
    grids = [even_grid(steps, low=-9.0) for steps in (96, 192, 384)]
    errors = [error(make(grid)) for grid in grids]
    measured = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert measured[1] > order - 0.25, (errors, measured)
    if order < 3:  # The higher ones come close to the rounding of float64, or run ahead of their order.
        assert measured[1] < order + 0.6, (errors, measured)


def evaluate(row: LinearCombination, states: Mapping[int, Tensor], gaussian: Gaussian) -> Tensor:
    total = torch.zeros_like(X)
    for term, coefficient in row.items():
        x = states[term.k]
        value = x if term.kind in ("state", "input") else gaussian(x, torch.tensor([float(term.k)]), {})
        total = total + coefficient * value
    return total


@pytest.mark.parametrize(("rule", "order"), [(PAPER, 2), (DraftRule(slope=1.0), 3)])
def test_error_of_a_draft_as_the_skip_grows(rule: DraftRule, order: int) -> None:
    """On a fine grid, the draft m steps ahead, the anchor lying m behind: the error falls like m^order."""
    grid = even_grid(1024, -1.5, 1.5)
    gaussian, a = Gaussian(grid), 512
    states = {0: X}
    run_reference(gaussian, DDIM(grid), Sequential(), X, {}, lambda k, x: states.update({k: x.clone()}))
    errors = []
    for m in (128, 64, 32):
        draft = evaluate(transition(DDIM(grid), a, a + m, rule, a - m), states, gaussian)
        errors.append(float((draft - states[a + m]).abs().max()))
    measured = math.log2(errors[0] / errors[1])
    assert order - 0.4 < measured < order + 0.6, errors


def test_drafting_converges_to_the_exact_solution() -> None:
    for mode in (Aggressive(4), Aggressive(4, PAPER), Conservative(4)):
        errors = []
        for steps in (64, 256):
            grid = even_grid(steps)
            gaussian = Gaussian(grid)
            samples = run_reference(gaussian, DPMSolver(grid), mode, X, {}).samples
            errors.append(float((samples - gaussian.solution(X, 0, steps)).abs().max()))
        assert errors[1] < errors[0] / 3 < 0.01, (mode, errors)


CENTRES, WEIGHTS, NARROW = (-1.0, 0.3, 1.2), (0.5, 0.2, 0.3), 0.15


def mixture(grid: Grid) -> object:
    """Return the exact denoiser of a Gaussian mixture, which predicts v."""

    def predict(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        alpha, sigma = float(grid.alphas[int(t[0])]), float(grid.sigmas[int(t[0])])
        variance = alpha**2 * NARROW**2 + sigma**2
        centres = torch.tensor(CENTRES, dtype=x.dtype)
        away = x[..., None] - alpha * centres
        share = torch.softmax(torch.tensor(WEIGHTS).double().log() - away**2 / (2 * variance), dim=-1)
        data = (share * (centres + alpha * NARROW**2 / variance * away)).sum(-1)
        return (alpha * x - data) / sigma

    return predict


def test_a_mixture_splits_by_weight() -> None:
    """4,000 samples through 64 steps, drafted: each centre gets its share, and its width."""
    grid = even_grid(64, -5.0, 5.0)
    start = torch.randn(1, 4_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mode in (Sequential(), Aggressive(4), Adaptive(8, 0.01)):
        samples = run_reference(mixture(grid), DPMSolver(grid, "v"), mode, start, {}).samples  # type: ignore[arg-type]
        nearest = (samples[..., None] - torch.tensor(CENTRES)).abs().argmin(-1)
        for i, (centre, weight) in enumerate(zip(CENTRES, WEIGHTS, strict=True)):
            own = samples[nearest == i]
            assert abs(len(own) / 4_000 - weight) < 0.03
            assert abs(float(own.mean()) - centre) < 0.03
            assert abs(float(own.std()) - NARROW) < 0.02
