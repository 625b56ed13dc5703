"""Asynchronous runs whose workers or denoisers fail: predictions that were not completed are evaluated again."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import drp
from drp import WorkerError
from drp.leader.runs.run_state import PendingCompletion
from drp.protocol.timeline import (
    PENDING,
)
from drp.workers.cuda_errors import UNRECOVERABLE_ERRORS, is_unrecoverable
from tests.async_runs import DEADLINE, PLAIN, STEPS, Misbehaving, Steps, acknowledge, expected, misbehaving_workers
from tests.conftest import dispatching, leftovers, what_stays
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("what", "words", "mode", "acknowledges"),
    [
        ("kill", r"was killed by SIGKILL; its crash log is empty", "aggressive", False),
        ("kill", "SIGKILL", "conservative", True),
        ("hang", r"has not evaluated step \d+ of run \d+ within 3 s \(draft_timeout\)", "conservative", False),
        ("stale", "without a valid completion record", "rolling", False),
        ("early", "without a valid completion record", "aggressive", False),
        ("early", "without a valid completion record", "adaptive", True),
        ("assert", "device-side assert", "conservative", False),
    ],
)
def test_what_was_not_proven_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    misbehaving: Misbehaving,
    what: str,
    words: str,
    mode: str,
    acknowledges: bool,
) -> None:
    acknowledge(monkeypatch, misbehaving.leader, acknowledges, size=1)
    mine, theirs = Steps(), Steps()
    leader = misbehaving.tell(what, tmp_path / "once")
    run = leader.submit(shape=(3,), steps=STEPS, mode=mode, callback=mine).result(DEADLINE)
    ref = drp.reference(PLAIN, shape=(3,), steps=STEPS, mode=mode, devices=2, callback=theirs)
    assert (tmp_path / "once").exists()
    assert torch.equal(run.samples, ref.samples)
    assert (run.rounds, run.evaluations) == (ref.rounds, ref.evaluations)
    assert mine.equals(theirs)  # each step once, and no state that was made of what was not there
    assert re.search(words, run.incidents[0])
    assert "went back to step" in run.incidents[1]
    assert len(run.incidents) == 2  # Who only waited for it is not blamed.
    until(lambda: [worker.state for worker in leader.workers] == ["ready"] * 2)
    after = leader.sample(shape=(3,), steps=STEPS, mode=mode)
    assert torch.equal(after.samples, ref.samples)
    assert not after.incidents


def test_no_state_is_handed_out_before_it_is_proven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving
) -> None:
    """The leader sees late here that a stamp is none: when the states made of what was not there are long computed."""
    verdict = PendingCompletion.status.fget  # type: ignore[attr-defined]  # of a property

    def late(answer: PendingCompletion) -> int | None:
        seen: int | None = verdict(answer)
        return PENDING if seen is None and time.monotonic() < answer.since + 0.3 else seen

    monkeypatch.setattr(PendingCompletion, "status", property(late))
    mine, theirs = Steps(), Steps()
    leader = misbehaving.tell("early", tmp_path / "once")
    run = leader.submit(shape=(3,), steps=STEPS, callback=mine).result(DEADLINE)
    drp.reference(PLAIN, shape=(3,), steps=STEPS, devices=2, callback=theirs)
    assert "without a valid completion record" in run.incidents[0]
    assert mine.equals(theirs)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", r"worker \d .*failed evaluating step \d+ of run \d+: .*the denoiser returned NaN"),
        ("raise", r"worker \d .*failed evaluating step \d+ of run \d+: ArithmeticError: (.|\n)*in predict"),
        ("memory", r"worker \d .*failed evaluating step \d+ of run \d+: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_what_the_denoiser_does_ends_its_run_only(
    tmp_path: Path, misbehaving: Misbehaving, what: str, words: str
) -> None:
    leader = misbehaving.tell(what, tmp_path / "once")
    before = [worker.losses for worker in leader.workers]
    with pytest.raises(WorkerError, match=words):
        leader.submit(shape=(3,), steps=STEPS).result(DEADLINE)
    assert torch.equal(leader.sample(shape=(3,), steps=STEPS).samples, expected())
    assert [worker.losses for worker in leader.workers] == before


def test_a_lost_context_ends_the_worker_of_a_synchronous_run_too(misbehaving: Misbehaving, tmp_path: Path) -> None:
    leader = misbehaving.tell("assert", tmp_path / "once")
    before = sum(worker.losses for worker in leader.workers)
    with dispatching(leader, "sync"):
        run = leader.sample(shape=(3,), steps=STEPS)
    assert run.dispatch == "sync"
    assert torch.equal(run.samples, expected())
    assert len(run.incidents) == 1
    assert "device-side assert triggered" in run.incidents[0]
    assert sum(worker.losses for worker in leader.workers) == before + 1


def test_closing_in_the_middle_waits_for_nobody(tmp_path: Path) -> None:
    before = leftovers()
    with misbehaving_workers(tmp_path, devices=1) as started:
        leader = started.tell("wait", tmp_path / "never")
        pending = leader.submit(shape=(3,), steps=STEPS)
        until(lambda: any(worker.drafts > 1 for worker in leader.workers))
    assert pending.cancelled() or pending.exception(DEADLINE) is not None
    assert not what_stays(before)


def test_what_was_held_back_for_a_worker_that_is_lost_is_sent(misbehaving: Misbehaving) -> None:
    """The first worker never has its draft; the other has its own all the same, and is not taken for dead."""
    leader = misbehaving.leader
    before = [worker.losses for worker in leader.workers]
    pid = leader.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    run = leader.submit(shape=(3,), steps=STEPS, mode="aggressive").result(DEADLINE)
    assert torch.equal(run.samples, expected())
    assert [worker.losses for worker in leader.workers] == [before[0] + 1, before[1]]


def test_errors_after_which_cuda_is_of_no_use() -> None:
    kinds: list[type[RuntimeError]] = [RuntimeError]
    if hasattr(torch, "AcceleratorError"):  # from torch 2.8 on
        kinds.append(torch.AcceleratorError)
    for kind in kinds:
        for ending in UNRECOVERABLE_ERRORS:
            assert is_unrecoverable(kind(f"CUDA error: {ending}\nCUDA kernel errors might be asynchronously reported"))
        assert not is_unrecoverable(kind("CUDA error: invalid argument"))
        assert not is_unrecoverable(kind("CUDA error: out of memory"))
        assert not is_unrecoverable(kind("CUDA error: no kernel image is available for execution on the device"))
    from drp.errors import CudaError

    assert is_unrecoverable(CudaError("cudaEventRecord failed: an illegal memory access was encountered (700)"))
    assert not is_unrecoverable(CudaError("cudaMalloc failed: out of memory (2)"))
    assert not is_unrecoverable(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_unrecoverable(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_unrecoverable(ValueError("CUDA error: device-side assert triggered"))
