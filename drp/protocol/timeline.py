"""Asynchronous dispatch: work, and waits for other processes' work, are queued on streams.

A *stream* does what it is given in order, after the caller has gone on: on a GPU it is CUDA's; on the host a worker's
is a thread, and the leader's a list that its one thread works off: a second would wait for the interpreter's lock. A
*record* joins streams: one side's `record` says that what was queued so far is to count as done once it is, and `wait`
has another's stream wait for that. On the host records have numbers, known beforehand, so that either side can wait for
what the other was not yet asked to do; what the leader records on a GPU is an event, which has none, and is waited for
as it was last recorded. A *stamp* is written behind a prediction, and read before it is used: it proves that what was
read was finished, whatever became of the records.

What is recorded counts as done from a *time* on. That is now, for a thread that works; for one that stands for an
emulated device, which knows how long it takes, it may be later: whoever waits for it waits until then, and no thread
has to wake up on the device's side to say so, as none does on a GPU's.

Here are the numbers that both sides have on the host; `drp.protocol.cuda` has what a GPU has instead.
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
"""Seconds between two looks at a number that a device writes."""

RECHECK_INTERVAL = 0.05
"""Seconds after which a number of another process is looked at again, though nobody said that it has changed."""

COMPLETION_SIZE = 3
"""int64 numbers of a stamp: its word; the nanoseconds that the evaluation took, 0 if they are not known; and when it
ended, in nanoseconds of CLOCK_MONOTONIC, 0 likewise."""
PENDING = -1
"""In place of a word: no stamp was read yet."""
OK, NOT_FINITE, RAISED, CANCELLED = 0, 1, 2, 3
"""What a word says of a prediction beside the draft's sequence number; of the last two there is none."""
STATUS_COUNT = 4

TIMELINE_NBYTES = ALIGNMENT
"""Bytes of one side's records on the host."""
COMPLETED, NOTIFY_ALL, NOTIFY_FIRST, CANCELLED_BELOW, TIMESTAMPS, RING_SIZE = 0, 1, 2, 3, 8, 8
"""The int64 there: how many of its records are done; of a worker's, of which the leader wants to be told once all are
done of which it wants to be told so, and of which as soon as that one is; of the leader's, the least number that a
draft still wanted waits for; and since when the last RING of the records are done."""
CANCEL_ALL = 2**62
"""As LEAST: no draft is wanted any more."""


class Stream(Protocol):
    """Does what it is given in order. One thread gives.

    `waits`: how many waits are still to come for this thread, if they are its; 0 if they are not.
    """

    pending_waits: int

    def enqueue(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before; on a GPU, what `do` queues on the current stream."""
        ...

    def run_ready(self) -> float | None:
        """Do what can be done now, if that takes this thread; return when there is more, in seconds of perf_counter.

        None if there is not, or not for this thread. Raises what something given raised.
        """
        ...

    def current(self) -> AbstractContextManager[object]:
        """Make it the current stream of this thread for a while: what is queued on the GPU is queued here."""
        ...

    def record(self) -> Any:
        """Return a mark behind what was given so far."""
        ...

    def query(self, mark: Any) -> bool:
        """Whether everything before the mark was done; never waits."""
        ...

    def synchronize(self) -> None:
        """Wait until everything was done. Only where nothing that was given waits for another process."""
        ...

    def side_stream(self) -> AbstractContextManager[object]:
        """Make another stream the current one for a while, for those who look at what was done before a mark."""
        ...

    def close(self) -> None:
        """Do no more."""
        ...


class OwnEvent(Protocol):
    """A side's own records."""

    def record(self) -> int:
        """Let the others wait for all that was queued here so far; return the record's number, 0 if it has none."""
        ...


class LeaderOwnEvent(OwnEvent, Protocol):
    """The leader's own."""

    def cancel_before(self, least: int) -> None:
        """Let workers that look at that not begin a draft that waits for a record below this one."""
        ...


class LeaderEvent(Protocol):
    """The leader's, as a worker has them."""

    def wait(self, number: int) -> None:
        """Have the stream wait for the record of this number, or, where they have none, for the last one."""
        ...


class WorkerEvent(Protocol):
    """A worker's, as the leader has them: they outlive the worker."""

    def wait(self) -> None:
        """Have the stream wait for the next one; where they have no numbers, for the last, after a message."""
        ...

    def release(self) -> None:
        """Let the stream go on: the worker is gone, and what it was to record will not be done."""
        ...


_BARRIER = threading.Lock()


def memory_barrier() -> None:
    """Have what this thread has written be there before it looks at anything else: a lock sees to that."""
    with _BARRIER:
        pass


class TimelineSemaphore:
    """One side's records on the host: int64 [LINE / 8] in memory that both sides have mapped.

    Each counts for itself how many there are to be, from what there is when it begins.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._array = numbers.numpy()
        self._numbers = self._array.data  # which is read and written in a fraction of an array's time
        self.restart()

    def restart(self) -> None:
        """Count from what there is now."""
        self._last_value = self._numbers[COMPLETED]

    def next_value(self) -> int:
        """Count one more; return its number."""
        self._last_value += 1
        return self._last_value

    def signal(self, count: int, ns: int) -> None:
        """Say that so much of it is done, or will be at a time."""
        self._numbers[TIMESTAMPS + count % RING_SIZE] = ns
        self._numbers[COMPLETED] = count

    @cached_property
    def _futex(self) -> Futex:
        return Futex(self._array, COMPLETED)

    def wake_waiters(self) -> None:
        """Wake those that sleep until it has come further."""
        self._futex.wake()

    def completed_at(self, count: int) -> int | None:
        """Return since when so much of it is done, in nanoseconds of CLOCK_MONOTONIC; None if it is not."""
        return self._numbers[TIMESTAMPS + count % RING_SIZE] if self._numbers[COMPLETED] >= count else None

    def request_notification(self, count: int, alone: bool) -> None:
        """Want to be told when so much of it is done, `alone` or with all others; of 0 never.

        Look again after a `fence`: it may be done already.
        """
        self._numbers[NOTIFY_ALL], self._numbers[NOTIFY_FIRST] = (0, count) if alone else (count, 0)

    def wait(self, count: int, seconds: float) -> None:
        """Wait until so much of it is done, at most; it may also end before."""
        if (reached := self._numbers[COMPLETED]) < count:
            self._futex.wait(reached, seconds)

    def is_cancelled(self, count: int) -> bool:
        """Whether nobody wants what waits for this record any more."""
        return self._numbers[CANCELLED_BELOW] > count

    def cancel_before(self, least: int) -> None:
        """Want nothing any more that waits for a record below this one."""
        self._numbers[CANCELLED_BELOW] = least

    def release(self) -> None:
        """Count all of it as done: who was to record it is gone."""
        for place in range(TIMESTAMPS, TIMESTAMPS + RING_SIZE):
            self._numbers[place] = 0
        self._numbers[COMPLETED] = self._last_value


class WorkerTimelines:
    """All workers' lines of a run, int64 [workers, LINE / 8], as one of them looks at them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.numpy().data
        self._all = range(len(numbers))

    def notification(self, own: int, count: int) -> bool:
        """Say whether the worker of the line `own` is to tell of its record: as wanted alone, or as the last of all."""
        memory_barrier()
        numbers = self._numbers
        if numbers[own, NOTIFY_FIRST] == count:
            return True
        wanted = numbers[own, NOTIFY_ALL] == count
        return bool(wanted and all(numbers[i, COMPLETED] >= numbers[i, NOTIFY_ALL] for i in self._all))


def encode_status(sequence: int, verdict: int) -> int:
    """Return a stamp's word."""
    return sequence * STATUS_COUNT + verdict


def decode_status(said: int, sequence: int) -> int | None:
    """Return what a word says of the draft with this sequence number; None if it is another's, or none."""
    verdict = said - encode_status(sequence, 0)
    return verdict if 0 <= verdict < STATUS_COUNT else None


def write_completion(
    place: Tensor, sequence: int, prediction: Iterable[Tensor], nanoseconds: int = 0, ended: int = 0
) -> None:
    """Write the stamp of a prediction, on its device and by its current stream, to `place`, int64 [STAMP]."""
    finite = torch.stack([tensor.isfinite().all() for tensor in prediction]).all()
    said = encode_status(sequence, NOT_FINITE) - finite.long()
    place.copy_(torch.stack([said, *(torch.full_like(said, n) for n in (nanoseconds, ended))]), non_blocking=True)


def write_completion_now(
    places: memoryview, row: int, sequence: int, prediction: Iterable[Tensor], nanoseconds: int, ended: int
) -> None:
    """Do as `stamp` does, on the host and at once: somebody waits for it. `places` are int64 [rows, STAMP]."""
    verdict = OK if all(map(is_finite, prediction)) else NOT_FINITE
    places[row, 0], places[row, 1], places[row, 2] = encode_status(sequence, verdict), nanoseconds, ended


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor on the host are.

    Their sum tells in one pass, since what is not finite stays so in a sum; a sum may also be too large, though.
    """
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
