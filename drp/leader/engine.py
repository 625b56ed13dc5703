"""Engine: the leader's thread. It alone uses the socket, and it carries all runs forward. One role, one loop."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import CancelledError

import torch

from drp.leader.active import Active, Pending
from drp.leader.errors import WorkerError
from drp.leader.pool import GRACE, Pool, WorkerProcess
from drp.leader.request import Job, Request
from drp.leader.sharing import ByLoad, Sharing
from drp.leader.timeline import Mark, Timeline, What
from drp.protocol.messages import Bound, Draft, Prediction, ToLeader, Unbind
from drp.sampling.run import Task

IDLE = 3600.0
"""Seconds of the longest wait: only when nothing is due from anyone, and a submission ends it."""

HEAD_START = 0.0005
"""Seconds that workers have to pick up their drafts before the leader refines: it may be using one of their cores."""

ROOM = 4
"""Runs at once, for each worker: enough to keep it busy. Others wait, and take no memory meanwhile."""

log = logging.getLogger(__name__)


class Station:
    """A worker's place in the loop: the drafts it has, and since when it is busy with the first."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.drafts: deque[tuple[Active, Task]] = deque()
        self.since = 0.0


class Engine:
    """Runs submitted from any thread, on the workers of one pool, in a thread of its own."""

    def __init__(self, pool: Pool, draft_timeout: float, sharing: Sharing | None = None) -> None:
        self.timeline: Timeline | None = None
        self.overlap = True
        self._pool = pool
        self._draft_timeout = draft_timeout
        self._sharing = sharing or ByLoad()
        self._stations = [Station(worker) for worker in pool.workers]
        self._devices = tuple(worker.device.name for worker in pool.workers)
        self._inbox: deque[tuple[Job, Request, Pending]] = deque()
        self._runs: dict[int, Active] = {}
        self._leaving: dict[int, Active] = {}
        """Runs that are over, while a worker still has one of their drafts, or has not opened their memory."""
        self._numbers = itertools.count()
        self._closing: float | None = None
        self._lost: WorkerError | None = None
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        pool.watch(self._wakeup)
        self._gate = threading.Lock()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="drp-leader", daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        self._ready.wait()
        torch.set_num_threads(threads)  # A thread keeps its own number; what others start with is as it was.

    # What other threads call.

    def submit(self, job: Job, request: Request) -> Pending:
        """Begin a run at once; raise RuntimeError if the engine was closed, WorkerError if it lost a worker."""
        if os.getpid() != self._pool.owner:
            raise RuntimeError(
                f"this leader is process {self._pool.owner}'s, which this one was forked from; make a new one"
            )
        pending = Pending(self._wake)
        pending.set_running_or_notify_cancel()
        with self._gate:
            if self._lost is not None:
                raise WorkerError(f"this leader is closed; make a new one: {self._lost}")
            if self._closing is not None:
                raise RuntimeError("this leader is closed; make a new one")
            self._inbox.append((job, request, pending))
        self._wake()
        return pending

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
        self._ready.set()
        try:
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
            self._pool.close(grace)
            with self._gate:  # Its number may be another file's at once: nobody may write to it any more.
                os.close(self._wakeup)
                self._wakeup = -1

    def _admit(self) -> None:
        """Begin runs that were submitted, as many as there is room for, and end those that are unwanted."""
        for _, _, pending in list(self._inbox):
            if pending.unwanted and not pending.done():
                pending.set_exception(CancelledError())
        while self._inbox and len(self._runs) < ROOM * len(self._stations):
            job, request, pending = self._inbox.popleft()
            if pending.done():  # cancelled while it waited
                continue
            try:
                run = Active(next(self._numbers) % 2**31, job, request, pending)
            except Exception as error:  # no memory, or a mode of somebody's own: the caller's to hear
                pending.set_exception(error)
                continue
            self._mark("begin", run)
            for station in self._stations:
                self._pool.send(station.worker, run.arena.bind)
                run.unbound.add(station.worker.number)
            self._runs[run.number] = run
            self._form(run)
        for run in [run for run in self._runs.values() if run.pending.unwanted]:
            self._end(run, CancelledError())

    def _form(self, run: Active) -> None:
        """Form a run's next drafts, or end it."""
        try:
            if run.behind and not self.overlap:
                run.refine()
            more = run.form()
            if not self.overlap or not more:
                run.refine()
        except Exception as error:  # a callback's, or a mode's of somebody's own: the run's, not the engine's
            self._end(run, error)
            return
        self._mark("formed" if more else "end", run)
        if not more:
            self._end(run, None)

    def _dispatch(self) -> None:
        """Give waiting drafts to workers: one each, and a second in advance if there is only one run."""
        runs = list(self._runs.values())
        for depth in (1, 2) if len(runs) == 1 else (1,):
            for place, station in enumerate(self._stations):
                while len(station.drafts) < depth:
                    run = self._sharing.choose(place, len(self._stations), runs)
                    if run is None:
                        return
                    self._give(station, run)

    def _give(self, station: Station, run: Active) -> None:
        task = run.waiting.popleft()
        self._pool.send(station.worker, Draft(run.number, task.index, task.timestep, task.slot))
        self._mark("sent", run, task.index, station.worker.number)
        run.due.add((task.index, task.slot))
        if not station.drafts:
            station.since = time.monotonic()
        station.drafts.append((run, task))

    def _refine(self) -> None:
        behind = [run for run in self._runs.values() if run.behind]
        if behind and self.overlap:
            self._pool.wait(HEAD_START)
        for run in behind:
            try:
                run.refine()
                self._mark("refined", run)
            except Exception as error:  # a callback's
                self._end(run, error)

    def _take(self) -> None:
        """Wait for an answer, and take what has come until a worker can be given more."""
        busy = [station for station in self._stations if station.drafts]
        deadline = min((station.since + self._draft_timeout for station in busy), default=time.monotonic() + IDLE)
        got = self._pool.poll(deadline, self._wakeup)
        if got is None and busy and time.monotonic() >= deadline:
            late = next(station for station in busy if station.since + self._draft_timeout <= time.monotonic())
            run, task = late.drafts[0]
            raise WorkerError(
                f"{late.worker} has not evaluated step {task.index} of run {run.number} within "
                f"{self._draft_timeout:g} s (draft_timeout)"
            )
        while got is not None:
            self._on(*got)
            if any(run.waiting for run in self._runs.values()):
                return
            got = self._pool.receive_now()

    def _on(self, worker: WorkerProcess, message: ToLeader) -> None:
        match message:
            case Prediction():
                self._on_prediction(worker, message)
            case Bound(number):
                run = self._runs.get(number) or self._leaving.get(number)
                if run is None or worker.number not in run.unbound:
                    raise WorkerError(f"{worker} sent {message}, which it does not owe")
                run.unbound.remove(worker.number)
                self._let_go(run)
            case _:
                raise WorkerError(f"{worker} sent {type(message).__name__}, which was not due")

    def _on_prediction(self, worker: WorkerProcess, prediction: Prediction) -> None:
        station = self._stations[worker.number]
        run, task = station.drafts[0] if station.drafts else (None, None)
        if run is None or task is None or (run.number, task.index, task.slot) != prediction.what:
            raise WorkerError(f"{worker} sent {prediction}, which it does not owe")
        station.drafts.popleft()
        station.since = time.monotonic()
        self._mark("answer", run, task.index, worker.number, prediction.seconds)
        complete = run.answer(prediction)
        if run.number in self._leaving:
            self._let_go(run)
        elif complete:
            self._form(run)

    # Ends.

    def _end(self, run: Active, error: BaseException | None) -> None:
        """Hand a run's result or error to its caller; let go of its memory once no worker uses it."""
        del self._runs[run.number]
        self._leaving[run.number] = run
        run.waiting.clear()
        if error is None:
            run.pending.set_result(run.result(self._devices))
        else:
            run.pending.set_exception(error)
        self._let_go(run)

    def _let_go(self, run: Active) -> None:
        if run.number in self._leaving and not run.due and not run.unbound:
            del self._leaving[run.number]
            for station in self._stations:
                self._pool.send(station.worker, Unbind(run.number))
            run.arena.close()

    def _end_all(self, error: WorkerError | None) -> None:
        """Tell every caller; each gets an error of its own, since a traceback is added where it is raised."""
        for run in (*self._runs.values(), *self._leaving.values()):
            run.arena.close()
        waiting = [run.pending for run in self._runs.values()] + [p for _, _, p in self._inbox if not p.done()]
        self._runs.clear()
        self._leaving.clear()
        self._inbox.clear()
        self._stations.clear()
        for pending in waiting:
            pending.set_exception(WorkerError(*error.args) if error else CancelledError("the leader was closed"))

    def _mark(self, what: What, run: Active, step: int = 0, worker: int = 0, seconds: float = 0.0) -> None:
        if self.timeline is not None:
            self.timeline.append(Mark(what, time.perf_counter_ns(), run.number, step, worker, seconds))
