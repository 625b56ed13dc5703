"""The choice between synchronous and asynchronous runs."""

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
    """Create the run for a job.

    Args:
        spare: rows in the run's memory beyond those that it reads, to which workers may write.
        batch: the number of drafts that a worker evaluates as one batch.
    """
    run: SyncRun
    if placement.asynchronous:
        run = AsyncRun(number, job, request, pending, spare, batch, placement, workers, clock)
    else:
        run = SyncRun(number, job, request, pending, spare, batch, placement.allocate)
    if placement.nvtx:
        run.annotate_nvtx()
    return run
