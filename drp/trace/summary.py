"""Summaries of how runs spent their time, along their critical path and on each device."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drp.leader.events import TraceEvent
from drp.trace.evaluations import TracedEvaluation, evaluations


@dataclass
class Path:
    """The critical path of a run, in seconds. The parts add up to `wall`.

    From the run's end the path leads back to the last prediction, through its evaluation to the event that scheduled
    its draft, from there to the prediction after which that was scheduled, and so on. A draft of an asynchronous run is
    scheduled, and mostly sent, before the predictions that it depends on are complete. From its evaluation the path
    leads to the last prediction that was complete when the evaluation began.

    compute: device time on the path.
    transfer: messages, links, and waking up of both processes.
    arithmetic: the leader's time from a prediction to the drafts scheduled with it.
    sending: from there until the draft on the path was sent.
    queue: waiting for a worker that was busy with other drafts.
    end: the time after the last prediction.
    """

    run: int
    wall: float = 0.0
    compute: float = 0.0
    transfer: float = 0.0
    arithmetic: float = 0.0
    sending: float = 0.0
    queue: float = 0.0
    end: float = 0.0
    rounds: int = 0
    evaluations: int = 0

    @property
    def leader(self) -> float:
        return self.arithmetic + self.sending + self.end


@dataclass
class WorkerSummary:
    """A device's time while runs were running, in seconds. The parts add up to the time of all runs.

    compute: evaluating drafts.
    transfer: a draft or a prediction is in transit, or the leader is busy.
    waiting: after a prediction, until the next drafts of any run are scheduled; or, in an asynchronous run, until the
        predictions are complete that an already scheduled draft depends on. Mostly for the slowest device.
    leader: the next drafts are computed and sent.
    idle: none of the last drafts was for this device.
    """

    device: str
    evaluations: int = 0
    compute: float = 0.0
    transfer: float = 0.0
    waiting: float = 0.0
    leader: float = 0.0
    idle: float = 0.0
    lost: int = 0

    @property
    def total(self) -> float:
        return self.compute + self.transfer + self.waiting + self.leader + self.idle


@dataclass
class Summary:
    """The critical paths of finished runs, the devices' times, and the number of dropped events."""

    paths: list[Path] = field(default_factory=list)
    workers: list[WorkerSummary] = field(default_factory=list)
    dropped: int = 0

    @property
    def text(self) -> str:
        return self._runs + (f" {self.dropped} older events were dropped during recording." if self.dropped else "")

    @property
    def _runs(self) -> str:
        wall = sum(path.wall for path in self.paths)
        if not wall:
            return "No run has finished."

        def share(part: str) -> str:
            return f"{sum(getattr(path, part) for path in self.paths) / wall:.1%}"

        total = sum(worker.total for worker in self.workers)

        def of_devices(part: str) -> str:
            return f"{sum(getattr(worker, part) for worker in self.workers) / total:.1%}"

        rounds, evaluated = sum(p.rounds for p in self.paths), sum(p.evaluations for p in self.paths)
        lost = sum(worker.lost for worker in self.workers)
        return (
            f"{len(self.paths)} run(s), {wall * 1e3:.1f} ms in total: {evaluated} evaluations on {len(self.workers)} "
            f"device(s), {rounds / len(self.paths):.4g} consecutive evaluations per run. The critical path was "
            f"{share('compute')} computing, {share('transfer')} transfer and waking up, {share('leader')} the leader, "
            f"and {share('queue')} waiting for a busy device. The devices computed {of_devices('compute')} of the "
            f"time, waited for the slowest device {of_devices('waiting')}, for transfers {of_devices('transfer')} and "
            f"for the leader {of_devices('leader')}, and were idle {of_devices('idle')}."
            + (f" {lost} draft(s) were lost with their worker." if lost else "")
        )


def summarise(timeline: Sequence[TraceEvent], devices: Sequence[str], dropped: int = 0) -> Summary:
    """Summarize a timeline. Runs that failed or have not ended count only for the devices."""
    found = evaluations(timeline)
    ends = {event.run: event for event in timeline if event.kind == "end"}
    begins = {event.run: event for event in timeline if event.kind == "begin"}
    summary = Summary(dropped=dropped)
    for run, begin in begins.items():
        if run in ends:
            own = [e for e in found if e.run == run and e.answered is not None]
            summary.paths.append(_path(begin, ends[run], own, found))
    spans = _spans(timeline)
    runs: dict[int, list[TracedEvaluation]] = defaultdict(list)
    for e in found:
        if e.answered is not None:
            runs[e.run].append(e)
    for worker, device in enumerate(devices):
        own = [e for e in found if e.worker == worker]
        summary.workers.append(_summarise_worker(device, own, runs, timeline, spans))
    return summary


def _path(
    begin: TraceEvent, end: TraceEvent, own: list[TracedEvaluation], everyone: Sequence[TracedEvaluation]
) -> Path:
    path, before = Path(begin.run, (end.ns - begin.ns) / 1e9, evaluations=len(own)), _previous(everyone)
    e: TracedEvaluation | None = max(own, key=lambda e: e.answered or 0, default=None)
    path.end = (end.ns - ((e.answered or 0) if e else begin.ns)) / 1e9
    until = e.answered or 0 if e else 0  # the end of the part of the path that is not attributed yet
    while e is not None:
        path.compute += e.seconds
        scheduled = e.scheduled
        assert scheduled is not None
        ahead, awaited = before.get((e.worker, e.sent)), _last_awaited(e, own)
        # The first draft of a batch has the time of all; the others follow without a gap.
        path.rounds += ahead is None or e.seconds > 0 or e.began != ahead.predicted
        if awaited is not None and (ahead is None or ahead.ended <= awaited.ended):
            ready, sent = max(scheduled.ns, awaited.ended), max(e.sent, awaited.ended)
            path.transfer += (until - sent) / 1e9 - e.seconds
            path.sending += (sent - ready) / 1e9
            path.arithmetic += (ready - awaited.ended) / 1e9
            e, until = awaited, awaited.ended
            continue
        if ahead is not None and ahead.ended > e.sent:  # The draft waited in the worker's queue.
            path.transfer += (until - ahead.ended) / 1e9 - e.seconds
            if ahead.run != begin.run:
                path.queue += (ahead.ended - e.sent) / 1e9
                until = e.sent
            else:
                e, until = ahead, ahead.ended
                continue
        else:
            path.transfer += (until - e.sent) / 1e9 - e.seconds
        if ahead is not None and scheduled.ns < (ahead.answered or 0) <= e.sent:  # The draft waited in the leader.
            if ahead.run == begin.run:
                path.sending += (e.sent - (ahead.answered or 0)) / 1e9
                e, until = ahead, ahead.answered or 0
                continue
            path.queue += (e.sent - scheduled.ns) / 1e9
        else:
            path.sending += (e.sent - scheduled.ns) / 1e9
        since = scheduled.since or scheduled.ns
        trigger = max(
            (t for t in own if t.answered and t.answered <= since), key=lambda t: t.answered or 0, default=None
        )
        until = (trigger.answered or 0) if trigger else begin.ns
        path.arithmetic += (scheduled.ns - until) / 1e9
        e = trigger
    return path


def _previous(found: Sequence[TracedEvaluation]) -> dict[tuple[int, int], TracedEvaluation]:
    """Return the worker's previous evaluation, by the worker and the time at which a draft was sent to it."""
    before: dict[tuple[int, int], TracedEvaluation] = {}
    last: dict[int, TracedEvaluation] = {}
    for e in found:
        if e.answered is not None:
            if e.worker in last:
                before[e.worker, e.sent] = last[e.worker]
            last[e.worker] = e
    return before


def _last_awaited(e: TracedEvaluation, own: Sequence[TracedEvaluation]) -> TracedEvaluation | None:
    """Return the last prediction for which a draft waited after it was scheduled; None if it waited for none.

    `own` are the evaluations of the draft's run.
    """
    scheduled = e.scheduled
    if scheduled is None:
        return None
    since = scheduled.since or scheduled.ns
    awaited = (
        other
        for other in own
        if other.ended <= e.began and (other.answered or 0) > since and _is_scheduled_before(other, scheduled)
    )
    return max(awaited, key=lambda other: other.ended, default=None)


def _is_scheduled_before(e: TracedEvaluation, scheduled: TraceEvent) -> bool:
    return e.scheduled is not None and e.scheduled.ns < scheduled.ns


def _spans(timeline: Sequence[TraceEvent]) -> list[tuple[int, int]]:
    """Return the time spans in which runs were running."""
    spans: list[tuple[int, int]] = []
    running: set[int] = set()
    since = 0
    for event in timeline:
        if event.kind == "begin":
            since = since if running else event.ns
            running.add(event.run)
        elif event.kind in ("end", "failed") and event.run in running:
            running.remove(event.run)
            if not running:
                spans.append((since, event.ns))
    if running:
        spans.append((since, timeline[-1].ns))
    return spans


def _summarise_worker(
    device: str,
    found: list[TracedEvaluation],
    runs: Mapping[int, Sequence[TracedEvaluation]],
    timeline: Sequence[TraceEvent],
    spans: list[tuple[int, int]],
) -> WorkerSummary:
    worker = WorkerSummary(device, len(found))
    scheduled = sorted((event.since or event.ns, event.ns) for event in timeline if event.kind == "scheduled")
    parts: dict[str, float] = defaultdict(float)
    for since, until in spans:
        own = [e for e in found if since <= e.sent <= until]
        at, served = since, False
        for e, later in zip(own, [*own[1:], None], strict=False):
            sent = max(e.sent, at)
            _gap(at, sent, scheduled, served, True, parts)
            answered = min(e.answered or e.lost or until, until)
            if later is not None:  # If it was sent already, the device turns to it without waiting for the leader.
                answered = min(answered, max(e.ended, later.sent))
            worker.lost += e.answered is None
            busy = max(0, answered - sent)
            seconds = min(e.seconds * 1e9, busy)
            awaited = _last_awaited(e, runs[e.run]) if e.answered is not None else None
            waited = min(max(0, awaited.ended - sent), busy - seconds) if awaited is not None else 0
            parts["compute"] += seconds
            parts["waiting"] += waited
            parts["transfer"] += busy - seconds - waited
            at, served = max(at, answered), True
        _gap(at, until, scheduled, served, False, parts)
    for part, ns in parts.items():
        setattr(worker, part, ns / 1e9)
    return worker


def _gap(
    since: int, until: int, scheduled: Sequence[tuple[int, int]], served: bool, sent: bool, parts: dict[str, float]
) -> None:
    """Attribute a time in which a device had no draft. `served`: it had one before; `sent`: it receives one after."""
    inside = scheduled[bisect_left(scheduled, (since,)) : bisect_left(scheduled, (until,))]
    first = inside[0][0] if inside else until
    parts["waiting" if served else "idle"] += first - since
    if not inside:
        return
    last = inside[-1][0] if sent else until  # when the drafts for this device were scheduled
    parts["idle"] += last - first
    parts["leader"] += until - last
