"""The leader's stream on the host: a queue of operations that the engine's thread executes.

It does what it is given as far as no worker has to be waited for, and says when to go on.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from torch import Tensor

from drp.protocol.timeline import POLL_INTERVAL, RECHECK_INTERVAL, TimelineSemaphore, memory_barrier
from drp.protocol.waiting import sched_yield

EARLY_WAKEUP = 800e-6
"""Seconds before a time that is known at which the thread wakes up, since it may do so late, and looks until then.

Only emulated devices say when they will be done. On 2 cores a run of 7 rounds on 8 of them takes 1.04 times as long
without at 5 ms an evaluation, and 1.02 times at 20 ms (docs/round.md).
"""


CorePlacement = Literal["dedicated", "shared"]
"""Where the thread runs while workers compute. Dedicated: on a core that no worker uses; it is told of each record.
Shared: there is none; it is told once all are done."""


class HostStream:
    """`put` and `wait` give, in one thread; `go` does."""

    def __init__(self, room: CorePlacement = "dedicated") -> None:
        self._core_placement = room
        self._operations: deque[Callable[[], object] | _Wait | _Signal] = deque()
        self._notified_by: set[TimelineSemaphore] = set()
        """Those of which this thread wanted to be told last."""
        self._enqueued_count = self._done_count = self.pending_waits = 0

    def enqueue(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before."""
        self._enqueued_count += 1
        self._operations.append(do)

    def enqueue_wait(self, line: TimelineSemaphore, count: int, told: bool) -> None:
        """Have what is given from now on wait for a record; `told`: its process says so if that is wanted."""
        self._enqueued_count += 1
        self.pending_waits += 1
        self._operations.append(_Wait(line, count, told))

    def run_ready(self) -> float | None:
        """Do what can be done; return when to go on, in seconds of perf_counter, or None if nothing is left."""
        while self._operations:
            first = self._operations[0]
            if isinstance(first, _Wait):
                since = first.completed_at()
                asked = since is None and first.notifies
                if asked:
                    self._request_wakeup()
                    since = first.completed_at()
                if since is None:
                    return time.perf_counter() + (RECHECK_INTERVAL if asked else POLL_INTERVAL)
                if since / 1e9 > time.perf_counter() + EARLY_WAKEUP:
                    return since / 1e9 - EARLY_WAKEUP
                while time.perf_counter_ns() < since:
                    sched_yield()
                self.pending_waits -= 1
            self._operations.popleft()
            self._done_count += 1
            if not isinstance(first, _Wait):
                first()
        return None

    def _request_wakeup(self) -> None:
        """Have this thread woken: for the first wait, or once all are done.

        Look again after this: it may be so already, and then nobody tells.
        """
        waits = self._waits_before_signal()[: 1 if self._core_placement == "dedicated" else None]
        lines = {wait.semaphore for wait in waits}
        for line in self._notified_by - lines:
            line.request_notification(
                0, alone=True
            )  # Else it would seem to have been told of already, by somebody who was earlier.
        for wait in waits:
            wait.semaphore.request_notification(wait.value, alone=self._core_placement == "dedicated")
        self._notified_by = lines
        memory_barrier()

    def _waits_before_signal(self) -> list[_Wait]:
        """Return the waits that come before this thread records again."""
        before = itertools.takewhile(lambda each: not isinstance(each, _Signal), self._operations)
        return [each for each in before if isinstance(each, _Wait)]

    def record(self) -> int:
        """Return how much was given."""
        return self._enqueued_count

    def query(self, mark: int) -> bool:
        """Whether so much was done."""
        return self._done_count >= mark

    def synchronize(self) -> None:
        """Do all of it; only where nothing that was given waits for another process."""
        if self.run_ready() is not None:
            raise RuntimeError("what was given waits for another process")

    def current(self) -> AbstractContextManager[object]:
        """Do nothing: it is used by `put`."""
        return contextlib.nullcontext()

    def side_stream(self) -> AbstractContextManager[object]:
        """Do nothing: what was done is there."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Drop what was not done."""
        self._operations.clear()


class HostEvent:
    """A side's records as a lane sees them: the leader's own, or a worker's, which it waits for."""

    def __init__(self, line: Tensor, lane: HostStream, told: bool = False) -> None:
        self._semaphore, self._stream, self._notifies = TimelineSemaphore(line), lane, told

    def record(self) -> int:
        """Count, and have the lane say when it is there."""
        count = self._semaphore.next_value()
        self._stream.enqueue(_Signal(self._semaphore, count))
        return count

    def wait(self) -> None:
        """Have the lane wait for the next."""
        self._stream.enqueue_wait(self._semaphore, self._semaphore.next_value(), self._notifies)

    def cancel_before(self, least: int) -> None:
        """Let workers not begin what waits for a record below this one."""
        self._semaphore.cancel_before(least)

    def release(self) -> None:
        """Count what was recorded as done."""
        self._semaphore.release()


class _Signal:
    """A record of the leader's own."""

    def __init__(self, line: TimelineSemaphore, count: int) -> None:
        self._semaphore, self._value = line, count

    def __call__(self) -> None:
        self._semaphore.signal(self._value, time.perf_counter_ns())
        self._semaphore.wake_waiters()
        sched_yield()  # What else there is to be done can wait: it may be a worker's core that this thread is on.


class _Wait:
    """For a record of a worker."""

    def __init__(self, line: TimelineSemaphore, count: int, told: bool) -> None:
        self.semaphore, self.value, self.notifies = line, count, told

    def completed_at(self) -> int | None:
        """Return since when it is done, in nanoseconds of CLOCK_MONOTONIC, None if it is not."""
        return self.semaphore.completed_at(self.value)
