"""The table of running and draining runs and sessions, and their bindings to workers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from dataclasses import replace

from drp.leader.runs.event_recorder import EventRecorder
from drp.leader.runs.run_state import InFlightBatch, RunState
from drp.leader.supervision.supervisor import Supervisor, WorkerLoss, WorkerSlot
from drp.protocol.codec import encode
from drp.protocol.memory import MAX_RETAINED_NBYTES
from drp.protocol.messages import Draft, Rebind, Unbind

log = logging.getLogger(__name__)


class RunTable:
    """All runs and sessions that have memory, by number.

        state      table       left when
        running    `running`   the run has its result, an error, or was cancelled (`finish`)
        draining   `draining`  no worker has a draft of the run, or is still to acknowledge its Bind (`release_if_idle`)

    The memory of a run is released when it leaves `draining`.
    """

    def __init__(self, supervisor: Supervisor[InFlightBatch], recorder: EventRecorder) -> None:
        self.running: dict[int, RunState] = {}
        self.draining: dict[int, RunState] = {}
        self.all_runs: tuple[RunState, ...] = ()
        """All running and draining runs, oldest first."""
        self._to_bind: list[RunState] = []
        self._supervisor, self._recorder = supervisor, recorder

    def active(self) -> list[RunState]:
        """Return the running runs, oldest first, except sessions that evaluate nothing."""
        return [run for run in self.running.values() if not run.idle]

    def fail(self, run: RunState, error: BaseException) -> None:
        """End a run by an exception: errors in code and data of its caller must not end the leader."""
        if self.running.get(run.number) is run:
            self.finish(run, error)
        else:
            log.debug("run %d, which is over: %r", run.number, error)

    def add(self, run: RunState) -> None:
        """Add a run. Workers open its memory with their first draft, or in `bind_all`.

        Workers of an asynchronous run have time to open the memory with their first draft, except the first worker: it
        opens the memory now, while the first draft is computed.
        """
        self.running[run.number] = run
        self.all_runs = (*self.all_runs, run)
        if run.binds_with_drafts:
            for worker_slot in self._supervisor.ready[:1]:
                self._try_bind(worker_slot, run)
                self._supervisor.flush([worker_slot])
        else:
            self._to_bind.append(run)

    def schedule_drafts(self, run: RunState) -> None:
        """Schedule a run's next drafts, or finish the run if there are none."""
        since, cuts, scheduled = time.perf_counter_ns(), len(run.cuts), len(run.waiting)
        try:
            more = run.schedule_drafts()
            if more is False:
                run.refine()
            if more is not None and self._recorder.timelines:
                for cut in run.cuts[cuts:]:
                    self._recorder.record("discarded", run, cut)
                steps = tuple(task.index for batch in itertools.islice(run.waiting, scheduled, None) for task in batch)
                self._recorder.record("scheduled" if more else "end", run, since=since, steps=steps)
            if more is False:
                self.finish(run, None)
        except BaseException as error:
            self.fail(run, error)

    def bind(self, worker_slot: WorkerSlot[InFlightBatch], run: RunState, draft: Draft | None = None) -> None:
        """Enqueue a Bind, by which a worker opens a run's memory, and the draft that follows it, or neither.

        With a draft no acknowledgement is needed, which the answer to the draft implies.
        """
        bind, kept = run.bind(worker_slot.number), worker_slot.retained_bind
        if draft is not None:
            encode(draft)  # If this raises, the worker must not be told of the run, whose memory may be closed at once.
            bind = replace(bind, acknowledge=False)
        again = kept is not None and kept.has_same_memory(bind)
        self._supervisor.enqueue(worker_slot, Rebind(run.number, bind.acknowledge) if again else bind)
        worker_slot.binds[run.number] = bind
        run.bound_workers.add(worker_slot.number)
        if again:
            worker_slot.retained_bind = None
        if draft is not None:
            self._supervisor.enqueue(worker_slot, draft)
        else:
            run.bind_pending.add(worker_slot.number)

    def _try_bind(self, worker_slot: WorkerSlot[InFlightBatch], run: RunState) -> None:
        try:
            self.bind(worker_slot, run)
        except BaseException as error:  # For example, a Bind that is too long.
            self.fail(run, error)

    def bind_all(self) -> None:
        """Have all workers open the memory of new runs."""
        while self._to_bind:
            run = self._to_bind.pop()
            for worker_slot in self._supervisor.ready:
                if run.number in self.running and worker_slot.number not in run.bound_workers:
                    self._try_bind(worker_slot, run)
            self._supervisor.flush(self._supervisor.ready)

    def refine_all(self) -> None:
        """Compute the states that finished rounds have made final, and call callbacks."""
        for run in self.all_runs:
            if run.needs_refine and run.number in self.running:
                since = time.perf_counter_ns()
                try:
                    run.refine()
                except BaseException as error:
                    self.fail(run, error)
                else:
                    if self._recorder.timelines:
                        self._recorder.record("refined", run, run.steps_done, since=since)

    def on_bound(self, worker_slot: WorkerSlot[InFlightBatch], number: int) -> bool:
        """Record that a worker has opened a run's memory; return False if no acknowledgement was due."""
        run = self.running.get(number) or self.draining.get(number)
        if run is None or worker_slot.number not in run.bind_pending:
            return False
        run.bind_pending.remove(worker_slot.number)
        self._supervisor.flush(self._supervisor.ready)  # Messages that were held back in the meantime.
        self.release_if_idle(run)
        return True

    def on_worker_lost(self, loss: WorkerLoss[InFlightBatch]) -> list[RunState]:
        """Remove a lost worker from all runs; return the runs that have used predictions which it had not finished."""
        again = [run for run in self.all_runs if run.drop_worker(loss.worker_slot.number, loss.drafts)]
        for run in self.all_runs:
            run.tainted = run.tainted or loss.worker_slot.number in run.bound_workers
            run.bound_workers.discard(loss.worker_slot.number)
            run.bind_pending.discard(loss.worker_slot.number)
            run.served_by.discard(loss.worker_slot.number)
        for run in self.running.values():
            run.incidents.append(loss.reason)
        return again

    def finish(self, run: RunState, error: BaseException | None) -> None:
        """Resolve a run with its result or an error, and release its memory once no worker uses it."""
        del self.running[run.number]
        self.draining[run.number] = run
        run.waiting.clear()
        run.outstanding.clear()
        run.needs_refine = False
        if error is not None:
            self._recorder.record("failed", run)
        try:
            run.cancel_queued()
        finally:
            run.finish(error, self._supervisor.device_names)
        self.release_if_idle(run)

    def release_if_idle(self, run: RunState) -> None:
        """Release the memory of a draining run if no worker uses it any more."""
        if run.number in self.draining and not run.rows_in_flight and not run.bind_pending:
            del self.draining[run.number]
            self.all_runs = (*self.running.values(), *self.draining.values())
            for worker_slot in self._supervisor.ready:
                if (bind := worker_slot.binds.pop(run.number, None)) is not None:
                    keep = (
                        bool(bind.number)
                        and run.arena.memory.nbytes <= MAX_RETAINED_NBYTES
                        and worker_slot.device.gpu is None
                    )
                    worker_slot.retained_bind = bind if keep else worker_slot.retained_bind
                    self._supervisor.enqueue(worker_slot, Unbind(run.number, keep))
            self._supervisor.flush(self._supervisor.ready)
            run.release()

    def release_idle(self) -> None:
        """Release all draining runs whose memory no worker uses any more."""
        for run in list(self.draining.values()):
            self.release_if_idle(run)

    def close(self) -> None:
        """Release all memory; the runs' futures must have been resolved."""
        with contextlib.ExitStack() as rest:
            for run in self.all_runs:
                rest.callback(run.release)
            for worker_slot in self._supervisor.worker_slots:
                worker_slot.drafts.clear()
            self.running.clear()
            self.draining.clear()
            self.all_runs = ()
