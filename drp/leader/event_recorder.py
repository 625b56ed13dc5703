"""The event recorder: appends what happens in the engine to every subscribed timeline."""

from __future__ import annotations

import time
from collections.abc import Callable

from drp.leader.events import EventKind, Timeline, TraceEvent
from drp.leader.runs.run_state import InFlightBatch, RunState
from drp.protocol.messages import EvaluationError, Prediction


class EventRecorder:
    """Marks go to every timeline that somebody listens with; while nobody does, one is a look at an empty tuple."""

    def __init__(self) -> None:
        self.timelines: tuple[Timeline, ...] = ()

    def subscribe(self, timeline: Timeline) -> None:
        """Let marks go to a timeline too."""
        self.timelines = (*self.timelines, timeline)

    def unsubscribe(self, timeline: Timeline) -> None:
        """Let no more go to it."""
        self.timelines = tuple(other for other in self.timelines if other is not timeline)

    def record(
        self,
        what: EventKind,
        run: RunState,
        step: int = 0,
        worker: int = 0,
        since: int = 0,
        steps: tuple[int, ...] = (),
    ) -> None:
        """Put down that something happened now; `since` when it began, if it took time."""
        for timeline in self.timelines:
            timeline.append(
                TraceEvent(what, time.perf_counter_ns(), run.number, step, worker, since=since, steps=steps)
            )

    def record_predictions(
        self, what: EventKind, sent: InFlightBatch, worker: int, message: Prediction | EvaluationError
    ) -> None:
        """Put down the answer to a batch of drafts, if it is one."""
        if isinstance(message, Prediction):
            for place, task in enumerate(sent.tasks if self.timelines else ()):
                # A batch's time is that of its first draft; the others' predictions are there at its end.
                seconds = message.seconds if place == 0 else 0.0
                received, began = (message.received, message.began) if place == 0 else (message.predicted,) * 2
                times = (received, began, message.predicted, message.ended)
                for timeline in self.timelines:
                    now = time.perf_counter_ns()
                    timeline.append(TraceEvent(what, now, message.run, task.index, worker, seconds, times=times))

    def record_completion(
        self, what: EventKind, sent: InFlightBatch, worker: int, seconds: float, ended: float
    ) -> None:
        """Put down that the stamps of a batch were seen, which was answered before it was evaluated."""
        if self.timelines:
            ended = ended or time.perf_counter()
            times = (ended - seconds, ended - seconds, ended, ended)
            self.record_predictions(what, sent, worker, Prediction(sent.run.number, 0, 0, seconds, *times))
            for task in sent.tasks:
                self.record("folded", sent.run, task.index, worker)

    def callback_recorder(self, run: RunState) -> Callable[[int, int], None] | None:
        """Return what puts a run's callbacks down, if anybody listens."""
        return (lambda step, since: self.record("callback", run, step, since=since)) if self.timelines else None
