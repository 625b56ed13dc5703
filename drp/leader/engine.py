"""Engine: the leader's thread. It alone uses the socket, and it carries all runs forward. One role, one loop."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future

import torch

from drp.leader.active import Active, ActiveRun, Pending
from drp.leader.awake import Awake
from drp.leader.devices import Device
from drp.leader.errors import WorkerError
from drp.leader.ground import GpuOptions, Ground
from drp.leader.pool import GRACE, Pool
from drp.leader.request import Job, Request
from drp.leader.session import Session
from drp.leader.sharing import ByLoad, Sharing
from drp.leader.staff import MOST_DRAFT, Loss, Sent, Staff, Station
from drp.leader.timeline import Mark, Timeline, What
from drp.protocol.arena import Arena
from drp.protocol.messages import Also, Bound, Draft, Fault, ModelSpec, Prediction, ToLeader, Unbind
from drp.sampling.run import Task

HEAD_START = 0.0005
"""Seconds that workers have to pick up their drafts before the leader refines: it may be using one of their cores."""

ROOM = 4
"""Runs at once, for each worker: enough to keep it busy. Others wait, and take no memory meanwhile."""

DEPTH = 2
"""Drafts, or batches of them, that a worker has at most: one, and another in advance."""

log = logging.getLogger(__name__)


class Engine:
    """Runs submitted from any thread, on the workers of one pool, in a thread of its own."""

    def __init__(
        self,
        model: str,
        devices: Sequence[Device],
        threads: int,
        python: str | os.PathLike[str] | None,
        start_timeout: float,
        draft_timeout: float | None,
        sharing: Sharing | None,
        hedge: float | None,
        batch: int,
        gpu: GpuOptions,
        awake: Awake,
    ) -> None:
        self._batch, self._ground = batch, Ground(devices, gpu, batch)
        self.timelines: tuple[Timeline, ...] = ()
        self.overlap, self._awake = True, awake
        self._draft_timeout = draft_timeout
        self.follow(sharing or ByLoad(), hedge, DEPTH)
        self._devices = tuple(device.name for device in devices)
        self._pool = Pool(model, threads, python)
        self._staff = Staff(self._pool, model, devices, start_timeout, self._ground)
        self._inbox: deque[tuple[Job, Request, Pending] | Session] = deque()
        self._poked: deque[Session] = deque()
        self._runs: dict[int, Active] = {}
        self._leaving: dict[int, Active] = {}
        """Runs that are over, while a worker still has one of their drafts, or has not opened their memory."""
        self._numbers = itertools.count()
        self._closing: float | None = None
        self._lost: WorkerError | None = None
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pool.watch(self._wakeup)
        self._gate = threading.Lock()
        self._started: Future[ModelSpec] = Future()
        self._alone = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="drp-leader", daemon=True)
        torch_threads = torch.get_num_threads()
        self._thread.start()
        self._alone.wait()
        torch.set_num_threads(torch_threads)  # A thread keeps its own number; what others start with is as it was.
        try:
            self.spec = self._started.result()
        except BaseException:  # a worker's failure, or an interrupt of this thread
            self.close(grace=0.0)
            raise

    # What other threads call.

    @property
    def staff(self) -> Staff:
        """The workers' places."""
        return self._staff

    @property
    def dropped(self) -> int:
        """How many messages were none, or from nobody."""
        return self._pool.dropped

    def submit(self, job: Job, request: Request) -> Pending:
        """Begin a run at once; raise RuntimeError if the engine was closed, WorkerError if it has no worker left."""
        pending = Pending(self._wake)
        pending.set_running_or_notify_cancel()
        self._put((job, request, pending))
        return pending

    def open(self, make_arena: Callable[[int, int], Arena]) -> Session:
        """Begin a session; `make_arena` is given its number, and how many rows beyond those that it reads it needs."""
        session = Session(*self._numbered(make_arena), self._poke, self._batch)
        try:
            self._put(session)
        except BaseException:
            session.arena.close()
            raise
        return session

    def follow(self, sharing: Sharing, hedge: float | None, depth: int) -> None:
        """Share, hedge, and give so many drafts in advance from now on; only while no run is under way."""
        self._sharing, self._hedge, self._depth = sharing, hedge, depth

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is a callback."""
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        """Whether it takes no more runs."""
        return self._closing is not None

    def close(self, grace: float = GRACE) -> None:
        """Cancel all runs and end the workers, by force after `grace` seconds; wait until that is done."""
        if os.getpid() != self._pool.owner:
            return  # A forked child has no such thread, and the workers are its parent's.
        with self._gate:
            if self._closing is None:
                self._closing = grace
        self._wake()
        if not self.is_this_thread:
            self._thread.join(grace + 10.0)

    def _put(self, what: tuple[Job, Request, Pending] | Session) -> None:
        if os.getpid() != self._pool.owner:
            raise RuntimeError(
                f"this leader is process {self._pool.owner}'s, which this one was forked from; make a new one"
            )
        with self._gate:
            if self._lost is not None:
                raise WorkerError(f"this leader is closed; make a new one: {self._lost}")
            if self._closing is not None:
                raise RuntimeError("this leader is closed; make a new one")
            self._inbox.append(what)
        self._wake()

    def _numbered(self, make_arena: Callable[[int, int], Arena]) -> tuple[int, Arena]:
        number = next(self._numbers) % 2**31
        return number, make_arena(number, self._spare)

    @property
    def _spare(self) -> int:
        return self._depth * len(self._devices) * self._batch

    def _poke(self, session: Session) -> None:
        self._poked.append(session)
        self._wake()

    def _wake(self) -> None:
        with self._gate:
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)

    # The loop.

    def _serve(self) -> None:
        error: WorkerError | None = None
        # Sums of rows are too small to share out, and the threads that would share them spin on the workers' cores.
        torch.get_num_threads()  # At its first call a thread takes the common number: not after the next line.
        torch.set_num_threads(1)
        self._alone.set()
        try:
            self._start()
            while self._closing is None:
                self._admit()
                self._dispatch()  # before anything else: the workers are waiting
                self._refine()  # the states behind, while they compute
                self._take()
        except WorkerError as lost:
            error = WorkerError(*lost.args)  # without its traceback, whose frames hold the runs' memory
        except Exception as bug:
            log.exception("the leader's thread failed")
            error = WorkerError(f"the leader's thread failed, and its workers were ended: {bug!r}")
        finally:
            with self._gate:
                self._lost = error
                grace = 0.0 if error or self._closing is None else self._closing
                self._closing = grace
            self._end_all(error)
            self._staff.close(grace)
            self._ground.close()
            with self._gate:  # Its number may be another file's at once: nobody may write to it any more.
                os.close(self._wakeup)
                self._wakeup = -1
            if not self._started.done():
                self._started.set_exception(error or RuntimeError("this leader was closed while it started"))

    def _start(self) -> None:
        """Bring all workers up; until then, whatever goes wrong with one is an error."""
        self._ground.enter()
        for station in self._staff.stations:
            self._staff.start(station)
        while self._closing is None and len(self._staff.ready) < len(self._staff.stations):
            got = self._pool.poll(self._staff.next_time, self._wakeup)
            losses = self._staff.tend()
            if got is not None and not losses:
                loss = self._staff.take(self._staff.station_of(got[0]), got[1])
                losses = [loss] if loss else []
            for loss in losses:
                raise WorkerError(loss.why)
        if self._closing is None:
            self._started.set_result(self._staff.crew.facts.spec)

    def _admit(self) -> None:
        """Begin runs that were submitted, as many as there is room for, and end those that are unwanted."""
        for what in list(self._inbox):
            if not isinstance(what, Session) and what[2].unwanted and not what[2].done():
                what[2].set_exception(CancelledError())
        while self._inbox and len(self._runs) < ROOM * len(self._devices):
            run = self._begin(self._inbox.popleft())
            if run is not None:
                self._mark("begin", run)
                run.watch = self._watch(run) if self.timelines else None
                self._runs[run.number] = run
                self._awake.hold()
                for station in self._staff.ready:
                    self._bind(station, run)
                self._form(run)
        while self._poked:
            session = self._poked.popleft()
            if session.number in self._runs and session.idle:
                self._form(session)
        for run in [run for run in self._runs.values() if run.unwanted]:
            self._end(run, CancelledError())

    def _begin(self, what: tuple[Job, Request, Pending] | Session) -> Active | None:
        if isinstance(what, Session):
            return what
        job, request, pending = what
        if pending.done():  # cancelled while it waited
            return None
        try:
            number, make = next(self._numbers) % 2**31, self._ground.make
            run = ActiveRun(number, job, request, pending, self._spare, self._batch, make)
            if self._ground.nvtx:
                run.name_ranges()
            return run
        except Exception as error:  # no memory, or a mode of somebody's own: the caller's to hear
            pending.set_exception(error)
            return None

    def _bind(self, station: Station, run: Active) -> None:
        run.arena.memory.written()
        self._staff.send(station, run.arena.bind)
        run.unbound.add(station.number)

    def _form(self, run: Active) -> None:
        """Form a run's next drafts, or end it."""
        since, cuts, formed = time.perf_counter_ns(), len(run.cuts), len(run.waiting)
        try:
            if run.behind and not self.overlap:
                run.refine()
            more = run.form()
            if not self.overlap or more is False:
                run.refine()
        except Exception as error:  # a callback's, or a mode's of somebody's own: the run's, not the engine's
            self._end(run, error)
            return
        if more is not None and self.timelines:
            for cut in run.cuts[cuts:]:
                self._mark("cut", run, cut)
            steps = tuple(task.index for batch in itertools.islice(run.waiting, formed, None) for task in batch)
            self._mark("formed" if more else "end", run, since=since, steps=steps)
        if more is False:
            self._end(run, None)

    def _dispatch(self) -> None:
        """Give waiting drafts to workers: one each, and a second in advance if there is only one run."""
        runs = [run for run in self._runs.values() if run.missing]
        ready = self._staff.ready
        for depth in range(1, (self._depth if len(runs) == 1 else 1) + 1):
            for place, station in enumerate(ready):
                while len(station.drafts) < depth:
                    run = self._sharing.choose(place, len(ready), runs)
                    if run is None:
                        return self._hedge_late(ready)
                    self._give(station, run, run.waiting.popleft())
        return None

    def _give(self, station: Station, run: Active, tasks: tuple[Task, ...]) -> None:
        since, rows = time.perf_counter_ns(), []
        for task in tasks:
            rows.append(run.free_row(task.slot))
            run.writing[rows[-1]] += 1
        task, row = tasks[0], rows[0]
        run.arena.memory.written()  # on a GPU; elsewhere it is nothing
        also = tuple(Also(t.index, t.timestep, t.slot, r) for t, r in zip(tasks[1:], rows[1:], strict=True))
        self._staff.send(station, Draft(run.number, task.index, task.timestep, task.slot, row, also))
        for task in tasks:
            self._mark("sent", run, task.index, station.number, since=since)
        if not station.drafts:
            station.since = time.monotonic()
        station.drafts.append(Sent(run, tasks, tuple(rows)))

    def _hedge_late(self, ready: Sequence[Station]) -> None:
        """Give drafts that are late to idle workers too; the first answer counts."""
        idle = [station for station in ready if not station.drafts] if self._hedge else []
        for station in ready if idle else ():
            if station.drafts and time.monotonic() >= self._late(station):
                for sent in list(station.drafts):
                    if idle and self._is_missing(sent) and len(self._copies(sent)) == 1:
                        for task in sent.tasks:
                            self._mark("hedged", sent.run, task.index, station.number)
                        self._give(idle.pop(), sent.run, sent.tasks)

    def _late(self, station: Station) -> float:
        """Return when the first draft of a busy station is late enough to be given to another too."""
        usual = station.drafts[0].run.usual
        return station.since + self._hedge * usual if self._hedge and usual else float("inf")

    def _copies(self, sent: Sent) -> list[Sent]:
        return [other for station in self._staff.ready for other in station.drafts if other.tasks is sent.tasks]

    def _is_missing(self, sent: Sent) -> bool:
        return sent.run.number in self._runs and sent.run.missing.get(sent.tasks[0].slot) is sent.tasks[0]

    def _refine(self) -> None:
        behind = [run for run in self._runs.values() if run.behind]
        if behind and self.overlap:
            self._pool.wait(HEAD_START)
        for run in behind:
            since = time.perf_counter_ns()
            try:
                run.refine()
                self._mark("refined", run, run.steps_done, since=since)
            except Exception as error:  # a callback's
                self._end(run, error)

    def _take(self) -> None:
        """Wait for an answer, and take what has come until a worker can be given more."""
        timer = self._next_time()
        got = self._pool.poll(timer, self._wakeup)
        while got is not None:
            self._on(self._staff.station_of(got[0]), got[1])
            if any(run.waiting for run in self._runs.values()):
                break
            got = self._pool.receive_now()
        if time.monotonic() >= timer:
            self._on_time()

    def _next_time(self) -> float:
        """Return when something is due."""
        busy = [station for station in self._staff.ready if station.drafts]
        times = [self._deadline(station) for station in busy]
        if self._hedge and len(busy) < len(self._staff.ready):
            times += [self._late(s) for s in busy if any(len(self._copies(sent)) == 1 for sent in s.drafts)]
        return min([*times, self._staff.next_time])

    def _deadline(self, station: Station) -> float:
        """Return when a busy station's first draft is given up, and the worker with it."""
        return station.since + (self._draft_timeout or station.drafts[0].run.patience(station.number))

    def _on_time(self) -> None:
        for loss in self._staff.tend():
            self._on_loss(loss)
        now = time.monotonic()
        for station in self._staff.ready:
            if station.drafts and self._deadline(station) <= now:
                run, task = station.drafts[0].run, station.drafts[0].tasks[0]
                seconds = self._deadline(station) - station.since
                self._on_loss(
                    self._staff.lose(
                        station,
                        f"{station.worker} has not evaluated step {task.index} of run {run.number} within "
                        f"{seconds:g} s (draft_timeout)",
                    )
                )

    def _on(self, station: Station, message: ToLeader | None) -> None:
        """Take a message, or the end of a worker."""
        first = station.drafts[0] if station.drafts else None
        match message:
            case Prediction() | Fault() if first and _what(message) == _owed(first):
                station.drafts.popleft()
                station.since, station.used_up = time.monotonic(), 0.0
                self._on_answer(station, first, message)
            case Bound(number) if (run := self._runs.get(number) or self._leaving.get(number)) and (
                station.number in run.unbound
            ):
                run.unbound.remove(station.number)
                self._let_go(run)
            case Prediction() | Fault() | Bound():
                self._on_loss(self._staff.lose(station, f"{station.worker} sent {message}, which it does not owe"))
            case _:
                starting = station.state == "starting"
                if loss := self._staff.take(station, message):
                    self._on_loss(loss)
                elif starting and station.state == "ready":
                    for run in self._runs.values():
                        self._bind(station, run)

    def _on_answer(self, station: Station, sent: Sent, message: Prediction | Fault) -> None:
        run, index, since = sent.run, sent.tasks[0].index, time.perf_counter_ns()
        counts = self._is_missing(sent)  # It may be the second of two copies, or its run over.
        _give_back(sent)
        self._answered("answer" if counts else "late", sent, station, message)
        if counts and isinstance(message, Fault):
            words = f"{station.worker} failed evaluating step {index} of run {run.number}: {message.error}"
            self._end(run, WorkerError(f"{words}\n{message.traceback}"))
        elif counts and isinstance(message, Prediction):
            run.answer(station.number, sent.tasks, sent.rows, message.seconds)
            for task in sent.tasks:
                self._mark("folded", run, task.index, station.number, since=since)
            if run.ready:
                self._form(run)
        self._let_go(run)

    def _on_loss(self, loss: Loss) -> None:
        """Have a lost worker's drafts evaluated by others: they are what they were, and so will the predictions be."""
        number = loss.station.number
        for run in (*self._runs.values(), *self._leaving.values()):
            run.unbound.discard(number)
            run.served.discard(number)
        for run in self._runs.values():
            run.incidents.append(loss.why)
        for place, sent in reversed([*enumerate(loss.drafts)]):
            run, task = sent.run, sent.tasks[0]
            _give_back(sent)
            for each in sent.tasks:
                self._mark("lost", run, each.index, number)
            if self._is_missing(sent) and not self._copies(sent):
                run.waiting.appendleft(sent.tasks)
                run.used_up[task.index] += MOST_DRAFT[loss.fault] if place == 0 else 0.0
                if run.used_up[task.index] > 1 - 1e-9:
                    several = (
                        f"step {task.index} of run {run.number} was given up, after every worker that evaluated it"
                    )
                    self._end(run, WorkerError(f"{several} was lost; the last: {loss.why}"))
        for run in list(self._leaving.values()):
            self._let_go(run)

    # Ends.

    def _end(self, run: Active, error: BaseException | None) -> None:
        """Hand a run's result or error to its caller; let go of its memory once no worker uses it."""
        del self._runs[run.number]
        self._leaving[run.number] = run
        if not self._runs:
            self._awake.release()
        run.waiting.clear()
        run.missing.clear()
        if error is not None:
            self._mark("failed", run)
        run.finish(error, self._devices)
        self._let_go(run)

    def _let_go(self, run: Active) -> None:
        if run.number in self._leaving and not run.writing and not run.unbound:
            del self._leaving[run.number]
            for station in self._staff.ready:
                self._staff.send(station, Unbind(run.number))
            run.arena.close()

    def _end_all(self, error: WorkerError | None) -> None:
        """Tell every caller; each gets an error of its own, since a traceback is added where it is raised."""

        def reason() -> BaseException:
            return WorkerError(*error.args) if error else CancelledError("the leader was closed")

        for run in (*self._runs.values(), *self._leaving.values()):
            run.arena.close()
        for run in self._runs.values():
            run.finish(reason(), self._devices)
        for what in self._inbox:
            if isinstance(what, Session):
                what.finish(reason(), self._devices)
                what.arena.close()
            elif not what[2].done():
                what[2].set_exception(reason())
        for station in self._staff.stations:
            station.drafts.clear()
        self._runs.clear()
        self._awake.release()
        self._leaving.clear()
        self._inbox.clear()

    # Marks.

    def _mark(
        self, what: What, run: Active, step: int = 0, worker: int = 0, since: int = 0, steps: tuple[int, ...] = ()
    ) -> None:
        for timeline in self.timelines:
            timeline.append(Mark(what, time.perf_counter_ns(), run.number, step, worker, since=since, steps=steps))

    def _answered(self, what: What, sent: Sent, station: Station, message: Prediction | Fault) -> None:
        if isinstance(message, Prediction):
            for place, task in enumerate(sent.tasks if self.timelines else ()):
                # A batch's time is that of its first draft; the others' predictions are there at its end.
                seconds = message.seconds if place == 0 else 0.0
                received, began = (message.received, message.began) if place == 0 else (message.predicted,) * 2
                times = (received, began, message.predicted, message.ended)
                for timeline in self.timelines:
                    now = time.perf_counter_ns()
                    timeline.append(Mark(what, now, message.run, task.index, station.number, seconds, times=times))

    def _watch(self, run: Active) -> Callable[[int, int], None]:
        return lambda step, since: self._mark("callback", run, step, since=since)


def _what(message: Prediction | Fault) -> tuple[int, int, int]:
    return message.run, message.index, message.row


def _owed(sent: Sent) -> tuple[int, int, int]:
    return sent.run.number, sent.tasks[0].index, sent.rows[0]


def _give_back(sent: Sent) -> None:
    """Note that a worker no longer writes to the rows."""
    for row in sent.rows:
        sent.run.writing[row] -= 1
        if not sent.run.writing[row]:
            del sent.run.writing[row]
