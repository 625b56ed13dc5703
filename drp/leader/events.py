"""Trace events: what happened in runs and when, for benchmarks and traces."""

from __future__ import annotations

from typing import Literal, NamedTuple

EventKind = Literal[
    "begin",
    "formed",
    "sent",
    "hedged",
    "answer",
    "late",
    "folded",
    "refined",
    "callback",
    "cut",
    "lost",
    "end",
    "failed",
]


class TraceEvent(NamedTuple):
    """Something happened at `ns` of time.perf_counter_ns, in the leader; if it took time, it began at `since`.

    begin: the run's clock starts. formed: the drafts of `steps` are written. sent: the draft of `step` went to
    `worker`. hedged: the draft of `step` is late at `worker`, and is sent to another too. answer: the prediction of
    `step` came from `worker`, whose own clock says `seconds`, and that it was received, began, had its prediction
    and ended at `times`, seconds of time.perf_counter. With dispatch="async" it is when its stamp was seen. late:
    one that nobody needs any more. folded: the answer is added to what the next drafts are made of. refined: the
    states up to `step` are done, callbacks called. callback: the caller's, of the state at `step`. cut: a mode with
    feedback went on from `step` though it had predictions beyond. lost: `worker` is gone, and with it what it had
    been given; `step` is to be evaluated by another. end: the run's clock stops. failed: instead of end.
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
