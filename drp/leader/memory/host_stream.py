"""The leader's stream on the host: a queue of operations that the engine's thread executes in order.

It plays the part of a CUDA stream for runs in host memory. Execution stops at the first wait for a worker that is not
complete, and the caller learns when to try again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from torch import Tensor

from drp.protocol.timeline import POLL_INTERVAL, RECHECK_INTERVAL, TimelineSemaphore, memory_barrier
from drp.protocol.waiting import sched_yield

EARLY_WAKEUP = 800e-6
"""Seconds before a known completion time at which the thread wakes up and polls, since a timer may fire late.

Only emulated devices announce their completion times. On 2 cores, without this a run of 7 rounds on 8 emulated devices
takes 1.04 times as long at 5 ms per evaluation, and 1.02 times at 20 ms (docs/round.md).
"""


CorePlacement = Literal["dedicated", "shared"]
"""The core on which the leader's thread runs while workers compute.

dedicated: a core that no worker uses. The thread is notified of the completion that it waits for next.
shared: every core has a worker. The thread is notified only once all the completions that it waits for have occurred.
"""


class HostStream:
    """A queue of operations: `enqueue` and `enqueue_wait` append to it, `run_ready` executes it, all in one thread.

    Operations are of three kinds: functions, waits for a worker's timeline semaphore (`_Wait`), and signals of the
    leader's own (`_Signal`).
    """

    current: Final[AbstractContextManager[object]] = contextlib.nullcontext()
    """It does nothing: operations are enqueued explicitly."""
    side_stream = current
    """Executed operations are complete, so no other stream is needed."""

    def __init__(self, core_placement: CorePlacement = "dedicated") -> None:
        self._core_placement = core_placement
        self._operations: deque[Callable[[], object] | _Wait | _Signal] = deque()
        self._notified_by: set[TimelineSemaphore] = set()
        """The semaphores from which this thread last requested a notification."""
        self._enqueued_count = self._done_count = self.pending_waits = 0

    def enqueue(self, do: Callable[..., object], *args: Any) -> None:
        """Append a call of a function, to be made after all earlier operations."""
        self._enqueued_count += 1
        self._operations.append(partial(do, *args) if args else do)

    def enqueue_wait(self, semaphore: TimelineSemaphore, count: int, notifies: bool) -> None:
        """Have all later operations wait until a semaphore reaches a value.

        Args:
            semaphore: the worker's semaphore.
            count: the value to wait for.
            notifies: whether the worker sends a notification on request; otherwise the semaphore is polled.
        """
        self._enqueued_count += 1
        self.pending_waits += 1
        self._operations.append(_Wait(semaphore, count, notifies))

    def run_ready(self, notify: bool = True) -> float | None:
        """Execute all operations that are ready.

        Args:
            notify: whether to request a notification for the next wait, because this thread is about to sleep.

        Returns:
            When to call this again, in seconds of perf_counter; None if the queue is empty.
        """
        while self._operations:
            first = self._operations[0]
            if isinstance(first, _Wait):
                since = first.semaphore.completed_at(first.value)
                requested = notify and since is None and first.notifies
                if requested:
                    self._request_wakeup()
                    since = first.semaphore.completed_at(first.value)
                if since is None:
                    return time.perf_counter() + (RECHECK_INTERVAL if requested else POLL_INTERVAL)
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
        """Request a notification for the first wait, or, on a shared core, once all waits before a signal are complete.

        The caller must check the semaphore again afterwards: if it completed before the request, no notification comes.
        """
        waits = self._waits_before_signal()[: 1 if self._core_placement == "dedicated" else None]
        semaphores = {wait.semaphore for wait in waits}
        for semaphore in self._notified_by - semaphores:
            # Withdraw the old request, which would otherwise take part in deciding which worker notifies.
            semaphore.request_notification(0, alone=True)
        for wait in waits:
            wait.semaphore.request_notification(wait.value, alone=self._core_placement == "dedicated")
        self._notified_by = semaphores
        memory_barrier()

    def _waits_before_signal(self) -> list[_Wait]:
        """Return the waits that precede this thread's next signal."""
        waits: list[_Wait] = []
        for operation in self._operations:
            if isinstance(operation, _Signal):
                break
            if isinstance(operation, _Wait):
                waits.append(operation)
        return waits

    def record(self) -> int:
        """Return an event for all operations enqueued so far, as a count."""
        return self._enqueued_count

    def query(self, event: int) -> bool:
        """Whether the operations up to an event were executed."""
        return self._done_count >= event

    def synchronize(self) -> None:
        """Execute all operations; only valid if none of them waits for another process."""
        if self.run_ready() is not None:
            raise RuntimeError("an enqueued operation waits for another process")

    def close(self) -> None:
        """Discard the operations that were not executed."""
        self._operations.clear()


class HostEvent:
    """An event on a host stream, backed by a timeline semaphore: the leader's own, or a worker's to wait for."""

    def __init__(self, semaphore: Tensor, stream: HostStream, notifies: bool = False) -> None:
        self._semaphore, self._stream, self._notifies = TimelineSemaphore(semaphore), stream, notifies

    def record(self) -> int:
        """Enqueue a signal of the next value, and return the value."""
        count = self._semaphore.next_value()
        self._stream.enqueue(_Signal(self._semaphore, count))
        return count

    def wait(self) -> None:
        """Have later operations of the stream wait for the next value."""
        self._stream.enqueue_wait(self._semaphore, self._semaphore.next_value(), self._notifies)

    def cancel_before(self, least: int) -> None:
        """Have workers skip evaluations that wait for a value below `least`."""
        self._semaphore.cancel_before(least)

    def release(self) -> None:
        """Mark all requested values as complete, so that nothing waits for them any longer."""
        self._semaphore.release()


class _Signal:
    """An operation that signals the leader's own semaphore."""

    def __init__(self, semaphore: TimelineSemaphore, count: int) -> None:
        self._semaphore, self._value = semaphore, count

    def __call__(self) -> None:
        self._semaphore.signal(self._value, time.perf_counter_ns())
        self._semaphore.wake_waiters()
        sched_yield()  # A worker that was just signalled may need the core that this thread runs on.


@dataclass(frozen=True)
class _Wait:
    """An operation that waits until a worker's semaphore reaches a value.

    An emulated device announces its completion time in advance, so that time may lie in the future.
    """

    semaphore: TimelineSemaphore
    value: int
    notifies: bool
