"""Order: answers that run ahead of the device. Work is queued on streams, and so is waiting for another process's.

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
import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from drp.protocol.memory import ALIGNMENT
from drp.protocol.waiting import Sleepers, give_way

PAUSE = 50e-6
"""Seconds between two looks at a number that a device writes."""

PATIENCE = 0.05
"""Seconds after which a number of another process is looked at again, though nobody said that it has changed."""

STAMP = 3
"""int64 numbers of a stamp: its word; the nanoseconds that the evaluation took, 0 if they are not known; and when it
ended, in nanoseconds of CLOCK_MONOTONIC, 0 likewise."""
UNREAD = -1
"""In place of a word: no stamp was read yet."""
FINE, NOT_FINITE, RAISED, UNWANTED = 0, 1, 2, 3
"""What a word says of a prediction beside the draft's sequence number; of the last two there is none."""
VERDICTS = 4

LINE = ALIGNMENT
"""Bytes of one side's records on the host."""
REACHED, WANTED, ALONE, LEAST, TIMES, RING = 0, 1, 2, 3, 8, 8
"""The int64 there: how many of its records are done; of a worker's, of which the leader wants to be told once all are
done of which it wants to be told so, and of which as soon as that one is; of the leader's, the least number that a
draft still wanted waits for; and since when the last RING of the records are done."""
ALL = 2**62
"""As LEAST: no draft is wanted any more."""


class Stream(Protocol):
    """Does what it is given in order. One thread gives.

    `waits`: how many waits are still to come for this thread, if they are its; 0 if they are not.
    """

    waits: int

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before; on a GPU, what `do` queues on the current stream."""
        ...

    def go(self, alone: bool = False) -> float | None:
        """Do what can be done now, if that takes this thread; return when there is more, in seconds of perf_counter.

        None if there is not, or not for this thread. `alone` says that workers have nothing to do but what this is for.
        Raises what something given raised.
        """
        ...

    @property
    def lent(self) -> bool:
        """Whether this thread has no core but those that workers lend it."""
        ...

    @property
    def has_core(self) -> bool:
        """Whether this thread may take the core of a worker that waits for it, until others are done."""
        ...

    def leave_core(self) -> None:
        """Have it no more; it is waited for others asleep."""
        ...

    def spin(self, seconds: float) -> bool:
        """Stay there, awake, until they are, at most; return whether they are."""
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


class LeadersOwn(OwnRecord, Protocol):
    """The leader's own."""

    def drop(self, least: int) -> None:
        """Let workers that look at that not begin a draft that waits for a record below this one."""
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


def fence() -> None:
    """Have what this thread has written be there before it looks at anything else: a lock sees to that."""
    with _FENCE:
        pass


class Line:
    """One side's records on the host: int64 [LINE / 8] in memory that both sides have mapped.

    Each counts for itself how many there are to be, from what there is when it begins.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._line = numbers.numpy()
        self._numbers = self._line.data  # which is read and written in a fraction of an array's time
        self.restart()

    def restart(self) -> None:
        """Count from what there is now."""
        self._counted = self._numbers[REACHED]

    def count(self) -> int:
        """Count one more; return its number."""
        self._counted += 1
        return self._counted

    def reach(self, count: int, ns: int) -> None:
        """Say that so much of it is done, or will be at a time."""
        self._numbers[TIMES + count % RING] = ns
        self._numbers[REACHED] = count

    @cached_property
    def _sleepers(self) -> Sleepers:
        return Sleepers(self._line, REACHED)

    def wake(self) -> None:
        """Wake those that sleep until it has come further."""
        self._sleepers.wake()

    def since(self, count: int) -> int | None:
        """Return since when so much of it is done, in nanoseconds of CLOCK_MONOTONIC; None if it is not."""
        return self._numbers[TIMES + count % RING] if self._numbers[REACHED] >= count else None

    def want(self, count: int, alone: bool) -> None:
        """Want to be told when so much of it is done, `alone` or with all others; of 0 never.

        Look again after a `fence`: it may be done already.
        """
        self._numbers[WANTED], self._numbers[ALONE] = (0, count) if alone else (count, 0)

    def wait(self, count: int, seconds: float, awake: float = 0.0) -> None:
        """Wait until so much of it is done, at most; it may also end before. For a while it is looked at, awake."""
        until = time.perf_counter() + awake
        while (reached := self._numbers[REACHED]) < count:
            if time.perf_counter() >= until:
                self._sleepers.sleep(reached, seconds)
                return
            give_way()

    def is_dropped(self, count: int) -> bool:
        """Whether nobody wants what waits for this record any more."""
        return self._numbers[LEAST] > count

    def drop(self, least: int) -> None:
        """Want nothing any more that waits for a record below this one."""
        self._numbers[LEAST] = least

    def release(self) -> None:
        """Count all of it as done: who was to record it is gone."""
        for place in range(TIMES, TIMES + RING):
            self._numbers[place] = 0
        self._numbers[REACHED] = self._counted


class Lines:
    """All workers' lines of a run, int64 [workers, LINE / 8], as one of them looks at them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.numpy().data
        self._all = range(len(numbers))

    def told(self, own: int, count: int) -> Literal["", "alone", "last"]:
        """Say whether the worker of the line `own` is to tell of its record: for it is wanted alone, or the last.

        Of those that are wanted alone the earliest tells, and nobody else who sees that it was earlier. Of workers that
        are done at the same time each sees that the other is, or one does.
        """
        fence()
        numbers = self._numbers
        if numbers[own, ALONE] == count:
            return "" if any(self._time(i) < self._time(own) for i in self._all) else "alone"
        wanted = numbers[own, WANTED] == count
        return "last" if wanted and all(numbers[i, REACHED] >= numbers[i, WANTED] for i in self._all) else ""

    def _time(self, line: int) -> tuple[float, int]:
        """Return since when a record that is wanted alone is done, if it is; of two no two have the same."""
        count = self._numbers[line, ALONE]
        done = 0 < count <= self._numbers[line, REACHED]
        return (self._numbers[line, TIMES + count % RING] if done else math.inf), line


def word(sequence: int, verdict: int) -> int:
    """Return a stamp's word."""
    return sequence * VERDICTS + verdict


def verdict_of(said: int, sequence: int) -> int | None:
    """Return what a word says of the draft with this sequence number; None if it is another's, or none."""
    verdict = said - word(sequence, 0)
    return verdict if 0 <= verdict < VERDICTS else None


def stamp(place: Tensor, sequence: int, prediction: Iterable[Tensor], nanoseconds: int = 0, ended: int = 0) -> None:
    """Write the stamp of a prediction, on its device and by its current stream, to `place`, int64 [STAMP]."""
    finite = torch.stack([tensor.isfinite().all() for tensor in prediction]).all()
    said = word(sequence, NOT_FINITE) - finite.long()
    place.copy_(torch.stack([said, *(torch.full_like(said, n) for n in (nanoseconds, ended))]), non_blocking=True)


def stamp_now(
    places: memoryview, row: int, sequence: int, prediction: Iterable[Tensor], nanoseconds: int, ended: int
) -> None:
    """Do as `stamp` does, on the host and at once: somebody waits for it. `places` are int64 [rows, STAMP]."""
    verdict = FINE if all(map(is_finite, prediction)) else NOT_FINITE
    places[row, 0], places[row, 1], places[row, 2] = word(sequence, verdict), nanoseconds, ended


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor on the host are.

    Their sum tells in one pass, since what is not finite stays so in a sum; a sum may also be too large, though.
    """
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
