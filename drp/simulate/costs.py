"""Costs: the time of the leader, of messages and of waking up processes, in addition to the devices' time."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drp.leader.devices import parse_emulated
from drp.leader.events import TraceEvent
from drp.trace.evaluations import TracedEvaluation, evaluations
from drp.workers.emulated import seconds_of

Samples = tuple[float, ...]

SLEEP = 2e-3
"""Seconds of sleep after which caches are cold (docs/round.md)."""


@dataclass(frozen=True)
class LinearCost:
    """A time in seconds, linear in a count: `fixed` + `each` * count, plus one of `residuals`."""

    fixed: float = 0.0
    each: float = 0.0
    residuals: Samples = (0.0,)

    def draw(self, count: int, draws: random.Random) -> float:
        return max(0.0, self.fixed + self.each * count + draws.choice(self.residuals))

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> LinearCost:
        """Fit (count, time) pairs by least squares, with `fixed` and `each` at least 0."""
        if not points:
            return cls()
        x, y = np.array(points, dtype=np.float64).T
        each = max(0.0, float(np.polyfit(x, y, 1)[0])) if len(set(x)) > 1 else 0.0
        fixed = float(np.mean(y) - each * np.mean(x))
        if fixed < 0:
            fixed, each = 0.0, float(np.sum(x * y) / np.sum(x * x))
        return cls(fixed, each, tuple(float(v) for v in y - fixed - each * x))


@dataclass(frozen=True)
class Costs:
    """Times in seconds of everything except the devices. Each is drawn from samples, to reproduce its variation.

    The dispatch of runs shows in these times only. With asynchronous dispatch messages are sent while the devices
    compute and cost nothing. Between the end of an evaluation and the beginning of those whose drafts depend on it,
    the leader wakes up, adds the prediction and computes the drafts.

    start: from a run's start to its first drafts.
    form: computing drafts, by their number.
    send_first, send_more: sending a draft after another action, and directly after another draft.
    down: from sending until an idle worker begins; the first samples are for the first draft sent without a pause, the
        second for the next one, and so on, because workers that share cores wake up in turn.
    following: from the end of a worker's evaluation until it begins a draft that is already queued.
    wake_long, wake_short: from the end of an evaluation until the leader handles the prediction, after sleeping for
        longer than `SLEEP` or not.
    receive_first, receive_more: handling a prediction after a sleep, and one that had arrived already.
    refine: computing final states, by their number.
    head_start: how long the leader waits before refining, so that workers can start.
    end: from the last prediction to the run's end.
    late: by how much a device exceeds its nominal time.
    """

    start: Samples = (0.0,)
    form: LinearCost = LinearCost()
    send_first: Samples = (0.0,)
    send_more: Samples = (0.0,)
    down: tuple[Samples, ...] = ((0.0,),)
    following: Samples = (0.0,)
    wake_long: Samples = (0.0,)
    wake_short: Samples = (0.0,)
    receive_first: Samples = (0.0,)
    receive_more: Samples = (0.0,)
    refine: LinearCost = LinearCost()
    head_start: float = 0.0
    end: Samples = (0.0,)
    late: Samples = (0.0,)

    @classmethod
    def constant(cls, message: float, row: float, wake: float, dispatch: str = "sync") -> Costs:
        """Return costs from three times in seconds: per message, per row of arithmetic, and for waking a process up."""
        start, m, r, w, rows = (message + row,), (message,), (row,), (wake,), LinearCost(0.0, row)
        if dispatch == "async":
            return cls(start, rows, wake_long=w, wake_short=w, receive_first=r, receive_more=r, refine=rows, end=r)
        return cls(start, rows, m, m, (w,), m, w, w, m, m, rows, 0.0, r)

    @classmethod
    def measured(cls, timeline: Sequence[TraceEvent], devices: Sequence[str], dispatch: str = "sync") -> Costs:
        """Measure the costs from the runs in a trace; raise ValueError if no run has finished.

        `dispatch` is that of the runs, "sync" or "async", as their results say.

        Of the runs with the same number of rounds, the middle half by time is used. This omits the first run, which
        includes one-time work, and runs that other programs slowed down.
        """
        counted = _typical_runs(timeline)
        if not counted:
            raise ValueError("no run in this trace has finished; record a trace of one that does")
        found = [e for e in evaluations(timeline) if e.run in counted and e.answered is not None]
        fit = _Fit([event for event in timeline if event.run in counted], found, devices)
        return fit.async_costs() if dispatch == "async" else fit.costs()


class _Fit:
    """Collects the samples of costs from the events and evaluations of some runs."""

    def __init__(self, events: Sequence[TraceEvent], found: Sequence[TracedEvaluation], devices: Sequence[str]) -> None:
        self._events, self._found = events, found
        self._emulated = [parse_emulated(d, n) if d.startswith("emulated:") else None for n, d in enumerate(devices)]
        spans = {"scheduled", "sent", "accumulated", "refined", "end"}
        self._busy = sorted((event.since, event.ns) for event in events if event.kind in spans and event.since)

    def costs(self) -> Costs:
        start, end, form, refine = self._leader()
        send = self._send_times()
        down, following, late = self._workers()
        wake = self._wake_times()
        take = self._receive_times()
        return Costs(
            start=_or_zero(start),
            form=form,
            send_first=_or_zero(send[0]),
            send_more=_or_zero(send[1]),
            down=tuple(map(_or_zero, down)) or ((0.0,),),
            following=_or_zero(following),
            wake_long=_or_zero(wake[0]),
            wake_short=_or_zero(wake[1] or wake[0]),
            receive_first=_or_zero(take[0]),
            receive_more=_or_zero(take[1]),
            refine=refine,
            head_start=self._head_start(),
            end=_or_zero(end),
            late=_or_zero(late),
        )

    def async_costs(self) -> Costs:
        """Return the costs of asynchronous runs, by the times at which devices were idle between evaluations."""
        ends: dict[int, list[int]] = defaultdict(list)
        for e in self._found:
            ends[e.run].append(e.ended + self._link(e))
        for times in ends.values():
            times.sort()
        idle: list[float] = []
        following: list[float] = []
        first: dict[int, int] = {}
        last: dict[int, TracedEvaluation] = {}
        for e in sorted(self._found, key=lambda e: e.began):
            began = e.began - self._link(e)
            place = bisect.bisect_right(ends[e.run], began)
            ahead, last[e.worker] = last.get(e.worker), e
            if place == 0:
                first.setdefault(e.run, began)
            elif ahead is not None and ahead.scheduled is e.scheduled:
                following.append((began - ahead.ended - self._link(e)) / 1e9)
            else:
                idle.append((began - ends[e.run][place - 1]) / 1e9)
        begins = {event.run: event.ns for event in self._events if event.kind == "begin"}
        usual = float(np.median(idle)) if idle else 0.0
        start = [max(0.0, (first[run] - ns) / 1e9 - usual) for run, ns in begins.items() if run in first]
        end = [
            max(0.0, (event.ns - ends[event.run][-1]) / 1e9)
            for event in self._events
            if event.kind == "end" and ends[event.run]
        ]
        late = self._workers()[2]
        return Costs(
            start=_or_zero(start),
            down=(_or_zero(idle),),
            following=_or_zero(following),
            end=_or_zero(end),
            late=_or_zero(late),
        )

    def _leader(self) -> tuple[list[float], list[float], LinearCost, LinearCost]:
        start: list[float] = []
        end: list[float] = []
        form: list[tuple[int, float]] = []
        refine: list[tuple[int, float]] = []
        began: dict[int, int] = {}
        reached: dict[int, int] = defaultdict(int)
        for event in self._events:
            took = (event.ns - event.since) / 1e9
            if event.kind == "begin":
                began[event.run] = event.ns
            elif event.kind == "scheduled":
                if event.run in began:
                    start.append((event.ns - began.pop(event.run)) / 1e9)
                else:
                    form.append((len(event.steps), took))
            elif event.kind == "refined":
                if event.step > reached[event.run]:
                    refine.append((event.step - reached[event.run], took))
                reached[event.run] = event.step
            elif event.kind == "end":
                end.append(took)
        return start, end, LinearCost.fit(form), LinearCost.fit(refine)

    def _send_times(self) -> tuple[list[float], list[float]]:
        """Return the times of sending a draft after another action, and after another draft."""
        first: list[float] = []
        more: list[float] = []
        before: TraceEvent | None = None
        for event in self._events:
            if event.kind == "sent":
                (more if before is not None and before.kind == "sent" else first).append((event.ns - event.since) / 1e9)
            before = event
        return first, more

    def _receive_times(self) -> tuple[list[float], list[float]]:
        """Return the times of handling a prediction after a sleep, and one that had arrived, including its receipt."""
        first: list[float] = []
        more: list[float] = []
        ends = sorted(until for _, until in self._busy)
        for e in self._found:
            if e.accumulated is not None and e.answered is not None:
                place = bisect.bisect_right(ends, e.answered)
                before = ends[place - 1] if place else 0
                if e.ended + self._link(e) < before:
                    more.append((e.accumulated - before) / 1e9)
                else:
                    first.append((e.accumulated - e.answered) / 1e9)
        return first, more

    def _link(self, e: TracedEvaluation) -> int:
        """Return the link latency of an emulated device, one way, in ns; 0 for other devices."""
        emulated = self._emulated[e.worker]
        return round(emulated.latency * 1e9) if emulated is not None else 0

    def _workers(self) -> tuple[list[list[float]], list[float], list[float]]:
        """Return samples of `down`, of `following` and of `late`, in seconds."""
        down: list[list[float]] = []
        following: list[float] = []
        late: list[float] = []
        last: dict[int, TracedEvaluation] = {}
        before: TracedEvaluation | None = None
        place = 0
        for e in self._found:
            place = place + 1 if before is not None and e.since - before.sent < 50_000 else 0
            emulated, link, ahead = self._emulated[e.worker], self._link(e) / 1e9, last.get(e.worker)
            if ahead is not None and ahead.ended > e.sent:
                following.append((e.began - ahead.ended) / 1e9 - 2 * link)
            else:
                down.extend([] for _ in range(place + 1 - len(down)))
                down[place].append((e.began - e.sent) / 1e9 - link)
            if emulated is not None:
                late.append(e.seconds - seconds_of(emulated, e.run, e.step))
            before = last[e.worker] = e
        return [samples for samples in down if samples], following, late

    def _wake_times(self) -> tuple[list[float], list[float]]:
        """Return samples of `wake_long` and `wake_short`: from the evaluation that ended a sleep to its handling."""
        long: list[float] = []
        short: list[float] = []
        found = sorted((e.ended + self._link(e), e.answered or 0) for e in self._found)
        starts = [ended for ended, _ in found]
        for (_, asleep), (awake, _) in itertools.pairwise(self._busy):
            place = bisect.bisect_right(starts, asleep)
            there = [e for e in found[max(0, place - 1024) : place] if e[1] >= awake]  # ended before the sleep
            if not there and place < len(found) and found[place][0] <= awake <= found[place][1] + 1:
                ended = found[place][0]
                (long if (ended - asleep) / 1e9 > SLEEP else short).append((awake - ended) / 1e9)
        return long, short

    def _head_start(self) -> float:
        """Return the median time between the last draft sent and refining, where no prediction was handled between."""
        waits: list[float] = []
        before: TraceEvent | None = None
        for event in self._events:
            if event.kind == "refined" and before is not None and before.kind == "sent":
                waits.append((event.since - before.ns) / 1e9)
            if event.kind != "callback":
                before = event
        return float(np.median(waits)) if waits else 0.0


def _typical_runs(timeline: Sequence[TraceEvent]) -> set[int]:
    """Return the middle half of the runs by time, separately for each number of rounds."""
    began: dict[int, int] = {}
    rounds: Counter[int] = Counter()
    walls: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in timeline:
        if event.kind == "begin":
            began[event.run] = event.ns
        elif event.kind == "scheduled":
            rounds[event.run] += 1
        elif event.kind == "end" and event.run in began:
            walls[rounds[event.run]].append((event.ns - began[event.run], event.run))
    found: set[int] = set()
    for times in walls.values():
        times.sort()
        rest = len(times) // 4
        found.update(run for _, run in times[rest : len(times) - rest])
    return found


def _or_zero(samples: Sequence[float]) -> Samples:
    return tuple(samples) or (0.0,)
