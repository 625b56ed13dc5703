"""The clock by which the leader decides whether workers are late."""

from __future__ import annotations

import time

STALL = 0.25
"""Seconds for which the leader's thread may be unable to check its workers; longer stalls are not counted."""


class Clock:
    """A monotonic clock that does not count the time in which the leader's thread could not receive messages.

    A callback may take long, another thread may hold the GIL, the machine or the process group may be suspended. None
    of these is a delay of the workers, which may have answered or may have been suspended as well.

    awake_since: when the last wait ended, or the next was about to begin; what was received in the wait came before.
    """

    def __init__(self) -> None:
        self._left_out = 0.0
        self._last = self.awake_since = time.monotonic()

    def now(self) -> float:
        """Return `time.monotonic()` less the stalls so far, in seconds."""
        return time.monotonic() - self._left_out

    def to_monotonic(self, when: float) -> float:
        """Convert a time of this clock to `time.monotonic()`, in seconds."""
        return when + self._left_out

    def resume(self, planned: float = 0.0) -> None:
        """Exclude the time since the last call if the thread has stalled. Call this before and after each wait.

        Args:
            planned: the deadline of the wait that has just ended, in seconds of `time.monotonic()`.
        """
        now = time.monotonic()
        if now - max(self._last, planned) > STALL:
            self._left_out += now - self._last
        self._last, self.awake_since = now, now - self._left_out
