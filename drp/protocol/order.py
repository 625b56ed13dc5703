"""Order: answers that run ahead of the device. Work is queued on streams, and so is waiting for another process's.

A *stream* does what it is given in order, after the caller has gone on: on a GPU it is CUDA's; on the host a worker's
is a thread, and the leader's a list that its one thread works off: a second would wait for the interpreter's lock. A
*record* joins streams: one side's `record` says that what was queued so far is to count as done once it is, and `wait`
has another's stream wait for that. On the host records have numbers, known beforehand, so that either side can wait for
what the other was not yet asked to do; a GPU's event has none, and is waited for as it was last recorded. A *stamp* is
written behind a prediction, and read before it is used: it proves that what was read was finished, whatever became of
the records.

What is recorded counts as done from a *time* on. That is now, for a thread that works; for one that stands for an
emulated device, which knows how long it takes, it may be later: whoever waits for it waits until then, and no thread
has to wake up on the device's side to say so, as none does on a GPU's.

Here are the numbers that both sides have on the host; `drp.protocol.cuda` has what a GPU has instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from drp.protocol.memory import ALIGNMENT
from drp.protocol.waiting import Number

PAUSE = 50e-6
"""Seconds between two looks at a number that a device writes."""

PATIENCE = 0.05
"""Seconds after which a number of another process is looked at again, though nobody said that it has changed."""

STAMP = 3
"""int64 numbers of a stamp: its word; the nanoseconds that the evaluation took, 0 if they are not known; and when it
ended, in nanoseconds of CLOCK_MONOTONIC, 0 likewise."""
UNREAD = -1
"""In place of a word: no stamp was read yet."""
FINE, NOT_FINITE, RAISED = 0, 1, 2
"""What a word says of a prediction beside the draft's sequence number."""
VERDICTS = 4

LINE = ALIGNMENT
"""Bytes of one side's records on the host."""
REACHED, WANTED, TIMES, RING = 0, 1, 8, 8
"""The int64 there: how many of its records are done; whether somebody wants to be told of more; and since when the last
RING of those are."""


class Stream(Protocol):
    """Does what it is given in order. One thread gives.

    `waits`: how many waits are still to come for this thread, if they are its; 0 if they are not.
    """

    waits: int

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before; on a GPU, what `do` queues on the current stream."""
        ...

    def go(self) -> float | None:
        """Do what can be done now, if that takes this thread; return when there is more, in seconds of perf_counter.

        None if there is not, or not for this thread. Raises what something given raised.
        """
        ...

    def current(self) -> AbstractContextManager[object]:
        """Make it the current stream of this thread for a while: what is queued on the GPU is queued here."""
        ...

    def mark(self) -> Any:
        """Return a mark behind what was given so far."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether everything before the mark was done; never waits."""
        ...

    def settle(self) -> None:
        """Wait until everything was done. Only where nothing that was given waits for another process."""
        ...

    def aside(self) -> AbstractContextManager[object]:
        """Make another stream the current one for a while, for those who look at what was done before a mark."""
        ...

    def close(self) -> None:
        """Do no more."""
        ...


class OwnRecord(Protocol):
    """A side's own records."""

    def record(self) -> int:
        """Let the others wait for all that was queued here so far; return the record's number, 0 if it has none."""
        ...


class LeadersRecord(Protocol):
    """The leader's, as a worker has them."""

    def wait(self, number: int) -> None:
        """Have the stream wait for the record of this number, or, where they have none, for the last one."""
        ...


class WorkersRecord(Protocol):
    """A worker's, as the leader has them: they outlive the worker."""

    def wait(self) -> None:
        """Have the stream wait for the next one; where they have no numbers, for the last, after a message."""
        ...

    def release(self) -> None:
        """Let the stream go on: the worker is gone, and what it was to record will not be done."""
        ...


_FENCE = threading.Lock()


class Line:
    """One side's records on the host: int64 [LINE / 8] in memory that both sides have mapped.

    Each counts for itself how many there are to be, from what there is when it begins.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.numpy()
        self._reached = Number(self._numbers, REACHED)
        self._counted = self._reached.value

    def count(self) -> int:
        """Count one more; return its number."""
        self._counted += 1
        return self._counted

    def reach(self, count: int, ns: int) -> bool:
        """Say that so much of it is done, or will be at a time; return whether somebody wants to be told."""
        self._numbers[TIMES + count % RING] = ns
        self._reached.write(count)
        wanted = bool(self._numbers[WANTED])
        self._numbers[WANTED] = 0
        return wanted

    def since(self, count: int) -> int | None:
        """Return since when so much of it is done, in nanoseconds of CLOCK_MONOTONIC; None if it is not."""
        return int(self._numbers[TIMES + count % RING]) if self._reached.value >= count else None

    def want(self) -> None:
        """Want to be told of what is done next. Look again after this: it may be done already."""
        self._numbers[WANTED] = 1
        with _FENCE:  # What is written must be there before it is looked at: a lock sees to that.
            pass

    def wait(self, count: int, seconds: float) -> None:
        """Sleep until so much of it is done, at most; it may also end before."""
        reached = self._reached.value
        if reached < count:
            self._reached.wait(reached, seconds)

    def release(self) -> None:
        """Count all of it as done: who was to record it is gone."""
        self._numbers[TIMES : TIMES + RING] = 0
        self._reached.write(self._counted)


def word(sequence: int, verdict: int) -> int:
    """Return a stamp's word."""
    return sequence * VERDICTS + verdict


def verdict_of(said: int, sequence: int) -> int | None:
    """Return what a word says of the draft with this sequence number; None if it is another's, or none."""
    verdict = said - word(sequence, 0)
    return verdict if verdict in (FINE, NOT_FINITE, RAISED) else None


def stamp(place: Tensor, sequence: int, prediction: Iterable[Tensor], nanoseconds: int = 0, ended: int = 0) -> None:
    """Write the stamp of a prediction, on its device and by its current stream, to `place`, int64 [STAMP]."""
    finite = torch.stack([tensor.isfinite().all() for tensor in prediction]).all()
    said = word(sequence, NOT_FINITE) - finite.long()
    place.copy_(torch.stack([said, *(torch.full_like(said, n) for n in (nanoseconds, ended))]), non_blocking=True)
