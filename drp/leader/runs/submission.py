"""A submitted run: its future, its job, and how the engine executes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal

from drp.leader.clock import Clock
from drp.leader.job import Job
from drp.leader.memory.placement import MemoryPlacement
from drp.sampling.result import Result
from drp.sampling.run import Callback

log = logging.getLogger(__name__)


class RunFuture(Future[Result]):
    """The future of a submitted run: a `concurrent.futures.Future` whose `cancel` also ends a run that is running.

    number: the run's number in timelines, None until the run starts.
    steps: the number of steps of the run's grid, 0 until the run starts.
    rounds: the number of rounds done so far.
    """

    number: int | None = None
    steps = 0
    rounds = 0

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._notify = wake
        self.cancel_requested = False

    def cancel(self) -> bool:
        """Request cancellation of the run, after which `result` raises CancelledError; return False if it is over.

        The run ends within a round. Its workers are free for other runs as soon as they have answered.
        """
        over = self.done()
        self.cancel_requested = True
        if not over:
            self._notify()
        return not over

    def add_done_callback(self, fn: Callable[[Future[Result]], object]) -> None:
        """Call `fn` with this future once it is done, in the leader's thread, or immediately if it is done already.

        An exception in the leader's thread is logged and does not prevent other callbacks from being called.
        """
        super().add_done_callback(fn if self.done() else partial(_call_done_callback, fn))


def _call_done_callback(fn: Callable[[Future[Result]], object], future: Future[Result]) -> None:
    try:
        fn(future)
    except BaseException:  # Future itself only handles Exception; SystemExit would end the leader's thread.
        log.exception("a done-callback raised")


@dataclass(frozen=True)
class Submission:
    """A run that was submitted: its job, the user's callback, and the future that the caller holds."""

    job: Job
    callback: Callback | None
    future: RunFuture


@dataclass(frozen=True)
class RunConfig:
    """How the engine executes a run.

    number: the run's number, which is unique within the leader.
    dispatch: whether the run waits for each prediction before it sends the drafts that are made of it.
    workers: the number of workers.
    batch: the number of drafts that a worker evaluates as one batch.
    spare_rows: the rows in the run's memory beyond those that it reads, to which workers may write.
    placement: where the run's memory is.
    clock: the leader's clock.
    """

    number: int
    dispatch: Literal["sync", "async"]
    workers: int
    batch: int
    spare_rows: int
    placement: MemoryPlacement
    clock: Clock
