"""Predictions folded in as they arrive: the same bits whatever the order, and whether or not they are."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from drp.sampling import cached_plan
from drp.sampling.cached_plan import CachedPlan, KnownEvents
from drp.sampling.checkpoint import Checkpoint
from drp.sampling.drafts import DAMPED, PAPER, RULES
from drp.sampling.grids import scaled_linear
from drp.sampling.linear import state
from drp.sampling.mode_selection import make_mode
from drp.sampling.mode_wrappers import EagerRounds, PicardSweeps, Warmup
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Mode, Rolling, Sparse, Window
from drp.sampling.partial_sums import add_terms
from drp.sampling.plan import Predict
from drp.sampling.run import Run, Task
from drp.sampling.slot_allocator import slots
from drp.sampling.solvers import DDIM, DPMSolver, Solver


def start(solver: Solver, mode: Mode) -> tuple[Run, Tensor, Tensor]:
    noise = torch.randn(2, 33, generator=torch.Generator().manual_seed(1))
    drafts, predictions = (torch.full((slots(solver, mode), 66), torch.nan) for _ in range(2))
    return Run(solver, mode, noise, drafts, predictions), drafts, predictions


def denoise(x: Tensor, task: Task) -> Tensor:
    return torch.tanh(x) * (0.5 + task.timestep / 1000)


def sample_in_turn(solver: Solver, mode: Mode) -> tuple[Tensor, int]:
    """Run, every round's predictions being there before the next is asked for; none is folded in."""
    run, drafts, predictions = start(solver, mode)
    for tasks in run.rounds():
        run.refine()
        for task in tasks:
            predictions[task.slot] = denoise(drafts[task.slot], task)
    run.refine()
    return run.state.clone(), run.rounds_done


def sample(solver: Solver, mode: Mode, order: random.Random) -> tuple[Tensor, int]:
    """Run, predictions arriving in a random order among all that are out; return how many were out at most, too."""
    run, drafts, predictions = start(solver, mode)
    rounds = run.rounds()
    out: list[Task] = []
    most = 0
    while True:
        while run.ready:
            tasks = next(rounds, None)
            if tasks is None:
                assert not out
                run.refine()
                assert run.steps_done == solver.grid.steps
                return run.state.clone(), most
            for task in tasks:
                predictions[task.slot] = torch.nan  # using it before it is there would show
            out += tasks
        most = max(most, len(out))
        run.refine()
        task = out.pop(order.randrange(len(out)))
        predictions[task.slot] = denoise(drafts[task.slot], task)
        run.accumulate(task.slot)


SOLVERS = [DDIM(scaled_linear(23)), DPMSolver(scaled_linear(23))]


@pytest.mark.parametrize("name", ["aggressive", "conservative", "window", "adaptive", "rolling"])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_of_arrival_changes_no_bit(name: str, rule: str, solver: Solver) -> None:
    for n in (1, 2, 5):
        mode = make_mode(name, n, 0.01, RULES[rule])
        expected, _ = sample_in_turn(solver, mode)
        assert expected.isfinite().all()
        for seed in range(3):
            assert torch.equal(sample(solver, mode, random.Random(seed))[0], expected), (n, seed)


SCHEDULES = [
    PicardSweeps(Aggressive(4), 2),
    PicardSweeps(Conservative(5), 1),
    Window(6, 4),
    PicardSweeps(Window(5, 2.5), 1),
    Sparse(4, 4, DAMPED, (2, 4, 6, 8)),
    Warmup(PicardSweeps(Aggressive(3), 1), 2),
    Aggressive(4),
    Adaptive(4, 0.01),
]


@pytest.mark.parametrize("mode", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_eager_drafts_are_the_same_and_wait_for_less(mode: Mode, solver: Solver) -> None:
    expected, rounds = sample_in_turn(solver, mode)
    eager, depth = sample_in_turn(solver, EagerRounds(mode))
    assert torch.equal(eager, expected)
    assert depth <= rounds
    for seed in range(5):
        assert torch.equal(sample(solver, EagerRounds(mode), random.Random(seed))[0], expected), seed
        assert torch.equal(sample(solver, mode, random.Random(seed))[0], expected), seed


def sample_with_setbacks(solver: Solver, mode: Mode, order: random.Random) -> tuple[Tensor, int, int]:
    """Run, going back to a checkpoint now and then; return the state, how often, and how many were still kept then."""
    noise = torch.randn(2, 33, generator=torch.Generator().manual_seed(1))
    drafts, predictions = (torch.full((slots(solver, mode, True), 66), torch.nan) for _ in range(2))
    run = Run(solver, mode, noise, drafts, predictions, checkpoints=True)
    rounds, out, setbacks = run.rounds(), list[Task](), 0
    kept: list[tuple[Checkpoint, list[Task]]] = []
    while True:
        while run.ready:
            tasks = next(rounds, None)
            if tasks is None:
                run.refine()
                return run.state.clone(), setbacks, sum(checkpoint.kept for checkpoint, _ in kept)
            for task in tasks:
                predictions[task.slot] = torch.nan
            out += tasks
            if len(kept) == 2 and (mode.feedback or order.random() < 0.4):
                if kept[0][0].kept:
                    run.drop(kept[0][0])
                kept.pop(0)
            if len(kept) < 2:
                kept.append((run.checkpoint(), list(out)))
        run.refine()
        task = out.pop(order.randrange(len(out)))
        predictions[task.slot] = denoise(drafts[task.slot], task)
        run.accumulate(task.slot)
        if setbacks < 8 and order.random() < 0.1:
            place = len(kept) - 1 if mode.feedback else order.randrange(len(kept))
            checkpoint, then = kept[place]
            if checkpoint.kept:
                run.restore(checkpoint)
                setbacks += 1
                rounds, out, kept = run.rounds(), list(then), kept[: place + 1]
                assert not any(later.kept for later, _ in kept[place + 1 :])


@pytest.mark.parametrize("mode", [*SCHEDULES, Conservative(5), Rolling(4), EagerRounds(PicardSweeps(Aggressive(4), 2))])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_that_went_back_to_a_checkpoint_has_the_same_bits(mode: Mode, solver: Solver) -> None:
    expected, _ = sample_in_turn(solver, mode)
    found = [sample_with_setbacks(solver, mode, random.Random(seed)) for seed in range(6)]
    assert all(torch.equal(state, expected) for state, _, _ in found)
    assert sum(setbacks for _, setbacks, _ in found) > 5
    assert any(kept for _, _, kept in found)


def test_drafts_of_several_sweeps_are_out_at_the_same_time() -> None:
    most = [
        sample(SOLVERS[0], EagerRounds(PicardSweeps(Aggressive(4), 2)), random.Random(seed))[1] for seed in range(5)
    ]
    assert max(most) > 4
    assert sample(SOLVERS[0], PicardSweeps(Aggressive(4), 2), random.Random(0))[1] == 4


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
def test_a_window_rolls_with_n_drafts_out_in_as_many_rounds_as_blocks(n: int) -> None:
    for warm in (0, 3):
        solver = DDIM(scaled_linear(48))
        rolling, blocks = (Warmup(mode, warm) if warm else mode for mode in (Rolling(n), Aggressive(n)))
        assert sample_in_turn(solver, rolling)[1] == sample_in_turn(solver, blocks)[1]
        assert sample(solver, rolling, random.Random(n))[1] == min(n, 47 - warm)


def test_a_window_is_between_the_sequential_run_and_drafts_that_are_all_far_ahead() -> None:
    solver = DDIM(scaled_linear(48))
    exact, _ = sample_in_turn(solver, Rolling(1))
    assert torch.equal(exact, sample_in_turn(solver, Aggressive(1))[0])

    def error(mode: Mode) -> float:
        return float((sample_in_turn(solver, mode)[0] - exact).norm() / exact.norm())

    assert 0 < error(Aggressive(2)) < error(Rolling(4)) < error(Rolling(8, PAPER))
    assert error(Rolling(8)) < error(Rolling(8, PAPER))


def test_a_window_has_no_blocks_to_sweep() -> None:
    with pytest.raises(ValueError, match="no blocks to sweep"):
        sample_in_turn(SOLVERS[0], PicardSweeps(Rolling(4), 1))


def test_a_plan_is_worked_out_once_by_whichever_thread_comes_first() -> None:
    asked, go = threading.Event(), threading.Event()

    def events() -> Iterator[Any]:
        asked.set()
        assert go.wait(20)
        yield from (Predict((k,), ({state(0): 1.0},), 0) for k in range(5))

    known = KnownEvents()
    plan, another = (CachedPlan(events(), torch.zeros(0), 1, known) for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        far = threads.submit(plan.get, 3)
        assert asked.wait(20)
        near = threads.submit(another.get, 0)
        time.sleep(0.1)  # so that it waits for the other, having found nothing there
        go.set()
        found: list[Any] = [far.result(20), near.result(20)]
    assert [event.indices for event in found] == [(3,), (0,)]
    last: Any = another.get(4)  # which passes over those that the other has worked out
    assert last.indices == (4,)
    assert plan.get(4) is last
    assert plan.get(5) is None
    assert known.complete


@pytest.mark.parametrize("finish", [True, False])
def test_runs_of_a_solver_of_ones_own_leave_nothing(finish: bool) -> None:
    """However far they came: a plan that is not at its end must not hold the solver that it is kept by."""
    gc.collect()
    before = len(cached_plan._known_events)
    for _ in range(3):
        run, _drafts, _predictions = start(DDIM(scaled_linear(23)), Aggressive(4))
        rounds = run.rounds()
        for _tasks in rounds if finish else itertools.islice(rounds, 3):
            run.refine()
        del run, rounds
    gc.collect()
    assert len(cached_plan._known_events) == before


@pytest.mark.parametrize("mode", [Aggressive(4), Conservative(3)])
def test_states_between_are_computed_for_who_wants_them_only(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made of them: without a callback or residuals they are left out, and the samples are the same."""
    counts, samples = list[int](), list[Tensor]()
    add = add_terms
    for between in (None, False, True):
        counts.append(0)

        def counted(out: Tensor, weights: Tensor, terms: Sequence[Tensor], first: bool) -> None:
            counts[-1] += len(terms)
            add(out, weights, terms, first)

        monkeypatch.setattr("drp.sampling.run.add_terms", counted)
        run, drafts, predictions = start(DDIM(scaled_linear(23)), mode)
        for tasks in run.rounds():
            run.refine(between=between)
            for task in tasks:
                predictions[task.slot] = denoise(drafts[task.slot], task)
        run.refine(between=between)
        samples.append(run.state.clone())
    assert counts[0] == counts[1] < counts[2]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_known_is_added_while_predictions_are_missing(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last of eight is there, drafts are made of it and the new state, and all else was added before."""
    add, added = add_terms, list[Tensor]()

    def counted(out: Tensor, weights: Tensor, terms: Sequence[Tensor], first: bool) -> None:
        added.extend(term.clone() for term in terms)
        add(out, weights, terms, first)

    monkeypatch.setattr("drp.sampling.run.add_terms", counted)
    run, drafts, predictions = start(solver, Aggressive(8))
    rounds = run.rounds()
    for number in range(3):
        tasks = next(rounds)
        run.refine()
        for task in tasks:
            predictions[task.slot] = denoise(drafts[task.slot], task)
            if task is tasks[-1] and number:
                added.clear()
            run.accumulate(task.slot)
    newest = predictions[tasks[-1].slot]
    next(rounds)
    assert len(added) == 2 + 2 * solver.history  # With a history the state and prediction before it, too.
    assert torch.equal(added[-1], newest)
