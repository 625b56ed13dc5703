"""The evaluations in a timeline: for each draft its times, and the events that scheduled and used it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from drp.leader.events import TraceEvent


@dataclass(eq=False)
class Evaluation:
    """A draft that was sent to a worker. Times are in ns of perf_counter, unless stated otherwise.

    sent: when the draft was sent. since: when sending began.
    formed: the event that scheduled the draft.
    answered: when the prediction arrived, None if it did not.
    folded: when the prediction was added to the sums of the next drafts.
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
    formed: TraceEvent | None
    answered: int | None = None
    folded: int | None = None
    seconds: float = 0.0
    received: int = 0
    began: int = 0
    predicted: int = 0
    ended: int = 0
    used: TraceEvent | None = None
    lost: int | None = None


def evaluations(timeline: Sequence[TraceEvent]) -> list[Evaluation]:
    """Return the evaluations of a timeline, in the order in which they were sent."""
    found: list[Evaluation] = []
    formed: dict[tuple[int, int], deque[TraceEvent]] = defaultdict(deque)
    last_formed: dict[tuple[int, int], TraceEvent] = {}
    out: dict[tuple[int, int, int], deque[Evaluation]] = defaultdict(deque)
    unused: dict[int, list[Evaluation]] = defaultdict(list)
    for mark in timeline:
        key = (mark.run, mark.step)
        if mark.kind == "formed":
            for step in mark.steps:
                formed[mark.run, step].append(mark)
        elif mark.kind == "sent":
            if formed[key]:  # Otherwise the draft is sent again, to another worker.
                last_formed[key] = formed[key].popleft()
            e = Evaluation(mark.run, mark.step, mark.worker, mark.ns, mark.since or mark.ns, last_formed.get(key))
            found.append(e)
            out[(*key, mark.worker)].append(e)
        elif mark.kind in ("answer", "late") and out[(*key, mark.worker)]:
            e = out[(*key, mark.worker)].popleft()
            e.answered, e.seconds = mark.ns, mark.seconds
            e.received, e.began, e.predicted, e.ended = (round(t * 1e9) for t in mark.times or _guess(e, mark))
            if mark.kind == "answer":
                unused[mark.run].append(e)
        elif mark.kind == "lost" and out[(*key, mark.worker)]:
            out[(*key, mark.worker)].popleft().lost = mark.ns
        elif mark.kind == "folded":
            for e in reversed(unused[mark.run]):
                if (e.step, e.worker) == (mark.step, mark.worker):
                    e.folded = mark.ns
                    break
        if mark.kind in ("refined", "end"):
            for e in unused[mark.run]:
                if mark.kind == "end" or e.step < mark.step:
                    e.used = mark
            unused[mark.run] = [e for e in unused[mark.run] if e.used is None]
    return found


def _guess(e: Evaluation, answer: TraceEvent) -> tuple[float, float, float, float]:
    """Return times for an evaluation without a worker's times, placed in the middle between the two messages."""
    spare = max(0.0, (answer.ns - e.sent) / 1e9 - answer.seconds) / 2
    began, ended = e.sent / 1e9 + spare, answer.ns / 1e9 - spare
    return began, began, ended, ended
