"""Clock: the time by which the leader judges whether workers are late."""

from __future__ import annotations

import time

STALL = 0.25
"""Seconds that the leader's thread may be kept from looking at its workers; what takes longer is left out."""


class Clock:
    """A monotonic clock that leaves out the time in which the leader's thread did not look at what workers send.

    A callback may take long, another thread may hold the interpreter's lock, the machine or the process group may be
    stopped: none of that is a delay of the workers, which may have answered, or may have been stopped too.
    """

    def __init__(self) -> None:
        self._left_out = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        """Return the seconds of `time.monotonic()` without those left out so far."""
        return time.monotonic() - self._left_out

    def to_monotonic(self, when: float) -> float:
        """Return when it is `when` by this clock, in seconds of `time.monotonic()`."""
        return when + self._left_out

    def resume(self, planned: float = 0.0) -> None:
        """Leave out all time since the last call if the thread stalled: call it before and after each wait.

        `planned`: when the wait that is over was to end at the latest, in seconds of `time.monotonic()`.
        """
        now = time.monotonic()
        if now - max(self._last, planned) > STALL:
            self._left_out += now - self._last
        self._last = now
