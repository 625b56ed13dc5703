"""The event recorder: appends what happens in the engine to every subscribed timeline."""

from __future__ import annotations

import time
from collections.abc import Callable

from drp.leader.events import EventKind, Timeline, TraceEvent
from drp.leader.runs.run_state import InFlightBatch, PendingCompletion, RunState
from drp.protocol.messages import Prediction


class EventRecorder:
    """Appends events to all subscribed timelines. Callers for whom a call matters check `timelines` first."""

    def __init__(self) -> None:
        self.timelines: tuple[Timeline, ...] = ()

    def subscribe(self, timeline: Timeline) -> None:
        """Append events to a timeline from now on."""
        self.timelines = (*self.timelines, timeline)

    def unsubscribe(self, timeline: Timeline) -> None:
        self.timelines = tuple(other for other in self.timelines if other is not timeline)

    def record(
        self,
        kind: EventKind,
        run: RunState,
        step: int = 0,
        worker: int = 0,
        since: int = 0,
        steps: tuple[int, ...] = (),
    ) -> None:
        """Record an event at the current time. `since` is when it began, in ns of perf_counter, if it took time."""
        for timeline in self.timelines:
            timeline.append(
                TraceEvent(kind, time.perf_counter_ns(), run.number, step, worker, since=since, steps=steps)
            )

    def record_tasks(self, kind: EventKind, sent: InFlightBatch, worker: int, since: int = 0) -> None:
        """Record an event for each draft of a batch."""
        for task in sent.tasks:
            self.record(kind, sent.run, task.index, worker, since=since)

    def record_predictions(self, kind: EventKind, sent: InFlightBatch, worker: int, message: Prediction) -> None:
        """Record the predictions of a batch of drafts."""
        for place, task in enumerate(sent.tasks):
            # The batch's time is recorded with its first draft; the other predictions are complete at its end.
            seconds = message.seconds if place == 0 else 0.0
            received, began = (message.received, message.began) if place == 0 else (message.predicted,) * 2
            times = (received, began, message.predicted, message.ended)
            for timeline in self.timelines:
                now = time.perf_counter_ns()
                timeline.append(TraceEvent(kind, now, message.run, task.index, worker, seconds, times=times))

    def record_completion(self, kind: EventKind, completion: PendingCompletion) -> None:
        """Record that the completion records of a batch of an asynchronous run were read."""
        sent, worker, seconds = completion.batch, completion.worker, completion.seconds
        ended_at = completion.ended_at or time.perf_counter()
        times = (ended_at - seconds, ended_at - seconds, ended_at, ended_at)
        self.record_predictions(kind, sent, worker, Prediction(sent.run.number, 0, 0, seconds, *times))
        self.record_tasks("accumulated", sent, worker)

    def callback_recorder(self, run: RunState) -> Callable[[int, int], None] | None:
        """Return a function that records the callbacks of a run, None without subscribers."""
        return (lambda step, since: self.record("callback", run, step, since=since)) if self.timelines else None
