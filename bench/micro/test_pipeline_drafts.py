"""How long does it take to make a round's four drafts for a pipeline? Latents are SDXL's, [1, 4, 128, 128] bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from pytest_benchmark.fixture import BenchmarkFixture

from drp.diffusers.drafting import Drafter

SHAPE, DRAFTS, FIRST = (1, 4, 128, 128), 4, 6
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "dpm++": lambda: DPMSolverMultistepScheduler(**BETAS),
    "flow": FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_of_the_scheduler_that_is_stepped(name: str, benchmark: BenchmarkFixture) -> None:
    """What `parallelize` does: its drafts are the scheduler's own to the bit, noise and rounding included."""
    torch.set_num_threads(1)
    scheduler, x = SCHEDULERS[name](), torch.randn(SHAPE, dtype=torch.bfloat16)
    scheduler.set_timesteps(24)
    drafter = Drafter(scheduler)
    for k, t in enumerate(scheduler.timesteps[:FIRST]):
        output = torch.randn_like(x)
        drafter.follow(k, drafter.read((output, t, x), {}))
        drafter.note(k, x, output)
        x = scheduler.step(output, t, x).prev_sample
    drafts = benchmark(lambda: list(drafter.states(FIRST, FIRST + DRAFTS - 1, x, lambda index, state: None)))
    assert len(drafts) == DRAFTS


def test_one_product(benchmark: BenchmarkFixture) -> None:
    """The least that it could be: every draft a sum of the state and two predictions, in float32, then rounded."""
    torch.set_num_threads(1)
    weights, known = torch.randn(DRAFTS, 3), torch.randn(3, *SHAPE).to(torch.bfloat16)
    drafts = benchmark(lambda: (weights @ known.float().flatten(1)).to(torch.bfloat16))
    assert drafts.isfinite().all()
