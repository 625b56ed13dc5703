"""How long does the leader's arithmetic take? A state is 4 x 64 x 64 numbers, as Stable Diffusion's latents are."""

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from drp.sampling.grids import scaled_linear
from drp.sampling.modes import Aggressive
from drp.sampling.run import Run, Task
from drp.sampling.slot_allocator import slots
from drp.sampling.solvers import DDIM

NUMBERS = 4 * 64 * 64
DRAFTS = 8


def test_draft_product(benchmark: BenchmarkFixture) -> None:
    """The least that it could be: eight drafts as one matrix product over the state and a prediction."""
    torch.set_num_threads(1)
    weights, known = torch.randn(DRAFTS, 2), torch.randn(2, NUMBERS)
    drafts = torch.empty(DRAFTS, NUMBERS)
    benchmark(torch.mm, weights, known, out=drafts)
    assert drafts.isfinite().all()


@pytest.fixture
def advanced() -> Callable[[], tuple[Run, Iterator[list[Task]]]]:
    """Return what makes runs that have two rounds behind them, all refined."""
    torch.set_num_threads(1)
    solver, mode, noise = DDIM(scaled_linear(48)), Aggressive(DRAFTS), torch.randn(1, NUMBERS)
    drafts, predictions = (torch.zeros(slots(solver, mode), NUMBERS) for _ in range(2))

    def make() -> tuple[Run, Iterator[list[Task]]]:
        run = Run(solver, mode, noise, drafts, predictions)
        rounds = run.rounds()
        for _ in range(2):
            next(rounds)
            run.refine()
        return run, rounds

    return make


def test_from_predictions_to_drafts(
    benchmark: BenchmarkFixture, advanced: Callable[[], tuple[Run, Iterator[list[Task]]]]
) -> None:
    """Between a round's last prediction and the next one's eight drafts: every worker waits for it."""

    def setup() -> tuple[tuple[Iterator[list[Task]]], dict[str, object]]:
        return (advanced()[1],), {}

    tasks = benchmark.pedantic(next, setup=setup, rounds=300)  # type: ignore[no-untyped-call]
    assert len(tasks) == DRAFTS


def test_refine(benchmark: BenchmarkFixture, advanced: Callable[[], tuple[Run, Iterator[list[Task]]]]) -> None:
    """The states between, while the workers compute: nobody waits for it."""

    def setup() -> tuple[tuple[Run], dict[str, object]]:
        run, rounds = advanced()
        next(rounds)
        return (run,), {}

    benchmark.pedantic(Run.refine, setup=setup, rounds=300)  # type: ignore[no-untyped-call]
