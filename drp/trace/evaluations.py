"""The evaluations in a timeline: for each draft its times, and the events that scheduled and used it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from drp.leader.events import TraceEvent


@dataclass(eq=False)
class TracedEvaluation:
    """A draft that was sent to a worker. Times are in ns of perf_counter, unless stated otherwise.

    sent: when the draft was sent. since: when sending began.
    scheduled: the event that scheduled the draft.
    answered: when the prediction arrived, None if it did not.
    accumulated: when the prediction was added to the sums of the next drafts.
    seconds: the evaluation time on the device, in seconds.
    received, began, predicted, ended: by the worker's clock, which is the same as the leader's.
    used: the first event that refined states with the prediction, or ended the run.
    lost: when the worker was lost, None if it was not.
    """

    run: int
    step: int
    worker: int
    sent: int
    since: int
    scheduled: TraceEvent | None
    answered: int | None = None
    accumulated: int | None = None
    seconds: float = 0.0
    received: int = 0
    began: int = 0
    predicted: int = 0
    ended: int = 0
    used: TraceEvent | None = None
    lost: int | None = None


def evaluations(timeline: Sequence[TraceEvent]) -> list[TracedEvaluation]:
    """Return the evaluations of a timeline, in the order in which they were sent."""
    found: list[TracedEvaluation] = []
    scheduled: dict[tuple[int, int], deque[TraceEvent]] = defaultdict(deque)
    last_scheduled: dict[tuple[int, int], TraceEvent] = {}
    out: dict[tuple[int, int, int], deque[TracedEvaluation]] = defaultdict(deque)
    unused: dict[int, list[TracedEvaluation]] = defaultdict(list)
    for event in timeline:
        key = (event.run, event.step)
        if event.kind == "scheduled":
            for step in event.steps:
                scheduled[event.run, step].append(event)
        elif event.kind == "sent":
            if scheduled[key]:  # Otherwise the draft is sent again, to another worker.
                last_scheduled[key] = scheduled[key].popleft()
            e = TracedEvaluation(
                event.run, event.step, event.worker, event.ns, event.since or event.ns, last_scheduled.get(key)
            )
            found.append(e)
            out[(*key, event.worker)].append(e)
        elif event.kind in ("predicted", "late") and out[(*key, event.worker)]:
            e = out[(*key, event.worker)].popleft()
            e.answered, e.seconds = event.ns, event.seconds
            e.received, e.began, e.predicted, e.ended = (round(t * 1e9) for t in event.times or _guess(e, event))
            if event.kind == "predicted":
                unused[event.run].append(e)
        elif event.kind == "lost" and out[(*key, event.worker)]:
            out[(*key, event.worker)].popleft().lost = event.ns
        elif event.kind == "accumulated":
            for e in reversed(unused[event.run]):
                if (e.step, e.worker) == (event.step, event.worker):
                    e.accumulated = event.ns
                    break
        if event.kind in ("refined", "end"):
            for e in unused[event.run]:
                if event.kind == "end" or e.step < event.step:
                    e.used = event
            unused[event.run] = [e for e in unused[event.run] if e.used is None]
    return found


def _guess(e: TracedEvaluation, answer: TraceEvent) -> tuple[float, float, float, float]:
    """Return times for an evaluation without a worker's times, placed in the middle between the two messages."""
    spare = max(0.0, (answer.ns - e.sent) / 1e9 - answer.seconds) / 2
    began, ended = e.sent / 1e9 + spare, answer.ns / 1e9 - spare
    return began, began, ended, ended
