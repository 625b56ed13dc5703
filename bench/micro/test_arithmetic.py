"""How long does the leader's arithmetic take? A state is 4 x 64 x 64 numbers, as Stable Diffusion's latents are."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from drp.sampling.grids import scaled_linear
from drp.sampling.modes import Aggressive
from drp.sampling.run import Run, slots
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


@pytest.mark.parametrize("refine", [False, True], ids=["drafts", "drafts and states"])
def test_rounds_of_8(benchmark: BenchmarkFixture, refine: bool) -> None:
    """All of a round but the evaluations, six rounds of eight drafts; with the states between, or without."""
    torch.set_num_threads(1)
    solver, noise = DDIM(scaled_linear(49)), torch.randn(1, NUMBERS)
    drafts, predictions = (torch.zeros(slots(solver, Aggressive(DRAFTS)), NUMBERS) for _ in range(2))

    def setup() -> tuple[tuple[Run], dict[str, object]]:
        return (Run(solver, Aggressive(DRAFTS), noise, drafts, predictions),), {}

    def arithmetic(run: Run) -> None:
        for _ in run.rounds():
            if refine:
                run.refine()

    benchmark.pedantic(arithmetic, setup=setup, rounds=200)  # type: ignore[no-untyped-call]
    assert drafts.isfinite().all()
