"""Whatever a denoiser writes to, a prediction depends on its arguments only, and nothing of the caller's changes.

Workers and the reference give the samples of the same denoiser written without in-place operations, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import drp
from drp import Leader
from drp.leader.scheduling.policies import LoadAdaptive
from drp.models import load
from tests.conftest import dispatching
from tests.writing import KINDS, cond, make_once

MODEL = "tests.writing:make_once"
SHAPE = (2, 3)
WAYS = ("async", "sync, hedged", "batched, sync", "batched, async")
RUNS = st.fixed_dictionaries(
    {
        "drafts": st.integers(1, 4),
        "mode": st.sampled_from(["sequential", "aggressive", "conservative", "adaptive", "rolling"]),
        "steps": st.integers(1, 9),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(scope="module")
def two() -> Iterator[Leader]:
    with Leader(MODEL, devices=2) as leader:
        yield leader


@pytest.fixture(scope="module")
def batched() -> Iterator[Leader]:
    with Leader(MODEL, drafts_per_device=2) as leader:
        yield leader


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, two: Leader, batched: Leader) -> Iterator[tuple[Leader, int]]:
    """A leader, and how many drafts it evaluates as a batch."""
    two.policy = LoadAdaptive(hedge=1.1) if "hedged" in request.param else "load-adaptive"
    leader, batch = (batched, 2) if "batched" in request.param else (two, 1)
    with dispatching(leader, "async" if "async" in request.param else "sync"):
        yield leader, batch


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(run=RUNS)
def test_a_denoiser_that_writes_has_the_samples_of_one_that_does_not(
    way: tuple[Leader, int], kind: str, run: dict[str, Any]
) -> None:
    leader, batch = way
    run |= {"shape": SHAPE}
    given = cond(kind)
    samples = leader.sample(cond=given, **run).samples
    assert torch.equal(samples, drp.reference(MODEL, drafts_per_device=batch, cond=given, **run).samples)
    pure = drp.reference(MODEL, drafts_per_device=batch, cond=cond(kind, pure=True), **run).samples
    if kind in ("parameter", "timestep", "gradient"):  # The order of these products is another.
        torch.testing.assert_close(samples, pure)
    else:
        assert torch.equal(samples, pure)
    assert all(torch.equal(value, cond(kind)[name]) for name, value in given.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_noise_and_module_stay_as_they_are(kind: str) -> None:
    before = {name: value.clone() for name, value in make_once().state_dict().items()}
    noise = torch.randn(2, *SHAPE)
    kept = noise.clone()
    for _ in range(2):
        drp.reference(MODEL, shape=SHAPE, count=2, noise=noise, cond=cond(kind), steps=3, drafts=2)
    assert torch.equal(noise, kept)
    for name, value in make_once().state_dict().items():
        assert torch.equal(value, before[name]) or name == "weight", name


def test_a_result_of_another_kind_is_refused_by_the_reference_as_by_workers() -> None:
    with pytest.raises(TypeError, match=r"returned torch.float32 \[1, 1, 3, 4\]; it must return torch.float32"):
        drp.reference("tests.denoisers:make_misshapen", shape=(1, 4, 4), steps=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_result_that_is_no_number_is_refused_by_the_reference_as_by_workers(value: float, batch: int) -> None:
    noise = torch.zeros(1, 4)
    noise[0, 2] = value
    with pytest.raises(FloatingPointError, match=r"^the denoiser returned (NaN|infinity) in 'x', as it was given$"):
        drp.reference("tests.denoisers:make_free", shape=(4,), noise=noise, steps=3, drafts=2, drafts_per_device=batch)


def test_a_callback_may_write_to_its_state(way: tuple[Leader, int]) -> None:
    leader, batch = way
    run: dict[str, Any] = {"shape": SHAPE, "steps": 9, "drafts": 3, "cond": cond("view")}
    expected = leader.sample(**run).samples
    kept = []

    def spoil(k: int, state: Tensor) -> None:
        kept.append(state)
        state.fill_(float(k))

    assert torch.equal(leader.sample(**run, callback=spoil).samples, expected)
    assert torch.equal(drp.reference(MODEL, drafts_per_device=batch, **run, callback=spoil).samples, expected)
    assert [float(state.mean()) for state in kept] == [*range(1, 10)] * 2


def test_a_denoiser_is_evaluated_in_inference_mode_unless_it_takes_gradients() -> None:
    denoiser = load(MODEL)
    x, t = torch.ones(1, *SHAPE), torch.full((1,), 500.0)
    assert denoiser(x, t, cond("view")).is_inference()
    taken = denoiser(x, t, cond("gradient"))
    assert not taken.is_inference()
    assert not taken.requires_grad
