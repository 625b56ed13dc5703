"""What must hold for every grid, solver, number of drafts and steps: properties, on random ones."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drp.sampling.drafts import PAPER, DraftRule
from drp.sampling.grids import Grid
from drp.sampling.linear import data, prediction, state, substitute
from drp.sampling.mode_wrappers import EagerRounds, PicardSweeps, Warmup
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Mode, Rolling, Sequential
from drp.sampling.plan import transition
from drp.sampling.predictions import PREDICTION_TYPES
from drp.sampling.reference import run_reference
from drp.sampling.result import Result
from drp.sampling.solvers import DDIM, DDPM, DEIS, DPMSolver, EulerAncestral, LinearMultistep, Solver, UniPC

MAKERS: dict[str, Callable[[Grid, str], Solver]] = {
    "ddim": DDIM,
    "ddim with noise": lambda g, p: DDIM(g, p, eta=0.7),
    "ddpm": DDPM,
    "euler ancestral": EulerAncestral,
    "dpmsolver++": DPMSolver,
    "dpmsolver++ 3": lambda g, p: DPMSolver(g, p, order=3),
    "sde-dpmsolver++": lambda g, p: DPMSolver(g, p, algorithm="sde-dpmsolver++"),
    "deis": lambda g, p: DEIS(g, p, order=3),
    "lms": LinearMultistep,
    "unipc": lambda g, p: UniPC(g, p, order=3),
}
RULES = st.sampled_from([PAPER, DraftRule(0.5, 0.5), DraftRule(1.0, 0.0), DraftRule(0.3, 1.0)])


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """1 to 10 steps, uneven, of more and more signal; mostly to the very end."""
    steps = draw(st.lists(st.floats(0.15, 0.9), min_size=1, max_size=10))
    lambdas = draw(st.floats(-3, -1)) + np.concatenate([[0.0], np.cumsum(steps)])
    sigmas = np.asarray(1 / np.sqrt(1 + np.exp(2 * lambdas)), dtype=np.float64)
    if draw(st.booleans()):
        sigmas[-1] = 0.0
    return Grid(np.linspace(900, 90, len(steps)), np.sqrt(1 - sigmas**2, dtype=np.float64), sigmas)


@st.composite
def solvers(draw: st.DrawFn) -> Solver:
    make = MAKERS[draw(st.sampled_from(sorted(MAKERS)))]
    return make(draw(grids()), draw(st.sampled_from(PREDICTION_TYPES)))


def denoise(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return torch.tanh(x) * (0.3 + t.double() / 2000)[:, None] + 0.1


def noise(k: int) -> Tensor:
    return torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k + 1))


def sample(solver: Solver, mode: Mode) -> Result:
    return run_reference(denoise, solver, mode, noise(-1), {}, fresh=noise)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert float((a - b).norm()) <= tolerance * (1 + float(b.norm()))


@settings(max_examples=60, deadline=None)
@given(solvers(), RULES)
def test_a_block_of_one_draft_is_sequential(solver: Solver, rule: DraftRule) -> None:
    expected = sample(solver, Sequential())
    assert expected.rounds == solver.grid.steps
    for mode in (Aggressive(1, rule), Rolling(1, rule)):
        assert_close(sample(solver, mode).samples, expected.samples)


@settings(max_examples=60, deadline=None)
@given(solvers(), st.integers(1, 6), RULES)
def test_enough_sweeps_are_sequential(solver: Solver, n: int, rule: DraftRule) -> None:
    expected = sample(solver, Sequential()).samples
    result = sample(solver, PicardSweeps(Aggressive(n, rule), n - 1))
    assert_close(result.samples, expected)
    assert result.rounds == 1 + n * math.ceil((solver.grid.steps - 1) / n)
    assert_close(sample(solver, PicardSweeps(Conservative(n, rule), n - 1)).samples, expected)
    eager = sample(solver, EagerRounds(PicardSweeps(Aggressive(n, rule), n - 1)))
    assert torch.equal(eager.samples, result.samples)
    assert eager.evaluations == result.evaluations
    assert eager.rounds <= result.rounds


@settings(max_examples=60, deadline=None)
@given(solvers(), st.integers(1, 6), RULES)
def test_the_two_limits_of_adaptive(solver: Solver, n: int, rule: DraftRule) -> None:
    steps = solver.grid.steps
    strict, expected = sample(solver, Adaptive(n, 0.0, rule)), sample(solver, Sequential())
    assert strict.rounds <= steps
    assert_close(strict.samples, expected.samples)
    loose, aggressive = sample(solver, Adaptive(n, math.inf, rule)), sample(solver, Aggressive(n, rule))
    assert (loose.rounds, loose.evaluations) == (aggressive.rounds, aggressive.evaluations)
    assert torch.equal(loose.samples, aggressive.samples)
    assert loose.cuts == ()


@settings(max_examples=60, deadline=None)
@given(solvers(), st.integers(1, 6), st.floats(1e-4, 0.3), RULES)
def test_adaptive_lies_between(solver: Solver, n: int, tolerance: float, rule: DraftRule) -> None:
    result = sample(solver, Adaptive(n, tolerance, rule))
    steps = solver.grid.steps
    assert 1 + math.ceil((steps - 1) / n) <= result.rounds <= steps
    assert sorted(result.cuts) == list(result.cuts)
    assert all(0 < cut < steps for cut in result.cuts)
    assert sorted(result.residuals) == list(range(1, steps))
    passed = [k for k in range(1, steps) if result.residuals[k] <= tolerance]
    assert len(passed) == steps - 1  # what a run goes on through was taken close enough


@settings(max_examples=40, deadline=None)
@given(solvers(), st.integers(1, 6), st.integers(0, 12), RULES)
def test_warmup(solver: Solver, n: int, warm: int, rule: DraftRule) -> None:
    steps = solver.grid.steps
    for mode in (Aggressive(n, rule), Conservative(n, rule), Adaptive(n, 0.01, rule), Rolling(n, rule)):
        result = sample(solver, Warmup(mode, warm))
        if warm >= steps - 1:
            assert result.rounds == steps
            assert_close(result.samples, sample(solver, Sequential()).samples)
        elif isinstance(mode, Aggressive | Rolling):
            assert result.rounds == warm + 1 + math.ceil((steps - warm - 1) / n)


@settings(max_examples=60, deadline=None)
@given(grids(), st.data())
def test_skip_transitions_of_a_constant_prediction_compose(grid: Grid, pick: st.DataObject) -> None:
    solver = DDIM(grid)
    a, b = sorted(pick.draw(st.lists(st.integers(0, grid.steps), min_size=2, max_size=2, unique=True)))
    whole = transition(solver, a, b)
    scale = float(grid.alphas[b] / grid.alphas[a])
    closed = {state(a): scale, prediction(a): float(grid.sigmas[b] - grid.sigmas[a] * scale)}
    assert set(whole) <= set(closed)
    for term, coefficient in closed.items():
        assert whole.get(term, 0.0) == pytest.approx(coefficient, abs=1e-12)
    if b - a > 1:  # the last step of it, from the state before, and with the same data estimate
        middle = transition(solver, a, b - 1)
        rest = substitute(
            solver.step(b - 1),
            lambda term: (
                {data(a): 1.0}
                if term.kind == "data"
                else {state(b - 1): 1 / grid.sigmas[b - 1], data(a): -grid.alphas[b - 1] / grid.sigmas[b - 1]}
            ),
        )
        estimate = {state(a): 1 / float(grid.alphas[a]), prediction(a): -float(grid.sigmas[a] / grid.alphas[a])}
        again = substitute(rest, lambda term: middle if term.kind == "state" else estimate)
        for term, coefficient in closed.items():
            assert again.get(term, 0.0) == pytest.approx(coefficient, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(solvers(), st.integers(1, 6), st.integers(1, 6), RULES)
def test_noise_does_not_depend_on_mode_or_drafts(solver: Solver, n: int, m: int, rule: DraftRule) -> None:
    """With a network whose output does not depend on its input, every mode gives the same sample."""

    def constant(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(x, 0.2)

    if solver.prediction_type != "sample":  # Otherwise the data estimate follows the state, and drafts do not know it.
        return
    expected = run_reference(constant, solver, Sequential(), noise(-1), {}, fresh=noise).samples
    for mode in (Aggressive(n, rule), Conservative(m, rule), Adaptive(n, 0.1, rule), Rolling(m, rule)):
        assert_close(run_reference(constant, solver, mode, noise(-1), {}, fresh=noise).samples, expected)
