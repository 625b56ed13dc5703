"""Lane: on the host, what a stream is on a GPU for a run of the leader's: a list that the engine's thread works off.

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

import torch
from torch import Tensor

from drp.protocol.order import PATIENCE, PAUSE, Line, fence
from drp.protocol.waiting import give_way

EARLY = 800e-6
"""Seconds before a time that is known at which the thread wakes up, since it may do so late, and warms up until then.

Measured on 2 cores, 20 ms a round of 8: 300 us have 0.05 ms more lost a round, and 100 us 0.1 ms (docs/round.md).
"""


Room = Literal["own", "lent", "shared"]
"""Where the thread runs while workers compute. Own: on a core that is no worker's; it is told of each record. Lent:
each worker has its cores, and there are no others; it is told of the first that is done, and has its cores until all
are. Shared: workers share cores, or do not use any; it is told once all are done."""


class Lane:
    """`put` and `wait` give, in one thread; `go` does."""

    def __init__(self, room: Room = "own") -> None:
        self._room = room
        self._todo: deque[Callable[[], object] | _Wait | _Reach] = deque()
        self._passed: set[Line] = set()
        """Workers' lines that were waited for since this thread recorded last."""
        self._wanted: set[Line] = set()
        """Those of which this thread wanted to be told last."""
        self._alone = self._spun = False
        self._given = self._done = self.waits = 0
        like = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever the program's defaults are
        self._sum, self._weights, self._term = like.new_zeros(8, 256), like.new_zeros(8, 1), like.new_zeros(256)

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before."""
        self._given += 1
        self._todo.append(do)

    def wait(self, line: Line, count: int, told: bool) -> None:
        """Have what is given from now on wait for a record; `told`: its process says so if that is wanted."""
        self._given += 1
        self.waits += 1
        self._todo.append(_Wait(line, count, told))

    def go(self, alone: bool = False) -> float | None:
        """Do what can be done; return when to go on, in seconds of perf_counter, or None if nothing is left."""
        self._alone = alone
        while self._todo:
            first = self._todo[0]
            if isinstance(first, _Wait):
                since = first.since()
                asked = since is None and first.told and not self.has_core
                if asked:
                    self._ask()
                    since = first.since()
                if since is None:
                    return time.perf_counter() + (PATIENCE if asked else PAUSE)
                if since / 1e9 > time.perf_counter() + EARLY:
                    return since / 1e9 - EARLY
                while time.perf_counter_ns() < since:
                    self._rehearse()
                self.waits -= 1
                self._passed.add(first.line)
            self._todo.popleft()
            self._done += 1
            if isinstance(first, _Reach):
                self._passed.clear()
                self._spun = False
            if not isinstance(first, _Wait):
                first()
        return None

    def _ask(self) -> None:
        """Have this thread woken: for the first wait, for whichever is done first, or once all are done.

        Look again after this: it may be so already, and then nobody tells.
        """
        waits = self._before_record()[: 1 if self._room == "own" else None]
        lines = {wait.line for wait in waits}
        for line in self._wanted - lines:
            line.want(0, alone=True)  # Else it would seem to have been told of already, by somebody who was earlier.
        alone = self._room == "own" or (self.lent and not self._spun and len(lines) > 1)
        for wait in waits:
            wait.line.want(wait.count, alone)
        self._wanted = lines
        fence()

    def _before_record(self) -> list[_Wait]:
        """Return the waits that come before this thread records again."""
        before = itertools.takewhile(lambda each: not isinstance(each, _Reach), self._todo)
        return [each for each in before if isinstance(each, _Wait)]

    @property
    def lent(self) -> bool:
        """Whether this thread has no core but those that workers lend it."""
        return self._room == "lent" and self._alone

    @property
    def has_core(self) -> bool:
        """Whether a worker waits for this thread, and this thread for another: then the first one's core is free."""
        if not self.lent or self._spun:
            return False
        waits = self._before_record()
        missing = {wait.line for wait in waits if wait.since() is None}
        return bool(missing) and bool(self._passed.union(wait.line for wait in waits) - missing)

    def spin(self, seconds: float) -> bool:
        """Stay on that core, awake, until the others are done, at most; return whether they are."""
        missing = [wait for wait in self._before_record() if wait.since() is None]
        for wait in missing:
            wait.line.want(0, alone=True)  # This thread is awake.
        until = time.perf_counter() + seconds
        while (missing := [wait for wait in missing if wait.since() is None]) and time.perf_counter() < until:
            self._rehearse()
        return not missing

    def leave_core(self) -> None:
        """Sleep from now on, until all are done."""
        self._spun = True

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
        self._lane.put(_Reach(self._line, count))
        return count

    def wait(self) -> None:
        """Have the lane wait for the next."""
        self._lane.wait(self._line, self._line.count(), self._told)

    def drop(self, least: int) -> None:
        """Let workers not begin what waits for a record below this one."""
        self._line.drop(least)

    def release(self) -> None:
        """Count what was recorded as done."""
        self._line.release()


class _Reach:
    """A record of the leader's own."""

    def __init__(self, line: Line, count: int) -> None:
        self._line, self._count = line, count

    def __call__(self) -> None:
        self._line.reach(self._count, time.perf_counter_ns())
        self._line.wake()
        give_way()  # What else there is to be done can wait: it may be a worker's core that this thread is on.


class _Wait:
    """For a record of a worker."""

    def __init__(self, line: Line, count: int, told: bool) -> None:
        self.line, self.count, self.told = line, count, told

    def since(self) -> int | None:
        """Return since when it is done, in nanoseconds of CLOCK_MONOTONIC, None if it is not."""
        return self.line.since(self.count)
