"""The engine: the leader's thread, which executes all runs. No other thread uses the socket to the workers.

Other threads submit runs and sessions to the request queue. Each iteration of the loop does the following:

    _admit            start queued runs up to the limit, end cancelled ones
    _poll_completions check the completion records of asynchronous runs
    _assign           send waiting drafts to workers, and schedule the drafts that need no further message
    refine_all        compute the final states of the last rounds, call callbacks, while the workers compute
    bind_all          have the remaining workers open the memory of new runs
    _run_ready        execute the arithmetic that asynchronous runs queued for this thread, as far as it is ready
    _receive          wait for messages, wake-ups or a deadline, and handle them, until a run `has_work`

The engine's state is held by:

    RequestQueue   new work from other threads, and whether the engine is to close
    RunTable       running and draining runs
    Supervisor     worker slots and their states; see `drp.leader.supervision.supervisor.WorkerSlot`
    Scheduler      which worker evaluates which draft
    EventRecorder  subscribed timelines

`MessageHandler` has no state of its own: it changes theirs as messages arrive and workers are lost.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

import torch

from drp.errors import WorkerError
from drp.leader.clock import Clock
from drp.leader.job import Job
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.message_handler import MessageHandler
from drp.leader.options import LeaderOptions
from drp.leader.request_queue import NewWork, RequestQueue
from drp.leader.runs.event_recorder import EventRecorder
from drp.leader.runs.factory import make_run
from drp.leader.runs.run_state import InFlightBatch, RunState
from drp.leader.runs.run_table import RunTable
from drp.leader.runs.session import EvaluationSession
from drp.leader.runs.submission import RunConfig, RunFuture, Submission
from drp.leader.scheduling.policies import Policy
from drp.leader.scheduling.scheduler import Scheduler
from drp.leader.supervision.supervisor import Supervisor
from drp.leader.supervision.worker_pool import SHUTDOWN_TIMEOUT, WorkerPool
from drp.protocol.arena import Arena
from drp.protocol.memory import Memory
from drp.protocol.messages import ModelSpec
from drp.protocol.transport import DESCRIPTORS, require_descriptors
from drp.protocol.waiting import set_timer_slack
from drp.sampling.run import Callback

RUNS_PER_WORKER = 4
"""Concurrent runs per worker, enough to keep it busy. Further runs stay in the queue and use no memory."""

log = logging.getLogger(__name__)


class Engine:
    """Executes runs, submitted from any thread, on the workers of one pool. It has its own thread.

    The module's docstring says what holds the engine's state. The engine itself has only the numbers of future runs
    (`_numbers`), and when a run's stream has more to execute (`_next_ready_time`).

    Attributes without an underscore may be read by tests and while debugging; only the engine's thread changes them.
    """

    def __init__(self, model: str, options: LeaderOptions) -> None:
        require_descriptors(DESCRIPTORS)
        devices, self._batch = options.worker_devices, options.drafts_per_device
        self.recorder, self._clock = EventRecorder(), Clock()
        self._worker_count = len(devices)
        self._numbers = itertools.count()
        self._next_ready_time = math.inf  # when a run's stream has more to execute
        self._started: Future[ModelSpec] = Future()
        self._thread_ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="drp-leader", daemon=True)
        torch_threads = torch.get_num_threads()
        with contextlib.ExitStack() as undo:
            self._requests = RequestQueue()
            undo.callback(self._requests.close_descriptor)
            self.placement = MemoryPlacement(devices, options.effective_execution, self._batch)
            undo.callback(self.placement.close)
            self.pool = WorkerPool(model, options.threads, options.python, options.remote)
            undo.callback(self.pool.close)
            self.supervisor: Supervisor[InFlightBatch] = Supervisor(
                self.pool, model, devices, options.start_timeout, self.placement, self._clock
            )
            self.runs = RunTable(self.supervisor, self.recorder)
            self._scheduler = Scheduler(self.supervisor, self.runs, self.recorder, options.scheduling_policy)
            self._handler = MessageHandler(
                self.supervisor, self.runs, self._scheduler, self.recorder, options.draft_timeout
            )
            self.pool.watch_wakeup(self._requests.wakeup_fd)
            if self.placement.wakeup is not None:
                self.pool.watch_wakeup(self.placement.wakeup.fd)
            self._thread.start()
            undo.pop_all()  # From here on the thread owns all of these and closes them.
        self._thread_ready.wait()
        torch.set_num_threads(torch_threads)  # The engine's thread keeps its own setting; restore the default.
        try:
            self.spec = self._started.result()
        except BaseException:  # a worker's failure, or an interrupt of this thread
            self.close(grace=0.0)
            raise

    # Called by other threads.

    def submit(self, job: Job, callback: Callback | None) -> RunFuture:
        """Queue a run and return its future.

        Raises RuntimeError if the engine is closed, WorkerError if no worker is left.
        """
        future = RunFuture(self._requests.wake)
        future.set_running_or_notify_cancel()
        self._requests.put(Submission(job, callback, future))
        return future

    def open_session(self, make_arena: Callable[[int, int], Arena]) -> EvaluationSession:
        """Start a session. `make_arena(number, spare_rows)` is called with the session's number and its spare rows.

        Spare rows are those that workers may write to beyond the rows that the session reads.
        """
        number = self._next_number()
        session = EvaluationSession(number, make_arena(number, self._spare_rows), self._requests, self._batch)
        try:
            self._requests.put(session)
        except BaseException:
            session.arena.close()
            raise
        return session

    def set_policy(self, policy: Policy) -> None:
        """Replace the policy. Only valid while no run is running."""
        self._scheduler.policy = policy

    def allocate_for_caller(self, nbytes: int) -> Memory:
        """Return memory for a session; see `MemoryPlacement.allocate_for_caller`."""
        return self.placement.allocate_for_caller(nbytes)

    @property
    def shares_gpu_memory(self) -> bool:
        """Whether processes can share memory of a GPU."""
        return self.placement.shares_gpu_memory

    @property
    def in_engine_thread(self) -> bool:
        """Whether the calling thread is the engine's thread, that is, whether the caller is a callback."""
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        return self._requests.closing is not None

    def close(self, grace: float = SHUTDOWN_TIMEOUT) -> None:
        """Cancel all runs, end the workers (killing them after `grace` seconds), and wait until they have ended."""
        if self._requests.is_forked_copy:
            return  # A forked child does not have this thread, and the workers belong to its parent.
        self._requests.close(grace)
        if not self.in_engine_thread:
            self._thread.join(grace + 10.0)

    def _next_number(self) -> int:
        """Return the number of a new run or session. Numbers repeat after 2**31."""
        return next(self._numbers) % 2**31

    @property
    def _spare_rows(self) -> int:
        return self._scheduler.policy.depth * self._worker_count * self._batch

    # The loop.

    def _serve(self) -> None:
        error: WorkerError | None = None
        # Sums of rows are too small to parallelize, and torch's idle threads would spin on the workers' cores.
        torch.get_num_threads()  # A thread's first call resets it to the process-wide number: make it before setting.
        torch.set_num_threads(1)
        self._thread_ready.set()
        set_timer_slack()
        try:
            self._start()
            while self._requests.closing is None:
                self._admit()
                self._poll_completions()
                self._assign()  # First, because workers may be idle.
                self.runs.refine_all()  # Final states of the previous round, while the workers compute.
                self.runs.bind_all()
                self._run_ready()
                if any(run.round_begun for run in self.runs.running.values()) and self._has_work:
                    continue  # More drafts can be assigned.
                self._receive()
        except WorkerError as lost:
            error = WorkerError(*lost.args)  # Drop the traceback, whose frames keep the runs' memory alive.
        except BaseException as bug:
            # As text: a log handler may keep the record, and an exception's frames keep the runs' memory alive.
            log.error("the leader's thread failed:\n%s", traceback.format_exc())
            error = WorkerError(f"the leader's thread failed, and its workers were ended: {bug!r}")
        finally:
            grace = self._requests.reject_new(error)
            with contextlib.ExitStack() as end:  # All are called even if one raises, in reverse order.
                end.callback(self._tell_starter, error)
                end.callback(self._requests.close_descriptor)
                end.callback(self.placement.close)
                end.callback(self.supervisor.close, grace)
                end.callback(self.runs.close)
                end.callback(self._finish_all, error)

    def _tell_starter(self, error: WorkerError | None) -> None:
        if not self._started.done():
            self._started.set_exception(error or RuntimeError("this leader was closed while it started"))

    def _start(self) -> None:
        """Start all workers. Any worker failure before all are ready is an error."""
        self.placement.init_device()
        for worker_slot in self.supervisor.worker_slots:
            try:
                self.supervisor.start_worker(worker_slot)
            except (OSError, MemoryError) as error:
                raise WorkerError(f"{worker_slot.device.name}: no process can be started: {error}") from error
        while self._requests.closing is None and len(self.supervisor.ready) < len(self.supervisor.worker_slots):
            timer = self._clock.to_monotonic(self.supervisor.next_deadline)
            received, _ = self.pool.receive(timer)
            self._clock.resume(timer)
            for loss in self.supervisor.check_health():
                raise WorkerError(loss.reason)
            for worker, message in received:
                if failed := self.supervisor.on_message(self.supervisor.worker_slots[worker.number], message):
                    raise WorkerError(failed.reason)
        if self._requests.closing is None:
            self._started.set_result(self.supervisor.startup.loaded_model.spec)

    def _admit(self) -> None:
        """Start queued runs up to the limit, let sessions continue, and end cancelled runs."""
        new, running = self._requests.new, self.runs.running
        for work in list(new):
            if isinstance(work, Submission) and work.future.cancel_requested and not work.future.done():
                work.future.set_exception(CancelledError())
        while new and len(running) < RUNS_PER_WORKER * self._worker_count:
            run = self._begin(new.popleft())
            if run is not None:
                self.recorder.record("begin", run)
                run.callback_recorder = self.recorder.callback_recorder(run)
                self.runs.add(run)
                self.runs.schedule_drafts(run)
        while self._requests.notified:
            session = self._requests.notified.popleft()
            if session.number in running and session.idle:
                self.runs.schedule_drafts(session)
        for run in list(running.values()):
            if not run.cancel_requested:
                continue
            if isinstance(run, EvaluationSession):
                self.recorder.record("end", run)
                self.runs.finish(run, None)
            else:
                self.runs.finish(run, CancelledError())

    def _begin(self, work: NewWork) -> RunState | None:
        if isinstance(work, EvaluationSession):
            return work
        if work.future.done():  # cancelled while it waited
            return None
        try:
            return make_run(work, self._make_run_config())
        except BaseException as error:  # For example no memory, or an error of a user's mode: report it to the caller.
            work.future.set_exception(error)
            return None

    def _make_run_config(self) -> RunConfig:
        return RunConfig(
            number=self._next_number(),
            dispatch="async" if self.placement.allows_async and self._scheduler.policy.hedge is None else "sync",
            workers=self._worker_count,
            batch=self._batch,
            spare_rows=self._spare_rows,
            placement=self.placement,
            clock=self._clock,
        )

    def _assign(self) -> None:
        """Send drafts to workers and schedule the drafts that do not depend on further messages."""
        if len(self.runs.running) > 1:
            self._schedule_ahead()  # A worker that has just become idle evaluates the oldest run's next round.
        self._scheduler.assign_drafts()
        while self._schedule_ahead():
            self._scheduler.assign_drafts()
        self._scheduler.flush()

    def _schedule_ahead(self) -> bool:
        """Schedule a round of each run that schedules ahead and is ready; return whether there was any.

        While several runs need workers, a run waits until its last round is about to end: a worker that was sent a
        draft of the next round would wait for it, and could evaluate another run's draft meanwhile. Arithmetic that
        becomes ready in the meantime is executed between small steps.
        """
        runs = [run for run in self.runs.running.values() if run.schedules_ahead and run.ready]
        if len(self.runs.running) > 1 and len(self.runs.active()) > 1:
            runs = [run for run in runs if run.round_ending]
        if not runs:
            return False
        self._run_ready(notify=False)
        self.runs.refine_all()  # Refine a round's states before scheduling the next round.
        for run in runs:
            if run.number in self.runs.running:
                self.runs.schedule_drafts(run)
        self._run_ready(notify=False)
        self.runs.refine_all()  # Queue known sums before operations that wait for the predictions of these drafts.
        return True

    def _receive(self) -> None:
        """Wait for messages and handle them, until a run has work, another thread wakes this one, or a deadline passes.

        What becomes ready on the runs' streams in the meantime is executed. Sleeping between such steps leaves this
        thread's core to the workers. Deadlines that come up meanwhile are later than the first, except those of workers
        that were lost.
        """
        self._clock.resume()
        timer, ready = self._clock.to_monotonic(self._handler.next_deadline()), self.supervisor.ready
        # When a run ends, a queued one may begin; when a worker becomes idle, late drafts may be sent to it as well.
        once = self._requests.new or self._scheduler.policy.hedge
        while True:
            until = min(timer, self._next_ready_time)
            received, wakeups = self.pool.receive(until)
            self._clock.resume(until)
            self._handler.on_messages(received)
            if self._next_ready_time < math.inf:
                self._run_ready()
            if time.monotonic() >= timer:
                return self._on_deadline()
            if once or self._has_work or self._requests.wakeup_fd in wakeups or self.supervisor.ready is not ready:
                return None

    @property
    def _has_work(self) -> bool:
        return any(run.has_work for run in self.runs.all_runs)

    def _on_deadline(self) -> None:
        while received := self.pool.receive(0.0)[0]:  # A message that has arrived is not late.
            self._handler.on_messages(received)
        self._run_ready()
        self._poll_completions()  # The last check may be some time ago.
        for loss in self.supervisor.check_health():
            self._handler.on_worker_lost(loss)
        self._handler.drop_late_workers()

    def _run_ready(self, notify: bool = True) -> None:
        """Execute the operations that runs have queued for this thread, as far as they are ready.

        With `notify`, workers wake this thread at the next completion. Not needed if this is called again first.
        """
        self._next_ready_time = math.inf
        for run in self.runs.all_runs:
            try:
                self._next_ready_time = min(self._next_ready_time, run.run_ready(notify))
            except BaseException as error:
                self.runs.fail(run, error)

    def _poll_completions(self) -> None:
        """Handle the completion records that have been read since the last call."""
        for run in self.runs.all_runs:
            for completion, status in run.poll_completions():
                self._handler.on_completion(run, completion, status)

    def _finish_all(self, error: WorkerError | None) -> None:
        """Resolve all futures with an error. Each gets its own instance, since raising one adds a traceback to it."""

        def reason() -> BaseException:
            return WorkerError(*error.args) if error else CancelledError("the leader was closed")

        for run in self.runs.running.values():
            run.finish(reason(), self.supervisor.device_names)
        for work in self._requests.new:
            if isinstance(work, EvaluationSession):
                work.finish(reason(), self.supervisor.device_names)
                work.arena.close()
            elif not work.future.done():
                work.future.set_exception(reason())
        self._requests.new.clear()
