"""Engine: the leader's thread. It alone uses the socket, and it carries all runs forward. One role, one loop.

What other threads ask is in the inbox, the runs it has are those carried, dispatch gives out their drafts, and what
happens goes to the marks.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future

import torch

from drp.errors import WorkerError
from drp.leader.active import Active, ActiveRun, Pending, Sent
from drp.leader.ahead import AheadRun, Answer
from drp.leader.awake import Awake
from drp.leader.carried import Carried, give_back
from drp.leader.clock import Clock
from drp.leader.devices import Device
from drp.leader.dispatch import Dispatch
from drp.leader.ground import GpuOptions, Ground
from drp.leader.inbox import Asked, Inbox
from drp.leader.marks import Marks
from drp.leader.pool import GRACE, Pool
from drp.leader.request import Job, Request
from drp.leader.session import Session
from drp.leader.sharing import ByLoad, Sharing
from drp.leader.staff import MOST_DRAFT, Loss, Staff, Station
from drp.protocol.arena import Arena
from drp.protocol.messages import Bound, Fault, ModelSpec, Prediction, ToLeader
from drp.protocol.order import FINE
from drp.protocol.waiting import be_punctual

HEAD_START = 0.0005
"""Seconds that workers have to pick up their drafts before the leader refines: it may be using one of their cores."""

SOON, SPIN = 100e-6, 2e-3
"""Seconds that the thread stays awake on the core of a worker that is done: before it does anything else there, since
others may be done soon, and at most."""

ROOM = 4
"""Runs at once, for each worker: enough to keep it busy. Others wait, and take no memory meanwhile."""

LOOK = 0.001
"""Seconds between two looks at stamps."""

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
        self.marks, self._clock = Marks(), Clock()
        self.overlap = True
        self._batch, self._draft_timeout = batch, draft_timeout
        self._devices = tuple(device.name for device in devices)
        self._numbers = itertools.count()
        self._due = math.inf  # when lanes go on
        self._begins = 0  # of rounds, when drafts were given last
        self._started: Future[ModelSpec] = Future()
        self._alone = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="drp-leader", daemon=True)
        torch_threads = torch.get_num_threads()
        with contextlib.ExitStack() as undo:
            self._inbox = Inbox()
            undo.callback(self._inbox.end)
            self._ground = Ground(devices, gpu, batch)
            undo.callback(self._ground.close)
            self._pool = Pool(model, threads, python)
            undo.callback(self._pool.close)
            self._staff = Staff(self._pool, model, devices, start_timeout, self._ground, self._clock)
            self._carried = Carried(self._staff, self.marks, awake, self._devices)
            self._dispatch = Dispatch(self._staff, self._carried, self.marks, sharing or ByLoad(), hedge)
            self._pool.watch(self._inbox.wakeup)
            if self._ground.bell is not None:
                self._pool.watch(self._ground.bell.fd)
            self._thread.start()
            undo.pop_all()  # From now on all of it is the thread's, and closed there.
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
        pending = Pending(self._inbox.wake)
        pending.set_running_or_notify_cancel()
        self._inbox.put((job, request, pending))
        return pending

    def open(self, make_arena: Callable[[int, int], Arena]) -> Session:
        """Begin a session; `make_arena` is given its number, and how many rows beyond those that it reads it needs."""
        session = Session(*self._numbered(make_arena), self._inbox.poke, self._batch)
        try:
            self._inbox.put(session)
        except BaseException:
            session.arena.close()
            raise
        return session

    def follow(self, sharing: Sharing, hedge: float | None, depth: int) -> None:
        """Share, hedge, and give so many drafts in advance from now on; only while no run is under way."""
        self._dispatch.follow(sharing, hedge, depth)

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is a callback."""
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        """Whether it takes no more runs."""
        return self._inbox.closing is not None

    def close(self, grace: float = GRACE) -> None:
        """Cancel all runs and end the workers, by force after `grace` seconds; wait until that is done."""
        if self._inbox.is_anothers:
            return  # A forked child has no such thread, and the workers are its parent's.
        self._inbox.close(grace)
        if not self.is_this_thread:
            self._thread.join(grace + 10.0)

    def _numbered(self, make_arena: Callable[[int, int], Arena]) -> tuple[int, Arena]:
        number = next(self._numbers) % 2**31
        return number, make_arena(number, self._spare)

    @property
    def _spare(self) -> int:
        return self._dispatch.depth * len(self._devices) * self._batch

    # The loop.

    def _serve(self) -> None:
        error: WorkerError | None = None
        # Sums of rows are too small to share out, and the threads that would share them spin on the workers' cores.
        torch.get_num_threads()  # At its first call a thread takes the common number: not after the next line.
        torch.set_num_threads(1)
        self._alone.set()
        be_punctual()
        try:
            self._start()
            while self._inbox.closing is None:
                self._admit()
                self._go()
                if not self._carried.at_work:
                    self._look()
                    lent = self._carried.lent
                    for _ in self._give():  # before anything else: the workers are waiting
                        self._go()
                        if lent and self._carried.at_work:
                            break  # It may be a worker's core that this thread is on, and there will be time.
                    self._refine()  # the states behind, while they compute
                    self._carried.bind_others()
                    self._go()
                    if self._carried.begins != self._begins and not (lent or self._carried.at_work):
                        continue  # A round has begun meanwhile, so that more can be given.
                self._take()
        except WorkerError as lost:
            error = WorkerError(*lost.args)  # without its traceback, whose frames hold the runs' memory
        except BaseException as bug:
            log.exception("the leader's thread failed")
            error = WorkerError(f"the leader's thread failed, and its workers were ended: {bug!r}")
        finally:
            grace = self._inbox.shut(error)
            with contextlib.ExitStack() as end:  # Each is called even if another raises, the last one first.
                end.callback(self._tell_starter, error)
                end.callback(self._inbox.end)
                end.callback(self._ground.close)
                end.callback(self._staff.close, grace)
                end.callback(self._carried.close)
                end.callback(self._end_all, error)

    def _tell_starter(self, error: WorkerError | None) -> None:
        if not self._started.done():
            self._started.set_exception(error or RuntimeError("this leader was closed while it started"))

    def _start(self) -> None:
        """Bring all workers up; until then, whatever goes wrong with one is an error."""
        self._ground.enter()
        for station in self._staff.stations:
            self._staff.start(station)
        while self._inbox.closing is None and len(self._staff.ready) < len(self._staff.stations):
            timer = self._clock.to_monotonic(self._staff.next_time)
            got = self._pool.poll(timer, self._inbox.wakeup)
            self._clock.resume(timer)
            losses = self._staff.tend()
            if got is not None and not losses:
                loss = self._staff.take(self._staff.station_of(got[0]), got[1])
                losses = [loss] if loss else []
            for loss in losses:
                raise WorkerError(loss.why)
        if self._inbox.closing is None:
            self._started.set_result(self._staff.crew.facts.spec)

    def _admit(self) -> None:
        """Begin runs that were submitted, as many as there is room for, and end those that are unwanted."""
        asked, under_way = self._inbox.new, self._carried.under_way
        for what in list(asked):
            if not isinstance(what, Session) and what[2].unwanted and not what[2].done():
                what[2].set_exception(CancelledError())
        while asked and len(under_way) < ROOM * len(self._devices):
            run = self._begin(asked.popleft())
            if run is not None:
                self.marks.add("begin", run)
                run.watch = self.marks.watch(run)
                self._carried.begin(run)
                self._form(run)
        while self._inbox.poked:
            session = self._inbox.poked.popleft()
            if session.number in under_way and session.idle:
                self._form(session)
        for run in [run for run in under_way.values() if run.unwanted]:
            if isinstance(run, Session):
                self.marks.add("end", run)
                self._carried.end(run, None)
            else:
                self._carried.end(run, CancelledError())

    def _begin(self, what: Asked) -> Active | None:
        with contextlib.suppress(OSError):  # It may not be moved, as where its cores were taken away meanwhile.
            self._ground.make_room(alone=not (self._carried.under_way or self._carried.leaving))
        if isinstance(what, Session):
            return what
        job, request, pending = what
        if pending.done():  # cancelled while it waited
            return None
        try:
            number, ground = next(self._numbers) % 2**31, self._ground
            run: ActiveRun
            if ground.ahead:
                places = len(self._devices)
                run = AheadRun(number, job, request, pending, self._spare, self._batch, ground, places, self._clock)
            else:
                run = ActiveRun(number, job, request, pending, self._spare, self._batch, ground.make)
            if ground.nvtx:
                run.name_ranges()
            return run
        except BaseException as error:  # no memory, or a mode of somebody's own: the caller's to hear
            pending.set_exception(error)
            return None

    def _form(self, run: Active) -> None:
        """Form a run's next drafts, or end it."""
        since, cuts, formed = time.perf_counter_ns(), len(run.cuts), len(run.waiting)
        with self._carried.charge(run):
            if run.behind and not self.overlap:
                run.refine()
            more = run.form()
            if not self.overlap or more is False:
                run.refine()
            if more is not None and self.marks.timelines:
                for cut in run.cuts[cuts:]:
                    self.marks.add("cut", run, cut)
                steps = tuple(task.index for batch in itertools.islice(run.waiting, formed, None) for task in batch)
                self.marks.add("formed" if more else "end", run, since=since, steps=steps)
            if more is False:
                self._carried.end(run, None)

    def _give(self) -> Iterator[None]:
        """Give drafts to workers, and form those that can be formed without hearing of them; in small steps."""
        try:
            while True:
                self._begins = self._carried.begins
                self._dispatch.dispatch()
                if not self._carried.ready:
                    return
                yield
                self._refine()  # A round's states are seen to before the next is formed.
                for run in self._carried.ready:
                    self._form(run)
                yield
                self._refine()  # What is known is added before anything that waits for what these drafts predict.
                yield
        finally:
            self._dispatch.deliver()

    def _refine(self) -> None:
        behind = [run for run in self._carried.under_way.values() if run.behind]
        if self.overlap and not all(isinstance(run, AheadRun) for run in behind):
            self._pool.wait(HEAD_START)
        for run in behind:
            since = time.perf_counter_ns()
            with self._carried.charge(run):
                run.refine()
                self.marks.add("refined", run, run.steps_done, since=since)

    def _take(self) -> None:
        """Wait for an answer, and take what has come until a worker can be given more."""
        self._clock.resume()
        timer = self._clock.to_monotonic(self._next_time())
        ahead, others = self._follow(timer)
        got = self._pool.poll(0.0 if ahead else timer, self._inbox.wakeup) if others else None
        self._clock.resume(timer)
        while got is not None:
            self._on(self._staff.station_of(got[0]), got[1])
            waiting = self._carried.ready or any(run.waiting for run in self._carried.under_way.values())
            if waiting or self._due <= time.monotonic():
                break
            got = self._pool.receive_now()
        if time.monotonic() >= timer:
            self._on_time()

    def _follow(self, timer: float) -> tuple[bool, bool]:
        """Sleep and work for runs ahead of their devices, and look at nothing else while there is nothing else to do.

        Return whether there was such a run, and whether there may be anything else to be taken. In between, workers may
        want the core that this thread is on.
        """
        bell = self._ground.bell
        if bell is None or self._due == math.inf:
            return False, True
        ready: set[int] = set()
        while ready <= {bell.fd} and self._due < math.inf and time.monotonic() < timer:
            if (run := self._carried.only) is not None and run.stream.has_core:
                self._use_core(run)
            else:
                ready = self._pool.sleep(min(timer, self._due))
                self._clock.resume(min(timer, self._due))
                self._go()
            if not self._carried.at_work:
                break
        return True, not ready <= {bell.fd}

    def _use_core(self, run: AheadRun) -> None:
        """Do what there is to be done on the core of a worker that is done, as long as others are not."""
        if run.is_low or not run.stream.spin(SOON):
            self._look()
            for _ in self._give() if not run.wants_states else ():
                self._go()
                if not run.stream.has_core:
                    return
            if not run.stream.spin(SPIN):
                run.stream.leave_core()
        self._go()

    def _next_time(self) -> float:
        """Return when something is due."""
        busy = [station for station in self._staff.ready if station.drafts]
        times = [self._deadline(station) for station in busy]
        if self._ground.ahead and self._ground.on_gpu and any(run.looking for run in self._carried.ahead):
            times.append(self._clock.now() + LOOK)
        return min([*times, *self._dispatch.late_times(busy), self._staff.next_time])

    def _deadline(self, station: Station) -> float:
        """Return when a busy station's first draft is given up, and the worker with it."""
        first = station.drafts[0]
        return first.run.due(first.sequence, station.since) + self._patience(station)

    def _patience(self, station: Station) -> float:
        return self._draft_timeout or station.drafts[0].run.patience(station.number)

    def _on_time(self) -> None:
        while (got := self._pool.receive_now()) is not None:  # What has come is not late.
            self._on(self._staff.station_of(got[0]), got[1])
        self._look()  # It may be a while since.
        for loss in self._staff.tend():
            self._on_loss(loss)
        now = self._clock.now()
        for station in self._staff.ready:
            if station.drafts and self._deadline(station) <= now:
                run, task = station.drafts[0].run, station.drafts[0].tasks[0]
                self._on_loss(
                    self._staff.lose(
                        station,
                        f"{station.worker} has not evaluated step {task.index} of run {run.number} within "
                        f"{self._patience(station):g} s (draft_timeout)",
                    )
                )

    def _on(self, station: Station, message: ToLeader | None) -> None:
        """Take a message, or the end of a worker."""
        match message:
            case Prediction() if (sent := _owed(station, message)) and isinstance(sent.run, AheadRun):
                self._on_ahead(station, sent.run, sent)
            case Prediction() | Fault() if sent := _owed(station, message):
                self._done(station, sent)
                self._on_answer(station, sent, message)
            case Bound(number) if self._carried.on_bound(station, number):
                return
            case Prediction() | Fault() | Bound():
                self._on_loss(self._staff.lose(station, f"{station.worker} sent {message}, which it does not owe"))
            case _:
                if loss := self._staff.take(station, message):
                    self._on_loss(loss)

    def _done(self, station: Station, sent: Sent) -> None:
        """Note that a worker has done with a draft."""
        station.drafts.remove(sent)
        station.since, station.used_up = self._clock.now(), 0.0
        give_back(sent)

    def _on_answer(self, station: Station, sent: Sent, message: Prediction | Fault) -> None:
        run, index, since = sent.run, sent.tasks[0].index, time.perf_counter_ns()
        # It may be the second of two copies, or its run over.
        counts = self._carried.is_missing(sent) or (run.withdraw(sent) and run.number in self._carried.under_way)
        self.marks.answered("answer" if counts else "late", sent, station.number, message)
        if counts and isinstance(message, Fault):
            words = f"{station.worker} failed evaluating step {index} of run {run.number}: {message.error}"
            self._carried.end(run, WorkerError(f"{words}\n{message.traceback}"))
        elif counts and isinstance(message, Prediction):
            with self._carried.charge(run):
                run.answer(station.number, sent.tasks, sent.rows, message.seconds)
                for task in sent.tasks:
                    self.marks.add("folded", run, task.index, station.number, since=since)
                if run.ready:
                    self._form(run)
        self._carried.let_go(run)

    def _on_ahead(self, station: Station, run: AheadRun, sent: Sent) -> None:
        """Take an answer whose prediction is to come; the draft stays the worker's until it is stamped."""
        with self._carried.charge(run):
            run.answered(station.number, sent, self._carried.is_missing(sent))

    def _go(self) -> None:
        """Work off what is due of the arithmetic of runs ahead of their devices, where this thread computes."""
        self._due = math.inf
        if self._ground.bell is not None:
            self._ground.bell.quiet()
            alone = self._carried.only is not None
            for run in self._carried.ahead:
                with self._carried.charge(run):
                    due = run.go(alone)
                    if due is None:  # Nothing is waited for.
                        due = 0.0 if run.has_news else math.inf
                    self._due = min(self._due, due)

    def _look(self) -> None:
        """Look at the stamps that were read meanwhile."""
        for run in self._carried.ahead if self._ground.ahead else ():
            for answer, verdict in run.looked():
                self._on_stamp(run, answer, verdict)

    def _on_stamp(self, run: AheadRun, answer: Answer, verdict: int | None) -> None:
        station, sent = self._staff.stations[answer.worker], answer.sent
        if verdict is None:
            words = f"{station.worker} answered step {sent.tasks[0].index} of run {run.number}"
            self._on_loss(self._staff.lose(station, f"{words} and did not stamp it"))
            return
        self._done(station, sent)
        self.marks.stamped("answer" if answer.counts else "late", sent, station.number, answer.seconds, answer.ended)
        if verdict != FINE and answer.counts and run.number in self._carried.under_way:
            step = f"step {answer.named(verdict)} of run {run.number}"
            words = f"{station.worker} failed evaluating {step}: the denoiser returned NaN or infinity"
            self._carried.end(run, WorkerError(words))
        self._carried.let_go(run)

    def _on_loss(self, loss: Loss) -> None:
        """Have a lost worker's drafts evaluated by others: they are what they were, and so will the predictions be."""
        number = loss.station.number
        again = self._carried.on_loss(loss)
        for place, sent in reversed([*enumerate(loss.drafts)]):
            run, task = sent.run, sent.tasks[0]
            give_back(sent)
            for each in sent.tasks:
                self.marks.add("lost", run, each.index, number)
            missing = self._carried.is_missing(sent) and not self._dispatch.copies(sent)
            if missing:
                run.waiting.appendleft(sent.tasks)
            if missing or (sent.answered and run in again):
                run.used_up[task.index] += MOST_DRAFT[loss.fault] if place == 0 else 0.0
                if run.used_up[task.index] > 1 - 1e-9 and run.number in self._carried.under_way:
                    several = (
                        f"step {task.index} of run {run.number} was given up, after every worker that evaluated it"
                    )
                    self._carried.end(run, WorkerError(f"{several} was lost; the last: {loss.why}"))
        for behind in again:
            if behind.number in self._carried.under_way:
                behind.incidents.append(f"run {behind.number} began again: answers that it was built upon were lost")
                with self._carried.charge(behind):
                    behind.replay()
                    self._form(behind)
        self._carried.let_all_go()
        self._dispatch.deliver()  # What was held back for the one that is gone.

    def _end_all(self, error: WorkerError | None) -> None:
        """Tell every caller; each gets an error of its own, since a traceback is added where it is raised."""

        def reason() -> BaseException:
            return WorkerError(*error.args) if error else CancelledError("the leader was closed")

        for run in self._carried.under_way.values():
            run.finish(reason(), self._devices)
        for what in self._inbox.new:
            if isinstance(what, Session):
                what.finish(reason(), self._devices)
                what.arena.close()
            elif not what[2].done():
                what[2].set_exception(reason())
        self._inbox.new.clear()


def _what(message: Prediction | Fault) -> tuple[int, int, int]:
    return message.run, message.index, message.row


def _owed(station: Station, message: Prediction | Fault) -> Sent | None:
    """Return what an answer is to: the first draft that has none, or, if it is a fault, one that is not stamped."""
    for sent in station.drafts:
        if _what(message) == (sent.run.number, sent.tasks[0].index, sent.rows[0]):
            return None if sent.answered and isinstance(message, Prediction) else sent
        if not sent.answered:
            return None
    return None
