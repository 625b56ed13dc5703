"""Rounds: a run's timeline, divided into rounds, and each round's time into its parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.figures import percentile
from drp.leader.events import TraceEvent

PARTS = ("arithmetic", "sending", "wire")


@dataclass(frozen=True)
class RoundTime:
    """One round, in seconds: it begins when the one before has its last prediction, and ends with its own last.

    The leader says when that is, or, where messages run ahead of the devices, these do: then `arithmetic` goes on until
    the first of them begins, waking up included, `sending` is nothing, and `wire` is how much later the others begin.

    The path to the last prediction has four parts: `arithmetic` until the drafts are formed; `sending` until the draft
    of the worker that answers last has gone; that worker's device time; and `wire`, all else: both messages' ways, and
    both processes' waking up. `slowest` is the longest device time of the round (of a worker, if it has several
    drafts), by that worker's own clock; `mean` is the workers' mean. `lost` is what the round took beyond `slowest`.
    """

    drafts: int
    wall: float
    slowest: float
    mean: float
    arithmetic: float
    sending: float
    wire: float

    @property
    def lost(self) -> float:
        """The time that no device needed."""
        return self.wall - self.slowest

    @property
    def waiting(self) -> float:
        """How much longer the slowest worker's device took than the mean of them."""
        return self.slowest - self.mean


@dataclass(frozen=True)
class RunTime:
    """One run, in seconds: its rounds, and its wall time from the first draft's forming to the last state."""

    rounds: tuple[RoundTime, ...]
    wall: float

    @property
    def device(self) -> float:
        """The time that the rounds would take if nothing but the slowest device of each took any."""
        return sum(r.slowest for r in self.rounds)

    @property
    def efficiency(self) -> float:
        """Measured over theoretical speed-up: `device` over `wall`."""
        return self.device / self.wall


def split(timeline: Sequence[TraceEvent]) -> RunTime:
    """Return the times of a run from its marks."""
    began, ended = timeline[0], timeline[-1]
    assert began.kind == "begin"
    assert ended.kind == "end"
    rounds = _by_devices(timeline) if _is_ahead(timeline) else _by_leader(timeline)
    return RunTime(tuple(rounds), (ended.ns - began.ns) / 1e9)


def _is_ahead(timeline: Sequence[TraceEvent]) -> bool:
    """Whether a round was formed before all of those before it were seen to be evaluated."""
    out: set[int] = set()
    for mark in timeline:
        if mark.kind == "scheduled" and out:
            return True
        out.update(mark.steps)
        if mark.kind == "predicted":
            out.discard(mark.step)
    return False


def _by_devices(timeline: Sequence[TraceEvent]) -> Iterator[RoundTime]:
    answers = {mark.step: mark for mark in timeline if mark.kind == "predicted"}
    before = timeline[0].ns / 1e9
    for formed in (mark for mark in timeline if mark.kind == "scheduled"):
        marks = [answers[step] for step in formed.steps]
        seconds: dict[int, float] = defaultdict(float)
        for mark in marks:
            seconds[mark.worker] += mark.seconds
        began, ended = min(mark.times[1] for mark in marks), max(mark.times[3] for mark in marks)
        slowest = max(seconds.values())
        yield RoundTime(
            drafts=len(marks),
            wall=ended - before,
            slowest=slowest,
            mean=sum(seconds.values()) / len(seconds),
            arithmetic=began - before,
            sending=0.0,
            wire=ended - began - slowest,
        )
        before = ended


def _by_leader(timeline: Sequence[TraceEvent]) -> Iterator[RoundTime]:
    before = timeline[0].ns
    for marks in _by_round(timeline):
        sent: dict[int, int] = {}
        seconds: dict[int, float] = defaultdict(float)
        for mark in marks:
            if mark.kind == "sent":
                sent.setdefault(mark.worker, mark.ns)
            elif mark.kind == "predicted":
                seconds[mark.worker] += mark.seconds
                last = mark
        yield RoundTime(
            drafts=sum(mark.kind == "predicted" for mark in marks),
            wall=(last.ns - before) / 1e9,
            slowest=max(seconds.values()),
            mean=sum(seconds.values()) / len(seconds),
            arithmetic=(marks[0].ns - before) / 1e9,
            sending=(sent[last.worker] - marks[0].ns) / 1e9,
            wire=(last.ns - sent[last.worker]) / 1e9 - seconds[last.worker],
        )
        before = last.ns


def _by_round(timeline: Sequence[TraceEvent]) -> Iterator[Sequence[TraceEvent]]:
    starts = [i for i, mark in enumerate(timeline) if mark.kind == "scheduled"]
    for start, stop in zip(starts, [*starts[1:], len(timeline)], strict=True):
        yield timeline[start:stop]


def summary(runs: Sequence[RunTime], drafts: int) -> dict[str, float]:
    """Return p50 and p95 of the runs' figures, and of their rounds of `drafts` drafts, in seconds."""
    rounds = [r for run in runs for r in run.rounds if r.drafts == drafts]
    figures = {
        "wall": [run.wall for run in runs],
        "device": [run.device for run in runs],
        "efficiency": [run.efficiency for run in runs],
        "lost": [r.lost for r in rounds],
        "waiting": [r.waiting for r in rounds],
        **{part: [getattr(r, part) for r in rounds] for part in PARTS},
    }
    return {f"{name}_p{q}": percentile(values, q) for name, values in figures.items() for q in (50, 95)}
