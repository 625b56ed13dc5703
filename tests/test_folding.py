"""Predictions folded in as they arrive: the same bits whatever the order, and whether or not they are."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from drp.sampling.drafts import RULES
from drp.sampling.grids import scaled_linear
from drp.sampling.modes import Mode, make_mode
from drp.sampling.run import Run, slots
from drp.sampling.solvers import DDIM, DPMSolver, Solver


def sample(solver: Solver, mode: Mode, order: random.Random | None) -> Tensor:
    """Run, folding the predictions in a random order, or not at all."""
    start = torch.randn(2, 33, generator=torch.Generator().manual_seed(1))
    drafts, predictions = (torch.full((slots(solver, mode), 66), torch.nan) for _ in range(2))
    run = Run(solver, mode, start, drafts, predictions)
    for tasks in run.rounds():
        run.refine()
        if order:
            order.shuffle(tasks)
        for task in tasks:
            predictions[task.slot] = torch.tanh(drafts[task.slot]) * (0.5 + task.timestep / 1000)
            if order:
                run.fold(task.index)
    run.refine()
    assert run.steps_done == solver.grid.steps
    return run.state.clone()


@pytest.mark.parametrize("name", ["aggressive", "conservative", "adaptive"])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("solver", [DDIM(scaled_linear(23)), DPMSolver(scaled_linear(23))])
def test_the_order_of_arrival_changes_no_bit(name: str, rule: str, solver: Solver) -> None:
    for n in (1, 2, 5):
        mode = make_mode(name, n, 0.01, RULES[rule])
        expected = sample(solver, mode, None)
        assert expected.isfinite().all()
        for seed in range(3):
            assert torch.equal(sample(solver, mode, random.Random(seed)), expected), (n, seed)
