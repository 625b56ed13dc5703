"""Asynchronous dispatch: work, and waits for other processes' work, are queued on streams.

A *stream* executes operations in order, after the caller has returned. On a GPU it is a CUDA stream. On the host a
worker's stream is a thread, and the leader's is a queue that the engine's own thread executes, since a second thread
would contend for the interpreter's lock.

An *event* joins two streams: `record` marks what one stream has queued so far, and `wait` makes another stream wait for
it. On the host, events have numbers that are known in advance, so either side can wait for an event that the other has
not recorded yet. The leader's events on a GPU are CUDA events, which have no numbers: a wait refers to the last record.

A *completion record* is written after a prediction and read before the prediction is used. It proves that what was read
was finished, whatever happened to the events.

An event completes at a *time*. A thread that emulates a device knows in advance when its work will be finished, and
writes that time; a waiter then waits until that time, and no thread has to wake up on the device's side.

This module has the semaphores and completion records on the host; `drp.protocol.cuda` has their counterparts on a GPU.
"""

from __future__ import annotations

import cmath
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from drp.protocol.memory import ALIGNMENT
from drp.protocol.waiting import Futex

POLL_INTERVAL = 50e-6
"""Seconds between two polls of a number that a device writes."""

RECHECK_INTERVAL = 0.05
"""Seconds after which another process's number is read again without a notification."""

COMPLETION_SIZE = 3
"""Numbers (int64) of a completion record: the status word; the evaluation's nanoseconds, 0 if unknown; and the time of
its end in nanoseconds of CLOCK_MONOTONIC, 0 if unknown."""
PENDING = -1
"""In place of a status word: the completion record was not read yet."""
OK, NOT_FINITE, RAISED, CANCELLED = 0, 1, 2, 3
"""The status in a status word, beside the draft's sequence number. With the last two there is no prediction."""
STATUS_COUNT = 4

TIMELINE_NBYTES = ALIGNMENT
"""Bytes of a timeline semaphore in shared memory."""
COMPLETED, NOTIFY_ALL, NOTIFY_FIRST, CANCELLED_BELOW, TIMESTAMPS, RING_SIZE = 0, 1, 2, 3, 8, 8
"""Indices of its int64 numbers; the layout is drawn in `TimelineSemaphore`."""
CANCEL_ALL = 2**62
"""A value of CANCELLED_BELOW that cancels all drafts."""


class Stream(Protocol):
    """Executes operations in order. One thread enqueues.

    `pending_waits`: how many queued waits this thread itself still has to execute; 0 if another one executes them.
    """

    pending_waits: int

    def enqueue(self, do: Callable[..., object], *args: Any) -> None:
        """Execute `do(*args)` after what was enqueued before; on a GPU, it queues work on the current stream."""
        ...

    def run_ready(self, notify: bool = True) -> float | None:
        """Execute what is ready, if this thread executes the stream.

        With `notify`, request a notification of the completion that the next operation waits for; only needed before
        this thread sleeps. Return when to call this again, in seconds of `time.perf_counter`; None if nothing is left
        for this thread. Raises what an operation raised.
        """
        ...

    @property
    def current(self) -> AbstractContextManager[object]:
        """A context in which this is the thread's current CUDA stream."""
        ...

    def record(self) -> Any:
        """Return an event after what was enqueued so far."""
        ...

    def query(self, mark: Any) -> bool:
        """Whether everything before the event was executed; does not wait."""
        ...

    def synchronize(self) -> None:
        """Wait until everything was executed. Only allowed if no operation waits for another process."""
        ...

    @property
    def side_stream(self) -> AbstractContextManager[object]:
        """A context with another current stream, for reading what was computed before an event."""
        ...

    def close(self) -> None:
        """Execute nothing more."""
        ...


class OwnEvent(Protocol):
    """An event that this process records."""

    def record(self) -> int:
        """Record what was queued so far, for others to wait for; return the event's number, 0 if it has none."""
        ...


class LeaderOwnEvent(OwnEvent, Protocol):
    """The leader's event, in the leader."""

    def cancel_before(self, least: int) -> None:
        """Cancel drafts that wait for an event with a number below `least`, where workers can see it."""
        ...


class LeaderEvent(Protocol):
    """The leader's event, in a worker."""

    def wait(self, number: int) -> None:
        """Make the stream wait for the event of this number; where events have no numbers, for the last one."""
        ...


class WorkerEvent(Protocol):
    """A worker's event, in the leader; it outlives the worker."""

    def wait(self) -> None:
        """Make the stream wait for the worker's next event."""
        ...

    def release(self) -> None:
        """Release the stream from waits for a worker that is gone."""
        ...


_BARRIER = threading.Lock()


def memory_barrier() -> None:
    """Order the writes before this call before the reads after it; acquiring a lock does so."""
    with _BARRIER:
        pass


class TimelineSemaphore:
    """A timeline semaphore in memory that leader and workers map: int64 [TIMELINE_NBYTES / 8].

        int64     in the leader's                        in a worker's
        [0]       completed: number of the last event    completed: number of the last event
        [1]       unused                                 notify when all workers have reached their [1]; 0: never
        [2]       unused                                 notify when this worker reaches this number; 0: never
        [3]       drafts that wait for an event below    unused
                  this number are cancelled
        [8 + i]   completion time of the event whose number modulo 8 is i, ns of CLOCK_MONOTONIC

    Both sides count events for themselves, from the number that is completed when they start.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._array = numbers.numpy()
        self._numbers = self._array.data  # faster to index than an array
        self.restart()

    def restart(self) -> None:
        """Continue counting from the completed number."""
        self._last_value = self._numbers[COMPLETED]

    def next_value(self) -> int:
        self._last_value += 1
        return self._last_value

    def signal(self, count: int, ns: int) -> None:
        """Complete the event `count` at the time `ns`, which may lie ahead."""
        self._numbers[TIMESTAMPS + count % RING_SIZE] = ns
        self._numbers[COMPLETED] = count

    @cached_property
    def _futex(self) -> Futex:
        return Futex(self._array, COMPLETED)

    def wake_waiters(self) -> None:
        """Wake the processes that sleep in `wait`."""
        self._futex.wake()

    def completed_at(self, count: int) -> int | None:
        """Return when the event `count` completed, in nanoseconds of CLOCK_MONOTONIC; None if it has not."""
        return self._numbers[TIMESTAMPS + count % RING_SIZE] if self._numbers[COMPLETED] >= count else None

    def request_notification(self, count: int, alone: bool) -> None:
        """Ask for a notification at the event `count`, `alone` or once all workers reached theirs; 0: never.

        Read the completed number again after a `memory_barrier`: the worker may have completed the event already.
        """
        self._numbers[NOTIFY_ALL], self._numbers[NOTIFY_FIRST] = (0, count) if alone else (count, 0)

    def wait(self, count: int, seconds: float) -> None:
        """Sleep until the event `count` completes, for at most `seconds`; spurious returns are possible."""
        if (reached := self._numbers[COMPLETED]) < count:
            self._futex.wait(reached, seconds)

    def is_cancelled(self, count: int) -> bool:
        """Whether drafts that wait for the event `count` are cancelled."""
        return self._numbers[CANCELLED_BELOW] > count

    def cancel_before(self, least: int) -> None:
        """Cancel drafts that wait for an event below `least`."""
        self._numbers[CANCELLED_BELOW] = least

    def release(self) -> None:
        """Complete all events that were counted, for a process that is gone."""
        for place in range(TIMESTAMPS, TIMESTAMPS + RING_SIZE):
            self._numbers[place] = 0
        self._numbers[COMPLETED] = self._last_value


class WorkerTimelines:
    """The semaphores of all workers of a run, int64 [workers, TIMELINE_NBYTES / 8], as mapped by one of them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.numpy().data
        self._all = range(len(numbers))

    def notification(self, own: int, count: int) -> bool:
        """Return whether the worker at index `own` has to notify the leader of its event `count`."""
        memory_barrier()
        numbers = self._numbers
        if numbers[own, NOTIFY_FIRST] == count:
            return True
        wanted = numbers[own, NOTIFY_ALL] == count
        return bool(wanted and all(numbers[i, COMPLETED] >= numbers[i, NOTIFY_ALL] for i in self._all))


def encode_status(sequence: int, status: int) -> int:
    """Return the status word of a completion record."""
    return sequence * STATUS_COUNT + status


def decode_status(word: int, sequence: int) -> int | None:
    """Return the status in a word; None if the word is not of the draft with this sequence number."""
    status = word - encode_status(sequence, 0)
    return status if 0 <= status < STATUS_COUNT else None


def write_completion(
    place: Tensor, sequence: int, prediction: Iterable[Tensor], nanoseconds: int = 0, ended: int = 0
) -> None:
    """Write a completion record to `place`, int64 [COMPLETION_SIZE], on the prediction's device and current stream."""
    finite = torch.stack([tensor.isfinite().all() for tensor in prediction]).all()
    word = encode_status(sequence, NOT_FINITE) - finite.long()
    place.copy_(torch.stack([word, *(torch.full_like(word, n) for n in (nanoseconds, ended))]), non_blocking=True)


def write_completion_now(
    places: memoryview, row: int, sequence: int, nanoseconds: int = 0, ended: int = 0, status: int = OK
) -> None:
    """Write a completion record on the host. `places` are int64 [rows, COMPLETION_SIZE]."""
    places[row, 0], places[row, 1], places[row, 2] = encode_status(sequence, status), nanoseconds, ended


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor on the host are finite.

    The sum is finite only if all terms are, and takes one pass; if it is not, it may have overflowed, so look closer.
    """
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
