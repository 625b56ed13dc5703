"""Carried: the runs and sessions that the engine has, from their beginning until no worker has anything of theirs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

from drp.leader.active import Active, Sent
from drp.leader.ahead import AheadRun
from drp.leader.awake import Awake
from drp.leader.marks import Marks
from drp.leader.staff import Loss, Staff, Station
from drp.protocol.memory import KEPT
from drp.protocol.messages import Again, Unbind

log = logging.getLogger(__name__)


class Carried:
    """`under_way` are those that want predictions, by number.

    `leaving` are those that are over, while a worker still has one of their drafts, or has not opened their memory.
    """

    def __init__(self, staff: Staff, marks: Marks, awake: Awake, devices: tuple[str, ...]) -> None:
        self.under_way: dict[int, Active] = {}
        self.leaving: dict[int, Active] = {}
        self._begun: list[Active] = []
        self._staff, self._marks, self._awake, self._devices = staff, marks, awake, devices

    @contextlib.contextmanager
    def charge(self, run: Active) -> Iterator[None]:
        """Have whatever is raised meanwhile end this run. Code and data of its caller must not end the leader."""
        try:
            yield
        except BaseException as error:
            if self.under_way.get(run.number) is run:
                self.end(run, error)
            else:
                log.debug("run %d, which is over: %r", run.number, error)

    def begin(self, run: Active) -> None:
        """Take a run. Workers open its memory when they are given its first draft, or with `bind_others`.

        Drafts that run ahead of their devices are given while there is time for that, except the first one: its worker
        opens the memory while it is formed.
        """
        self.under_way[run.number] = run
        if isinstance(run, AheadRun):
            for station in self._staff.ready[:1]:
                with self.charge(run):
                    self.bind(station, run)
                self._staff.deliver([station])
        else:
            self._begun.append(run)
        self._awake.hold()

    def bind(self, station: Station, run: Active, drafts: bool = False) -> None:
        """Post to a worker that it open a run's memory, if it was not asked to; `drafts`: some are posted with this.

        Where those are the worker's until they are stamped, it need not say that it has opened the memory.
        """
        if station.number not in run.bound:
            answer = not (drafts and isinstance(run, AheadRun))
            bind, kept = replace(run.bind(station.number), answer=answer), station.kept
            if kept is not None and replace(kept, run=run.number, answer=answer) == bind:
                self._staff.post(station, Again(run.number, answer))
                station.kept = None
            else:
                self._staff.post(station, bind)
            station.binds[run.number] = bind
            run.bound.add(station.number)
            if answer:
                run.unbound.add(station.number)

    def bind_others(self) -> None:
        """Have all workers open the memory of the runs that have begun."""
        while self._begun:
            run = self._begun.pop()
            for station in self._staff.ready:
                with self.charge(run):
                    if run.number in self.under_way:
                        self.bind(station, run)
            self._staff.deliver(self._staff.ready)

    def on_bound(self, station: Station, number: int) -> bool:
        """Note that a worker has opened a run's memory; return False if it was not asked to."""
        run = self.under_way.get(number) or self.leaving.get(number)
        if run is None or station.number not in run.unbound:
            return False
        run.unbound.remove(station.number)
        self._staff.deliver(self._staff.ready)  # What was held back meanwhile.
        self.let_go(run)
        return True

    @property
    def ahead(self) -> list[AheadRun]:
        """Those whose drafts are answered ahead of the devices."""
        return [run for run in (*self.under_way.values(), *self.leaving.values()) if isinstance(run, AheadRun)]

    @property
    def only(self) -> AheadRun | None:
        """The only run that workers have, if its drafts are answered ahead of the devices."""
        if len(self.under_way) + len(self.leaving) != 1:
            return None
        run = next(iter((self.under_way or self.leaving).values()))
        return run if isinstance(run, AheadRun) else None

    @property
    def lent(self) -> bool:
        """Whether there is one run, and this thread has no core but those that its workers lend it."""
        return (only := self.only) is not None and only.stream.lent

    @property
    def at_work(self) -> bool:
        """Whether workers have all that they need for now, of all runs."""
        runs = [*self.under_way.values(), *self.leaving.values()]
        return bool(runs) and all(run.at_work for run in runs)

    @property
    def begins(self) -> int:
        """How many rounds have begun, of the runs under way."""
        return sum(run.begins for run in self.under_way.values() if isinstance(run, AheadRun))

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
        try:
            run.drop()
        finally:
            run.finish(error, self._devices)
        self.let_go(run)

    def let_go(self, run: Active) -> None:
        """Give the memory of a run that is over back, if no worker uses it any more."""
        if run.number in self.leaving and not run.writing and not run.unbound:
            del self.leaving[run.number]
            for station in self._staff.ready:
                if (bind := station.binds.pop(run.number, None)) is not None:
                    keep = bool(bind.number) and run.arena.memory.nbytes <= KEPT and station.device.gpu is None
                    station.kept = bind if keep else station.kept
                    self._staff.post(station, Unbind(run.number, keep))
            self._staff.deliver(self._staff.ready)
            run.release()

    def let_all_go(self) -> None:
        """Do so for all that are over."""
        for run in list(self.leaving.values()):
            self.let_go(run)

    def close(self) -> None:
        """Give all memory back; callers were told."""
        with contextlib.ExitStack() as rest:
            rest.callback(self._awake.release)
            for run in (*self.under_way.values(), *self.leaving.values()):
                rest.callback(run.release)
            for station in self._staff.stations:
                station.drafts.clear()
            self.under_way.clear()
            self.leaving.clear()


def give_back(sent: Sent) -> None:
    """Note that a worker no longer writes to the rows."""
    for row in sent.rows:
        sent.run.writing[row] -= 1
        if not sent.run.writing[row]:
            del sent.run.writing[row]
