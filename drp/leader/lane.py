"""Lane: on the host, what a stream is on a GPU for a run of the leader's: a list that the engine's thread works off.

It does what it is given as far as no worker has to be waited for, and says when to go on.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from drp.protocol.order import PATIENCE, PAUSE, Line

EARLY = 800e-6
"""Seconds before a time that is known at which the thread wakes up, since it may do so late, and warms up until then.

Measured on 2 cores, 20 ms a round of 8: 300 us have 0.05 ms more lost a round, and 100 us 0.1 ms (docs/round.md).
"""


class Lane:
    """`put` and `wait` give, in one thread; `go` does."""

    def __init__(self) -> None:
        self._todo: deque[Callable[[], object] | _Wait] = deque()
        self._given = self._done = self.waits = 0
        self._sum, self._weights, self._term = torch.zeros(8, 256), torch.zeros(8, 1), torch.zeros(256)

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before."""
        self._given += 1
        self._todo.append(do)

    def wait(self, line: Line, count: int, told: bool) -> None:
        """Have what is given from now on wait for a record; `told`: its process will say so if that is wanted."""
        self._given += 1
        self.waits += 1
        self._todo.append(_Wait(line, count, told))

    def go(self) -> float | None:
        """Do what can be done; return when to go on, in seconds of perf_counter, or None if nothing is left."""
        while self._todo:
            first = self._todo[0]
            if isinstance(first, _Wait):
                if (due := first.due()) > time.perf_counter() + EARLY:
                    return due - EARLY
                while time.perf_counter() < due:
                    self._rehearse()
                self.waits -= 1
            self._todo.popleft()
            self._done += 1
            if not isinstance(first, _Wait):
                first()
        return None

    def _rehearse(self) -> None:
        """Do what will be done in earnest, on next to nothing: code that has not run for 20 ms takes its time."""
        self._sum.addcmul_(self._weights, self._term)

    def mark(self) -> int:
        """Return how much was given."""
        return self._given

    def passed(self, mark: int) -> bool:
        """Whether so much was done."""
        return self._done >= mark

    def settle(self) -> None:
        """Do all of it; only where nothing that was given waits for another process."""
        if self.go() is not None:
            raise RuntimeError("what was given waits for another process")

    def current(self) -> AbstractContextManager[object]:
        """Do nothing: it is used by `put`."""
        return contextlib.nullcontext()

    def aside(self) -> AbstractContextManager[object]:
        """Do nothing: what was done is there."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Drop what was not done."""
        self._todo.clear()


class LaneRecord:
    """A side's records as a lane sees them: the leader's own, or a worker's, which it waits for."""

    def __init__(self, line: Tensor, lane: Lane, told: bool = False) -> None:
        self._line, self._lane, self._told = Line(line), lane, told

    def record(self) -> int:
        """Count, and have the lane say when it is there."""
        count = self._line.count()
        self._lane.put(partial(self._reach, count))
        return count

    def wait(self) -> None:
        """Have the lane wait for the next."""
        self._lane.wait(self._line, self._line.count(), self._told)

    def release(self) -> None:
        """Count what was recorded as done."""
        self._line.release()

    def _reach(self, count: int) -> None:
        self._line.reach(count, time.perf_counter_ns())


class _Wait:
    """For a record of a worker."""

    def __init__(self, line: Line, count: int, told: bool) -> None:
        self._line, self._count, self._told = line, count, told

    def due(self) -> float:
        """Return since when it is done, or when to look again, in seconds of perf_counter."""
        since = self._line.since(self._count)
        if since is None and self._told:
            self._line.want()
            since = self._line.since(self._count)
        if since is None:
            return time.perf_counter() + (PATIENCE if self._told else PAUSE)
        return since / 1e9
