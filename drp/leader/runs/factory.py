"""The kind of run that carries out a request: one of few places that know both."""

from __future__ import annotations

from drp.leader.clock import Clock
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.request import Job, Request
from drp.leader.runs.async_run import AsyncRun
from drp.leader.runs.run_state import RunFuture, SyncRun


def make_run(
    number: int,
    job: Job,
    request: Request,
    pending: RunFuture,
    spare: int,
    batch: int,
    placement: MemoryPlacement,
    workers: int,
    clock: Clock,
) -> SyncRun:
    """Return a run whose memory has `spare` rows beside those that it reads; `batch` drafts are evaluated as one."""
    run: SyncRun
    if placement.asynchronous:
        run = AsyncRun(number, job, request, pending, spare, batch, placement, workers, clock)
    else:
        run = SyncRun(number, job, request, pending, spare, batch, placement.allocate)
    if placement.nvtx:
        run.annotate_nvtx()
    return run
