"""Conversion of timelines to trace files and back.

The format is the JSON of chrome://tracing, which Perfetto also opens ("Trace Event Format"). Process 1 is the leader
and process 2 + w is worker w. Slices of a process are nested or disjoint. Arrows lead from the slice in which a draft
was scheduled, through its evaluation, to the slice that refined states with its prediction. Times are in microseconds
since the first event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from drp.leader.events import Timeline, TraceEvent
from drp.trace.evaluations import TracedEvaluation, evaluations

Event = dict[str, Any]

LEADER = 1
WORKER = 2
"""The process number of the first worker."""
NAMES = {
    "scheduled": "draft",
    "sent": "send",
    "accumulated": "accumulate",
    "refined": "refine",
    "callback": "callback",
    "end": "last states",
}
"""The names of the leader's slices, by kind of event."""


def write(path: str | Path, timeline: Sequence[TraceEvent], devices: Sequence[str], dropped: int = 0) -> None:
    """Write a trace. `devices` are the devices' names by worker, `dropped` is the number of older events dropped."""
    Path(path).write_text(json.dumps(trace(timeline, devices, dropped), separators=(",", ":")) + "\n")


def trace(timeline: Sequence[TraceEvent], devices: Sequence[str], dropped: int = 0) -> Event:
    """Return a trace as a JSON object."""
    zero = timeline[0].since or timeline[0].ns if timeline else 0
    found = [*_names(devices), *sorted(_events(timeline, zero), key=lambda event: event["ts"])]
    return {
        "traceEvents": found,
        "displayTimeUnit": "ms",
        "otherData": {
            "drp": {"devices": list(devices), "dropped": dropped, "events": [list(event) for event in timeline]}
        },
    }


def read(path: str | Path) -> tuple[Timeline, tuple[str, ...], int]:
    """Read a trace written by drp: events, devices and the number of dropped events; ValueError for other files."""
    try:
        found = json.loads(Path(path).read_text())["otherData"]["drp"]
        timeline = [TraceEvent._make(event) for event in found["events"]]
        timeline = [event._replace(times=tuple(event.times), steps=tuple(event.steps)) for event in timeline]
        return timeline, tuple(found["devices"]), int(found["dropped"])
    except (KeyError, TypeError, IndexError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a trace written by drp ({error!r}); write one with --trace") from None


def _names(devices: Sequence[str]) -> Iterator[Event]:
    for process, name in enumerate(["leader", *(f"worker {w}, {d}" for w, d in enumerate(devices))], start=LEADER):
        yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
        track = "leader's thread" if process == LEADER else "stream"
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": 1, "args": {"name": track}}


def _events(timeline: Sequence[TraceEvent], zero: int) -> Iterator[Event]:
    found = evaluations(timeline)
    last = timeline[-1].ns if timeline else 0
    yield from _leader(timeline, zero)
    yield from _rounds(timeline, found, zero, last)
    for worker in sorted({e.worker for e in found}):
        yield from _worker([e for e in found if e.worker == worker], zero, last)
    for number, e in enumerate(found, start=1):
        yield from _arrows(number, e, zero)


def _slice(name: str, process: int, since: int, until: int, zero: int, **args: object) -> Event:
    ends = {"ts": (since - zero) / 1e3, "dur": max(0, until - since) / 1e3}
    return {"ph": "X", "cat": "drp", "name": name, "pid": process, "tid": 1, **ends, "args": args}


def _leader(timeline: Sequence[TraceEvent], zero: int) -> Iterator[Event]:
    for event in timeline:
        if event.kind in NAMES:
            since = event.since or event.ns
            detail = {"steps": list(event.steps)} if event.steps else {"step": event.step}
            yield _slice(NAMES[event.kind], LEADER, since, event.ns, zero, run=event.run, **detail)
        elif event.kind not in ("predicted", "late"):
            at = {
                "pid": LEADER,
                "tid": 1,
                "ts": (event.ns - zero) / 1e3,
                "args": {"run": event.run, "step": event.step},
            }
            yield {"ph": "i", "s": "t", "cat": "drp", "name": event.kind, **at}


def _rounds(timeline: Sequence[TraceEvent], found: Sequence[TracedEvaluation], zero: int, last: int) -> Iterator[Event]:
    """Yield each run and its rounds, from scheduling to the last prediction; overlapping rounds get separate tracks."""
    answered: dict[int, int] = {}  # by the event that scheduled a round, when its last prediction arrived
    for e in found:
        answered[id(e.scheduled)] = max(answered.get(id(e.scheduled), 0), e.answered or last)
    spans: list[tuple[str, str, int, int]] = []
    for begin, scheduled, end in _runs(timeline, last):
        run = begin.run
        spans.append((f"run {run}", f"run {run}", begin.ns, end))
        tracks: list[int] = []  # for each track, until when it is used
        for number, event in enumerate(scheduled):
            since, until = event.since or event.ns, answered.get(id(event), event.ns)
            track = next((i for i, taken in enumerate(tracks) if taken <= since), len(tracks))
            tracks[track : track + 1] = [until]
            spans.append((f"round {number}", f"run {run} rounds {track}", since, until))
    for name, place, since, until in spans:
        both = {"cat": "round", "name": name, "id": place, "pid": LEADER, "tid": 1}
        yield {"ph": "b", **both, "ts": (since - zero) / 1e3}
        yield {"ph": "e", **both, "ts": (until - zero) / 1e3}


def _runs(timeline: Sequence[TraceEvent], last: int) -> list[tuple[TraceEvent, list[TraceEvent], int]]:
    """Return, for each run, its begin event, the events that scheduled its drafts, and when it ended."""
    found: list[tuple[TraceEvent, list[TraceEvent], int]] = []
    running: dict[int, int] = {}  # by number of a running run, its index in `found`
    for event in timeline:
        if event.kind == "begin":
            running[event.run] = len(found)
            found.append((event, [], last))
        elif event.run in running and event.kind == "scheduled" and event.steps:
            found[running[event.run]][1].append(event)
        elif event.run in running and event.kind in ("end", "failed"):
            place = running.pop(event.run)
            found[place] = (*found[place][:2], event.ns)
    return found


def _worker(found: Sequence[TracedEvaluation], zero: int, last: int) -> Iterator[Event]:
    """Yield a worker's slices: receiving a draft, its evaluation, the copy, and sending the prediction."""
    free = 0  # when the last slice ended
    # A worker may receive a draft before the leader has recorded it as sent, so use the time when sending began.
    for e, later in zip(found, [*found[1:], None], strict=True):
        process, facts = WORKER + e.worker, {"run": e.run, "step": e.step}
        if e.answered is None:
            until = e.lost or (later.since if later is not None else last)
            yield _slice("lost", process, max(e.since, free), max(until, free, e.since), zero, **facts)
            continue
        # The times of a cancelled draft are those of its record's reading, which may follow the next evaluation.
        began = max(e.began, free)
        predicted = max(e.predicted, began)
        ended = max(e.ended, predicted)
        yield _slice("receive", process, max(e.since, free), began, zero, **facts)
        yield _slice("compute", process, began, predicted, zero, **facts)
        yield _slice("copy", process, predicted, ended, zero, **facts)
        free = max(ended, e.answered if later is None else min(e.answered, max(later.since, ended)))
        yield _slice("reply", process, ended, free, zero, **facts)


def _arrows(number: int, e: TracedEvaluation, zero: int) -> Iterator[Event]:
    """Yield the arrow from a draft, through its evaluation, to the states refined with its prediction."""

    def point(phase: str, process: int, since: int, until: int) -> Event:
        at = ((since + until) / 2 - zero) / 1e3
        where = {"pid": process, "tid": 1, "ts": at, "id": number}
        return {"ph": phase, "cat": "draft", "name": f"step {e.step}", **where, **({"bp": "e"} if phase == "f" else {})}

    if e.scheduled is None or e.answered is None:
        return
    yield point("s", LEADER, e.scheduled.since or e.scheduled.ns, e.scheduled.ns)
    yield point("t" if e.used else "f", WORKER + e.worker, e.began, e.predicted)
    if e.used is not None:
        yield point("f", LEADER, e.used.since or e.used.ns, e.used.ns)
