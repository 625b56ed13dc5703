"""Carried: the runs and sessions that the engine has, from their beginning until no worker has anything of theirs."""

from __future__ import annotations

from drp.leader.active import Active, Sent
from drp.leader.ahead import AheadRun
from drp.leader.awake import Awake
from drp.leader.marks import Marks
from drp.leader.staff import Loss, Staff, Station
from drp.protocol.messages import Unbind


class Carried:
    """`under_way` are those that want predictions, by number.

    `leaving` are those that are over, while a worker still has one of their drafts, or has not opened their memory.
    """

    def __init__(self, staff: Staff, marks: Marks, awake: Awake, devices: tuple[str, ...]) -> None:
        self.under_way: dict[int, Active] = {}
        self.leaving: dict[int, Active] = {}
        self._begun: list[Active] = []
        self._staff, self._marks, self._awake, self._devices = staff, marks, awake, devices

    def begin(self, run: Active) -> None:
        """Take a run. Workers open its memory when they are given its first draft, or with `bind_others`.

        Drafts that run ahead of their devices are given while there is time for that.
        """
        self.under_way[run.number] = run
        if not isinstance(run, AheadRun):
            self._begun.append(run)
        self._awake.hold()

    def bind(self, station: Station, run: Active) -> None:
        """Have a worker open a run's memory, if it was not asked to."""
        if station.number not in run.bound:
            self._staff.send(station, run.bind(station.number))
            run.bound.add(station.number)
            run.unbound.add(station.number)

    def bind_others(self) -> None:
        """Have all workers open the memory of the runs that have begun."""
        while self._begun:
            run = self._begun.pop()
            for station in self._staff.ready if run.number in self.under_way else ():
                self.bind(station, run)

    def on_bound(self, station: Station, number: int) -> bool:
        """Note that a worker has opened a run's memory; return False if it was not asked to."""
        run = self.under_way.get(number) or self.leaving.get(number)
        if run is None or station.number not in run.unbound:
            return False
        run.unbound.remove(station.number)
        self.let_go(run)
        return True

    @property
    def ahead(self) -> list[AheadRun]:
        """Those whose drafts are answered ahead of the devices."""
        return [run for run in (*self.under_way.values(), *self.leaving.values()) if isinstance(run, AheadRun)]

    @property
    def at_work(self) -> bool:
        """Whether workers have all that they need for now, of all runs."""
        runs = [*self.under_way.values(), *self.leaving.values()]
        return bool(runs) and all(run.at_work for run in runs)

    @property
    def ready(self) -> list[AheadRun]:
        """Those that are under way, and have drafts to form."""
        return [run for run in self.under_way.values() if isinstance(run, AheadRun) and run.ready]

    def on_loss(self, loss: Loss) -> list[AheadRun]:
        """Note that a worker is gone, whatever it was asked; return runs that were built upon what it had not done."""
        again = [run for run in self.ahead if run.lose_answers(loss.station.number, loss.drafts)]
        for run in (*self.under_way.values(), *self.leaving.values()):
            run.hurt = run.hurt or loss.station.number in run.bound
            run.bound.discard(loss.station.number)
            run.unbound.discard(loss.station.number)
            run.served.discard(loss.station.number)
        for run in self.under_way.values():
            run.incidents.append(loss.why)
        return again

    def is_missing(self, sent: Sent) -> bool:
        """Return whether the predictions of a batch are still wanted: it may have been sent twice, or its run over."""
        return sent.run.number in self.under_way and sent.run.missing.get(sent.tasks[0].slot) is sent.tasks[0]

    def end(self, run: Active, error: BaseException | None) -> None:
        """Hand a run's result or error to its caller; let go of its memory once no worker uses it."""
        del self.under_way[run.number]
        self.leaving[run.number] = run
        if not self.under_way:
            self._awake.release()
        run.waiting.clear()
        run.missing.clear()
        if error is not None:
            self._marks.add("failed", run)
        run.finish(error, self._devices)
        self.let_go(run)

    def let_go(self, run: Active) -> None:
        """Give the memory of a run that is over back, if no worker uses it any more."""
        if run.number in self.leaving and not run.writing and not run.unbound:
            del self.leaving[run.number]
            for station in self._staff.ready:
                self._staff.send(station, Unbind(run.number))
            run.release()

    def let_all_go(self) -> None:
        """Do so for all that are over."""
        for run in list(self.leaving.values()):
            self.let_go(run)

    def close(self) -> list[Active]:
        """Give all memory back; return those that were under way, whose callers are still to be told."""
        rest = list(self.under_way.values())
        for run in (*rest, *self.leaving.values()):
            run.release()
        for station in self._staff.stations:
            station.drafts.clear()
        self.under_way.clear()
        self.leaving.clear()
        self._awake.release()
        return rest


def give_back(sent: Sent) -> None:
    """Note that a worker no longer writes to the rows."""
    for row in sent.rows:
        sent.run.writing[row] -= 1
        if not sent.run.writing[row]:
            del sent.run.writing[row]
