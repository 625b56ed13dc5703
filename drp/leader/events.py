"""Trace events: what happened in runs and when, for benchmarks and traces."""

from __future__ import annotations

from typing import Literal, NamedTuple

EventKind = Literal[
    "begin",
    "scheduled",
    "sent",
    "hedged",
    "predicted",
    "late",
    "accumulated",
    "refined",
    "callback",
    "discarded",
    "lost",
    "end",
    "failed",
]


class TraceEvent(NamedTuple):
    """An event in the leader at `ns` of time.perf_counter_ns. If it took time, it began at `since`.

    The kinds of events:

        begin        the run starts
        scheduled    the drafts of `steps` are written
        sent         the draft of `step` was sent to `worker`
        hedged       the draft of `step` is late at `worker` and is sent to another worker as well
        predicted    the prediction of `step` arrived from `worker`, or, in an asynchronous run, its completion record
        late         as predicted, for a prediction that is no longer needed
        accumulated  the prediction of `step` is added to the sums from which the next drafts are made
        refined      the states up to `step` are final and their callbacks were called
        callback     the user's callback ran for the state at `step`
        discarded    a mode with feedback continued from `step` and discarded predictions beyond it
        lost         `worker` was lost; the draft of `step` is evaluated by another worker
        end          the run ends
        failed       the run ends with an error

    For predicted and late, `seconds` is the evaluation time by the worker's clock, and `times` are the times at which
    the draft was received, its evaluation began, its prediction was computed, and the worker was done with it, in
    seconds of time.perf_counter.
    """

    kind: EventKind
    ns: int
    run: int
    step: int = 0
    worker: int = 0
    seconds: float = 0.0
    since: int = 0
    times: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()


Timeline = list[TraceEvent]
