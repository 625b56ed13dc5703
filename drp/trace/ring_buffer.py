"""A timeline of bounded length, for leaders that run for weeks."""

from __future__ import annotations

from typing import Final

from drp.leader.events import Timeline, TraceEvent

CHUNKS: Final = 100
"""Old events are dropped in chunks of `max_events` / CHUNKS, since deleting at the start moves all later entries."""


class RingBuffer(Timeline):
    """The newest events, at least `max_events` of them and at most 1 % more; `dropped` counts the older ones."""

    def __init__(self, max_events: int) -> None:
        super().__init__()
        self._most, self._chunk = max_events, max(1, max_events // CHUNKS)
        self.dropped = 0

    def append(self, event: TraceEvent) -> None:
        super().append(event)
        if len(self) >= self._most + self._chunk:
            del self[: self._chunk]
            self.dropped += self._chunk

    def complete_runs(self) -> tuple[Timeline, int]:
        """Return the events of runs whose begin event was kept, and the number of all other events."""
        events, dropped = list(self), self.dropped
        if not dropped:
            return events, 0
        begun: set[int] = set()
        kept = Timeline()
        for event in events:
            if event.kind == "begin":
                begun.add(event.run)
            if event.run in begun:
                kept.append(event)
        return kept, dropped + len(events) - len(kept)
