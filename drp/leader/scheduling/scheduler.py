"""The scheduler: assigns drafts to workers, limits how many each has queued, and hedges late drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from drp.leader.runs.event_recorder import EventRecorder
from drp.leader.runs.run_state import InFlightBatch, RunState
from drp.leader.runs.run_table import RunTable
from drp.leader.scheduling.policies import Policy, has_waiting
from drp.leader.supervision.supervisor import Supervisor, WorkerSlot
from drp.protocol.messages import BatchedDraft, Draft
from drp.protocol.waiting import sched_yield
from drp.sampling.run import Task


class Scheduler:
    """Assigns the waiting drafts of running runs to ready workers, by a policy.

    policy: the policy. It may be replaced while no run is running.
    """

    def __init__(
        self, supervisor: Supervisor[InFlightBatch], runs: RunTable, recorder: EventRecorder, policy: Policy
    ) -> None:
        self._supervisor, self._runs, self._recorder, self.policy = supervisor, runs, recorder, policy

    def assign_drafts(self) -> None:
        """Assign waiting batches to workers: one each, or, if there is only one run, up to the policy's depth each.

        A single asynchronous run assigns its batches itself, to the workers that the policy lets it use; see
        `RunState.place_drafts`. What is assigned to busy workers, or of several runs, is sent by `flush`.
        """
        for run in self._runs.running.values():
            run.round_begun = False
        runs, ready = self._runs.active(), self._supervisor.ready
        if len(runs) == 1 and runs[0].schedules_ahead:
            if runs[0].outstanding:
                self._place_drafts(runs, ready)
        elif runs:
            self._assign_in_turn(runs, ready)
            if self.policy.hedge:
                self._hedge_late_drafts(ready)

    def _assign_in_turn(self, runs: Sequence[RunState], ready: Sequence[WorkerSlot[InFlightBatch]]) -> None:
        """Assign waiting batches to workers in turn, until no more fit or the policy chooses none."""
        for depth in range(1, 1 + (self.policy.depth if len(runs) == 1 else 1)):
            for place, worker_slot in enumerate(ready):
                while len(worker_slot.drafts) < depth:
                    run = self._choose(place, len(ready), runs) if any(map(has_waiting, runs)) else None
                    if run is None:
                        return
                    self._assign(worker_slot, run, run.waiting.popleft())

    def _choose(self, place: int, workers: int, runs: Sequence[RunState]) -> RunState | None:
        """Return the run that the policy chooses. If a user's policy fails, the runs that it could choose from end."""
        try:
            run = self.policy.choose(place, workers, runs)
            if run is not None and not run.waiting:
                raise ValueError(f"{self.policy!r} chose a run that has no draft waiting; choose one that has")
        except BaseException as error:
            for each in runs:
                own = RuntimeError(f"the policy chose no run for worker {place}: {error!r}")
                own.__cause__ = error
                self._runs.fail(each, own)
            return None
        return run

    def flush(self) -> None:
        """Send all enqueued messages, except while they are held back for a worker that opens a run's memory."""
        runs = self._runs.all_runs
        if len(runs) != 1 or not _waits_for_bind(runs[0]):
            self._supervisor.flush(self._supervisor.ready)

    def _place_drafts(self, runs: Sequence[RunState], ready: Sequence[WorkerSlot[InFlightBatch]]) -> None:
        """Assign the only run's batches to the workers that the run chooses among those that the policy lets it use.

        Idle workers are sent their batches at once; busy workers receive them with the next flush.
        """
        (run,) = runs
        if run.waiting:
            ready = [slot for place, slot in enumerate(ready) if self._choose(place, len(ready), runs) is run]
        idle = [worker_slot for worker_slot in ready if not worker_slot.drafts]
        for place, tasks in run.place_drafts([worker_slot.drafts for worker_slot in ready], self.policy.depth):
            self._assign(ready[place], run, tasks)
        waits = _waits_for_bind(run)
        if len(idle) == len(ready) or not waits:
            self._supervisor.flush(idle)
        if waits:
            sched_yield()  # The thread that sends the message to the first worker may need this thread's core.

    def _assign(self, worker_slot: WorkerSlot[InFlightBatch], run: RunState, tasks: tuple[Task, ...]) -> None:
        """Enqueue a batch for a worker; an exception ends the run."""
        since = time.perf_counter_ns()
        try:
            sent = run.begin_batch(tasks)
            draft = _to_message(sent)
            try:
                if worker_slot.number in run.bound_workers:
                    self._supervisor.enqueue(worker_slot, draft)
                else:
                    self._runs.bind(worker_slot, run, draft)
            except BaseException:  # The message cannot be encoded, for example because of a user's timestep.
                sent.release_rows()
                raise
            if self._recorder.timelines:
                self._recorder.record_tasks("sent", sent, worker_slot.number, since)
            if not worker_slot.drafts:
                worker_slot.since = self._supervisor.clock.now()
            worker_slot.drafts.append(sent)
            if sent.sequence:
                run.on_dispatched(worker_slot.number, sent)
        except BaseException as error:
            self._runs.fail(run, error)

    # Late drafts.

    def _hedge_late_drafts(self, ready: Sequence[WorkerSlot[InFlightBatch]]) -> None:
        """Send late drafts to idle workers as well; the first prediction to arrive is used."""
        idle = [worker_slot for worker_slot in ready if not worker_slot.drafts]
        for worker_slot in ready if idle else ():
            if worker_slot.drafts and self._supervisor.clock.now() >= self._late_at(worker_slot):
                for sent in list(worker_slot.drafts):
                    if idle and sent.is_outstanding and len(self.copies_of(sent)) == 1:
                        self._recorder.record_tasks("hedged", sent, worker_slot.number)
                        self._assign(idle.pop(), sent.run, sent.tasks)

    def _late_at(self, worker_slot: WorkerSlot[InFlightBatch]) -> float:
        """Return when the first draft of a busy worker slot is late enough to be hedged; infinity if never."""
        usual = worker_slot.drafts[0].run.median_latency
        hedge = self.policy.hedge
        return worker_slot.since + hedge * usual if hedge and usual else float("inf")

    def hedge_deadlines(self) -> Iterator[float]:
        """Yield the times at which drafts of busy worker slots are to be hedged, if a worker is idle."""
        ready = self._supervisor.ready
        if not all(worker_slot.drafts for worker_slot in ready):
            for worker_slot in ready:
                if any(len(self.copies_of(sent)) == 1 for sent in worker_slot.drafts):
                    yield self._late_at(worker_slot)

    def copies_of(self, sent: InFlightBatch) -> list[InFlightBatch]:
        """Return the copies of a batch that ready workers have, including itself."""
        return [
            other for worker_slot in self._supervisor.ready for other in worker_slot.drafts if other.tasks is sent.tasks
        ]


def _waits_for_bind(run: RunState) -> bool:
    """Whether messages to other workers are held back: a worker opens the memory, and its device is idle."""
    return run.binds_with_drafts and bool(run.bind_pending)


def _to_message(sent: InFlightBatch) -> Draft:
    first, row = sent.tasks[0], sent.rows[0]
    also = tuple(map(_to_batched_draft, sent.tasks[1:], sent.rows[1:]))
    return Draft(sent.run.number, first.index, first.timestep, first.slot, row, sent.sequence, sent.after, also)


def _to_batched_draft(task: Task, row: int) -> BatchedDraft:
    return BatchedDraft(task.index, task.timestep, task.slot, row)
