"""Several drafts of a round as one batch on one device: see also test_async_runs and test_writing, for the bits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import drp
from drp import Leader
from tests.denoisers import ill

TINY = "tests.denoisers:Tiny"


def test_batches_are_no_more_messages_than_they_must_be() -> None:
    calls: list[int] = []

    def count(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        calls.append(len(x))
        assert len(t) == len(x)
        return torch.sin(x)

    from drp.leader.job import make_job
    from drp.leader.request import Request
    from drp.protocol.messages import ModelSpec
    from drp.sampling.reference import run_reference

    job = make_job(Request(count=2, shape=(3,), steps=9, mode="aggressive"), ModelSpec(), 4)
    run_reference(count, job.solver, job.mode, job.start, job.cond, batch=4)
    assert calls == [2, 8, 8]  # the first alone, then four drafts of two samples each


@pytest.fixture(scope="module")
def ailing() -> Iterator[Leader]:
    """A worker that evaluates three drafts at once, and fails if a run asks for that."""
    with Leader("tests.denoisers:make_ailing", drafts_per_device=3) as leader:
        yield leader


def test_conditions_follow_their_samples_through_a_batch(ailing: Leader) -> None:
    shift = torch.linspace(-1, 1, 6).view(2, 3)
    options = {"count": 2, "shape": (3,), "steps": 8, "cond": {"shift": shift}, "mode": "aggressive"}
    run = ailing.sample(**options)  # type: ignore[arg-type]  # the values' types are lost in the dict
    alone = drp.reference("tests.denoisers:make_free", drafts=3, **options)  # type: ignore[arg-type]  # likewise
    torch.testing.assert_close(run.samples, alone.samples)  # Evaluated one by one; rounding may differ, no more.


def test_a_batch_of_a_killed_worker_is_evaluated_as_the_same_batch_elsewhere() -> None:
    with Leader("tests.denoisers:make_slow_sine", devices=2, drafts_per_device=3) as leader:
        pid = leader.workers[1].pid
        assert pid is not None
        killer = threading.Timer(0.15, os.kill, (pid, signal.SIGKILL))
        killer.start()
        run = leader.sample(count=2, shape=(5,), steps=48)
        killer.join()
        deadline = time.monotonic() + 10
        while not run.incidents and time.monotonic() < deadline:
            run = leader.sample(count=2, shape=(5,), steps=48)
    ref = drp.reference("tests.denoisers:make_slow_sine", count=2, shape=(5,), steps=48, devices=2, drafts_per_device=3)
    assert run.incidents
    assert torch.equal(run.samples, ref.samples)


def test_a_wrong_number_in_any_draft_of_a_batch_is_found(ailing: Leader) -> None:
    with pytest.raises(drp.WorkerError, match="returned NaN in 'x'"):
        ailing.sample(count=1, shape=(4,), steps=12, cond=ill("make_nan"))
    assert ailing.workers[0].state == "ready"


@pytest.mark.parametrize("batch", [0, -1, 256, 1.5, True])
def test_what_is_no_number_of_drafts_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match=r"drafts_per_device is .*; give a whole number, 1 to 255"):
        Leader(TINY, drafts_per_device=batch)
