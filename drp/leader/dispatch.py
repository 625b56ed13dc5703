"""Dispatch: which worker is given which drafts, how many in advance, and which of them twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from drp.leader.active import Active, Sent
from drp.leader.ahead import AheadRun
from drp.leader.carried import Carried, give_back
from drp.leader.marks import Marks
from drp.leader.sharing import Sharing
from drp.leader.staff import Staff, Station
from drp.protocol.messages import Also, Draft
from drp.protocol.waiting import give_way
from drp.sampling.run import Task

DEPTH = 2
"""Drafts, or batches of them, for each worker at most: one, and another in advance."""


class Dispatch:
    """Gives the drafts of the runs that are carried to the workers that are ready."""

    depth: int

    def __init__(self, staff: Staff, carried: Carried, marks: Marks, sharing: Sharing, hedge: float | None) -> None:
        self._staff, self._carried, self._marks = staff, carried, marks
        self.follow(sharing, hedge, DEPTH)

    def follow(self, sharing: Sharing, hedge: float | None, depth: int) -> None:
        """Share, hedge, and give so many drafts in advance from now on; only while no run is under way."""
        self._sharing, self._hedge, self.depth = sharing, hedge, depth

    def dispatch(self) -> None:
        """Give waiting drafts to workers: one each, and a second in advance if there is only one run.

        Those of a run ahead of its devices are only posted if their workers have others: more may go with them.
        """
        runs = [run for run in self._carried.under_way.values() if run.missing]
        ready = self._staff.ready
        if len(runs) == 1 and isinstance(runs[0], AheadRun):
            return self._dispatch_ahead(runs[0], ready)
        for depth in range(1, (self.depth if len(runs) == 1 else 1) + 1):
            for place, station in enumerate(ready):
                while len(station.drafts) < depth:
                    run = self._choose(place, len(ready), runs)
                    if run is None:
                        return self._hedge_late(ready)
                    self._give(station, run, run.waiting.popleft())
                    self._staff.deliver([station])
        return None

    def _choose(self, place: int, workers: int, runs: Sequence[Active]) -> Active | None:
        """Return what the policy chooses. It may be the caller's: if it fails, the runs it was to choose from end."""
        try:
            run = self._sharing.choose(place, workers, runs)
            if run is not None and not run.waiting:
                raise ValueError(f"{self._sharing!r} chose a run that has no draft waiting; choose one that has")
        except BaseException as error:
            for each in runs:
                with self._carried.charge(each):
                    raise RuntimeError(f"the policy chose no run for worker {place}: {error!r}") from error
            return None
        return run

    def deliver(self) -> None:
        """Send what was posted, but for what has to wait."""
        only = self._carried.only
        if only is None or not only.holds:
            self._staff.deliver(self._staff.ready)

    def _dispatch_ahead(self, run: AheadRun, ready: Sequence[Station]) -> None:
        """Give drafts of some rounds, each to the first worker that has the fewest drafts to be evaluated beside it."""
        room = run.room(sum(len(station.drafts) for station in ready), self.depth * len(ready))
        last: tuple[Task, ...] | None = None
        idle = [station for station in ready if not station.drafts]
        while run.waiting and (room > 0 or (last is not None and run.belongs(run.waiting[0], last, len(ready)))):
            last = run.waiting.popleft()
            self._give(min(ready, key=lambda station: run.beside(last, station.drafts)), run, last)
            room -= 1
        if len(idle) == len(ready) or not run.holds:
            self._staff.deliver(idle)
        if run.holds:
            give_way()  # The thread that carries the message to the first worker may want the core that this one is on.

    def _give(self, station: Station, run: Active, tasks: tuple[Task, ...]) -> None:
        """Post drafts to a worker, to be delivered, and take note of it."""
        with self._carried.charge(run):
            self._post(station, run, tasks)

    def _post(self, station: Station, run: Active, tasks: tuple[Task, ...]) -> None:
        since, rows = time.perf_counter_ns(), []
        self._carried.bind(station, run, drafts=True)
        for task in tasks:
            rows.append(run.free_row(task.slot))
            run.writing[rows[-1]] += 1
        task, row = tasks[0], rows[0]
        sequence, after = run.dispatch(station.number)
        sent = Sent(run, tasks, tuple(rows), sequence)
        also = tuple(Also(t.index, t.timestep, t.slot, r) for t, r in zip(tasks[1:], rows[1:], strict=True))
        draft = Draft(run.number, task.index, task.timestep, task.slot, row, sequence, after, also)
        try:
            self._staff.post(station, draft)
        except BaseException:  # It cannot be said in a message: a timestep of somebody's own grid, say.
            give_back(sent)
            raise
        for task in tasks:
            self._marks.add("sent", run, task.index, station.number, since=since)
        if not station.drafts:
            station.since = self._staff.clock.now()
        station.drafts.append(sent)
        run.given(station.number, sent)

    # Late drafts.

    def _hedge_late(self, ready: Sequence[Station]) -> None:
        """Give drafts that are late to idle workers too; the first answer counts."""
        idle = [station for station in ready if not station.drafts] if self._hedge else []
        for station in ready if idle else ():
            if station.drafts and self._staff.clock.now() >= self._late(station):
                for sent in list(station.drafts):
                    if idle and self._carried.is_missing(sent) and len(self.copies(sent)) == 1:
                        for task in sent.tasks:
                            self._marks.add("hedged", sent.run, task.index, station.number)
                        self._give(idle[-1], sent.run, sent.tasks)
                        self._staff.deliver([idle.pop()])

    def _late(self, station: Station) -> float:
        """Return when the first draft of a busy station is late enough to be given to another too."""
        usual = station.drafts[0].run.usual
        return station.since + self._hedge * usual if self._hedge and usual else float("inf")

    def late_times(self, busy: Sequence[Station]) -> Iterator[float]:
        """Yield when drafts of busy stations will be late, if there is somebody idle to give them to."""
        if self._hedge and len(busy) < len(self._staff.ready):
            for station in busy:
                if any(len(self.copies(sent)) == 1 for sent in station.drafts):
                    yield self._late(station)

    def copies(self, sent: Sent) -> list[Sent]:
        """Return a batch wherever a worker has it."""
        return [other for station in self._staff.ready for other in station.drafts if other.tasks is sent.tasks]
