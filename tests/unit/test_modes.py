"""Modes, plans and the reference: the mathematics without processes."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drp.sampling.drafts import DAMPED, PAPER, SECANT, DraftRule, Levels
from drp.sampling.grids import scaled_linear
from drp.sampling.mode_selection import make_mode
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Mode, Round, Rounds, Sequential, Sparse, Window
from drp.sampling.naive import draft_and_refine
from drp.sampling.plan import make_plan
from drp.sampling.reference import run_reference
from drp.sampling.registry import make_solver
from drp.sampling.result import Result
from drp.sampling.solvers import DDIM, DPMSolver
from examples.own_rule import ByNoise


def denoise(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return torch.tanh(x) * (0.5 + t / 1000)[:, None] + 0.1


def draw(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 17, dtype=dtype, generator=torch.Generator().manual_seed(0))


def sample(mode: Mode, steps: int) -> Result:
    return run_reference(denoise, DDIM(scaled_linear(steps)), mode, draw(), {})


def plain_loop(steps: int) -> Tensor:
    """DDIM as in its paper, without anything of drp but the grid."""
    grid = scaled_linear(steps)
    x = draw()
    for k, t in enumerate(grid.timesteps):
        noise = denoise(x, torch.full((3,), float(t)), {})
        data = (x - grid.sigmas[k] * noise) / grid.alphas[k]
        x = grid.alphas[k + 1] * data + grid.sigmas[k + 1] * noise
    return x


@pytest.mark.parametrize("steps", [1, 2, 10, 48])
def test_sequential_is_ddim(steps: int) -> None:
    torch.testing.assert_close(sample(Sequential(), steps).samples, plain_loop(steps), rtol=1e-12, atol=1e-12)


def paper_by_hand(steps: int, n: int, conservative: bool) -> Tensor:
    """Draft and refine as section 3 of the paper has it, index by index."""
    grid = scaled_linear(steps)

    def phi(x: Tensor, noise: Tensor, a: int, b: int) -> Tensor:
        alpha, sigma = grid.alphas.tolist(), grid.sigmas.tolist()
        after: Tensor = alpha[b] * (x - sigma[a] * noise) / alpha[a] + sigma[b] * noise
        return after

    def f(x: Tensor, k: int) -> Tensor:
        return denoise(x, torch.full((3,), float(grid.timesteps[k])), {})

    k, x = 0, draw()
    noise = f(x, 0)
    while k < steps:
        drafts = {j: phi(x, noise, k, j) for j in range(k + 1, min(k + n, steps - 1) + 1)}
        predictions = {k: noise, **{j: f(draft, j) for j, draft in drafts.items()}}
        end = max(predictions)
        if conservative or end == steps - 1:
            end += 1
        for j in range(k, end):
            x = phi(x, predictions[j], j, j + 1)
        k = end
        if k < steps:
            noise = f(x, k) if conservative else predictions[k]
    return x


@pytest.mark.parametrize(("steps", "n"), [(48, 2), (48, 4), (10, 3), (7, 8), (2, 2), (1, 4)])
def test_drafting_is_what_the_paper_says(steps: int, n: int) -> None:
    for mode, conservative in ((Aggressive(n, PAPER), False), (Conservative(n, PAPER), True)):
        result = sample(mode, steps).samples
        torch.testing.assert_close(result, paper_by_hand(steps, n, conservative), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("steps", "n", "stride"), [(48, 8, 5), (48, 4, 3), (48, 8, 8), (48, 8, 1), (10, 3, 2), (1, 4, 2)]
)
def test_a_window_is_what_the_naive_code_does(steps: int, n: int, stride: int) -> None:
    grid = scaled_linear(steps)
    alpha, sigma, t = (torch.from_numpy(each.copy()) for each in (grid.alphas, grid.sigmas, grid.timesteps))
    naive, rounds = draft_and_refine(
        lambda x, t: denoise(x, torch.full((3,), t), {}), draw(), t, alpha, sigma, n, stride
    )
    result = sample(Window(n, stride, PAPER), steps)
    torch.testing.assert_close(result.samples, naive, rtol=1e-11, atol=1e-11)
    assert result.rounds == rounds == 1 + -(-(steps - 1) // stride)
    assert sum(result.evaluated) == result.evaluations
    assert result.evaluated[0] == 1


def test_a_window_of_stride_n_is_aggressive_and_one_of_stride_1_sequential() -> None:
    for rule in (PAPER, DAMPED):
        assert torch.equal(sample(Window(5, 5, rule), 23).samples, sample(Aggressive(5, rule), 23).samples)
        torch.testing.assert_close(sample(Window(5, 1, rule), 23).samples, plain_loop(23), rtol=1e-12, atol=1e-12)


def test_a_window_says_how_often_each_index_was_evaluated() -> None:
    result = sample(Window(4, 2), 9)
    assert result.evaluated == (1, 1, 1, 2, 2, 2, 2, 2, 2)
    assert result.evaluations == 15


def test_what_offsets_leave_out_is_interpolated() -> None:
    """Where the estimate of the data is even over the indices, drafts with gaps lose nothing."""
    grid = scaled_linear(20)

    def even(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        k = int((grid.timesteps == float(t[0])).nonzero()[0][0])
        data = torch.linspace(-1, 1, 17, dtype=torch.float64) * (1 + k / 10)
        return (x - float(grid.alphas[k]) * data) / float(grid.sigmas[k])

    def run(mode: Mode) -> Result:
        return run_reference(even, DDIM(grid), mode, draw(), {})

    carried = DraftRule(carry=1.0, slope=1.0)
    exact, gaps = run(Sequential()), run(Sparse(4, 4, carried, (2, 4, 6, 8)))
    torch.testing.assert_close(gaps.samples, exact.samples, rtol=1e-10, atol=1e-10)
    assert (gaps.rounds, gaps.evaluated[:9]) == (6, (1, 0, 1, 0, 1, 0, 2, 0, 2))


def test_an_index_that_no_window_evaluates() -> None:
    for solver in (DDIM(scaled_linear(23)), DPMSolver(scaled_linear(23), order=3)):
        for offsets in ((2, 4, 6), (1, 3, 5), (3, 4, 9)):
            for stride in (1, 2.5, 3, offsets[-1]):
                mode = Sparse(3, stride, DAMPED, offsets)
                result = run_reference(denoise, solver, mode, draw(), {})
                assert result.samples.isfinite().all()
                assert result.rounds == 1 + math.ceil(22 / stride)


def test_drafting_changes_the_samples() -> None:
    assert (sample(Aggressive(4), 12).samples - plain_loop(12)).abs().max() > 1e-6


def test_rounds_and_evaluations_equal_the_formulas() -> None:
    for steps, n in itertools.product([1, 2, 3, 5, 9, 10, 48], [1, 2, 3, 4, 8, 60]):
        aggressive, conservative = sample(Aggressive(n), steps), sample(Conservative(n), steps)
        assert aggressive.rounds == 1 + -(-(steps - 1) // n)
        assert conservative.rounds == 2 * (steps // (n + 1)) + min(2, steps % (n + 1))
        assert aggressive.evaluations == conservative.evaluations == steps
    assert [sample(Aggressive(n), 48).rounds for n in (2, 4, 8)] == [25, 13, 7]
    assert [sample(Conservative(n), 48).rounds for n in (2, 4, 8)] == [32, 20, 12]


@pytest.mark.parametrize("mode", [Sequential(), Aggressive(3), Conservative(3), Aggressive(50)])
def test_callback_sees_every_step_in_order(mode: Mode) -> None:
    seen: list[tuple[int, Tensor]] = []
    result = run_reference(denoise, DDIM(scaled_linear(10)), mode, draw(), {}, lambda k, x: seen.append((k, x.clone())))
    assert [k for k, _ in seen] == list(range(1, 11))
    assert torch.equal(seen[-1][1], result.samples)


def test_grid() -> None:
    grid = scaled_linear(50)
    assert grid.steps == 50
    assert grid.timesteps[0] == 999
    assert np.all(np.diff(grid.timesteps) == -20)
    assert (grid.alphas[-1], grid.sigmas[-1]) == (1, 0)
    np.testing.assert_allclose(grid.alphas**2 + grid.sigmas**2, 1)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}; choose 1 to 1000"):
            scaled_linear(steps)


@dataclass
class Written(Mode):
    """A mode that yields what it is given."""

    script: tuple[Round, ...]
    width: int = 2
    rule: DraftRule = PAPER

    def rounds(self, steps: int) -> Rounds:
        yield from self.script


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ((Round(1, (1,)),), "starts at 1"),
        ((Round(0, ()),), "predicts 0 indices"),
        ((Round(0, (0, 1, 2)),), "predicts 3 indices"),
        ((Round(0, (0,)), Round(0, (1, 3))), "indices in a row"),
        ((Round(0, (0, 0)),), "indices in a row"),
        ((Round(0, (1,)),), "starting from 0 to 0"),
        ((Round(0, (0,)), Round(2, (2,))), "starts at 2, but the run is at 0 and has predictions up to 0"),
        ((Round(0, (0,)), Round(1, (1,)), Round(0, (1, 2))), "starts at 0"),
        ((Round(0, (0,)),), "ends with a prediction at 0"),
        ((), "ends with a prediction at -1"),
    ],
)
def test_a_mode_that_breaks_the_rules_is_told_which(script: tuple[Round, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(make_plan(DDIM(scaled_linear(4)), Written(script)))


def test_mode_names() -> None:
    assert make_mode("aggressive", 3, 0.0, PAPER) == Aggressive(3, PAPER)
    assert make_mode("adaptive", 3, 0.01, SECANT) == Adaptive(3, 0.01, SECANT)
    with pytest.raises(ValueError, match="unknown mode 'fast'; choose one of sequential, conservative, aggressive"):
        make_mode("fast", 2, 0.0, PAPER)
    with pytest.raises(ValueError, match="drafts is 0"):
        make_mode("aggressive", 0, 0.0, PAPER)
    with pytest.raises(ValueError, match="tolerance is nan"):
        make_mode("adaptive", 2, math.nan, PAPER)


def test_a_rule_of_ones_own() -> None:
    solver = DDIM(scaled_linear(24))
    half, always = ByNoise(minimum=0.5, maximum=0.5), DraftRule(carry=0.5)
    for mode in (Window(6, 4), Aggressive(4), Sparse(4, 4, DAMPED, (2, 4, 6, 8))):
        mine, same, other = (
            run_reference(denoise, solver, replace(mode, rule=rule), draw(), {}).samples
            for rule in (half, always, ByNoise())
        )
        assert torch.equal(mine, same)
        assert not torch.equal(mine, other)


@pytest.mark.parametrize("axis", ["log-sigma", "angle", "time"])
def test_axes_of_extrapolation(axis: str) -> None:
    """Estimates that change evenly over the axis are foreseen in full."""
    for solver in (DDIM(scaled_linear(24)), make_solver("euler", 24, "flow", {"shift": 3.0})):
        rule = DraftRule(carry=1.0, slope=1.0, axis=axis)
        grid = solver.grid
        alphas, sigmas, timesteps = (
            tuple(map(float, each[:24])) for each in (grid.alphas, grid.sigmas, grid.timesteps)
        )
        levels = Levels(alphas, sigmas, timesteps, solver.prediction_type)
        weights = rule.extrapolate(18, 8, 15, levels)
        assert sum(weights.values()) == pytest.approx(1)
        assert sum(w * levels.on(axis, k) for k, w in weights.items()) == pytest.approx(levels.on(axis, 18))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carry": math.nan}, "carry is nan; give a number from 0 to 1"),
        ({"carry": -0.1}, "carry is -0.1"),
        ({"slope": math.inf}, "slope is inf"),
        ({"slope": (0.5, 1.5)}, "slope is"),
        ({"axis": "odd"}, "axis is 'odd'; choose one of index, log-sigma"),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftRule(**options)
