"""Recording of a leader's timeline to a trace file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drp.leader.events import Timeline
from drp.leader.leader import Leader
from drp.trace.events import write
from drp.trace.ring_buffer import RingBuffer


@contextmanager
def record(leader: Leader, path: str | os.PathLike[str], max_events: int | None = None) -> Iterator[Timeline]:
    """Write a trace of the runs on `leader` during the block to `path`; yield the list of events so far.

        with drp.Leader("digits", devices=2) as leader, drp.trace.record(leader, "run.json"):
            leader.sample(labels=[3])

    The trace is written at the end of the block, even if the block ends with an exception. Until then an event uses
    about a quarter of a kilobyte, a run of 48 steps about 60 kilobytes. For a long-lived leader, `max_events` is the
    maximum number of events to keep: the file then contains the newest complete runs and the number of dropped events.
    Raises ValueError if `path` cannot be written or `max_events` is below 1.
    """
    path = check(path)
    if max_events is not None and max_events < 1:
        raise ValueError(f"max_events is {max_events}; give the number of events to keep, at least 1, or None for all")
    timeline = Timeline() if max_events is None else RingBuffer(max_events)
    leader.subscribe(timeline)
    try:
        yield timeline
    finally:
        leader.unsubscribe(timeline)
        events, dropped = timeline.complete_runs() if isinstance(timeline, RingBuffer) else (list(timeline), 0)
        write(path, events, leader.devices, dropped)


def check(path: str | os.PathLike[str]) -> Path:
    """Return the path; raise ValueError if no file can be written there."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"trace {str(path)!r} cannot be written; give a file in a folder that exists and is yours")
    return path
