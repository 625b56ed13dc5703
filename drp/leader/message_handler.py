"""What workers' messages, completion records and losses mean for the runs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from drp.errors import WorkerError
from drp.leader.runs.event_recorder import EventRecorder
from drp.leader.runs.run_state import InFlightBatch, PendingCompletion, RunState
from drp.leader.runs.run_table import RunTable
from drp.leader.scheduling.scheduler import Scheduler
from drp.leader.supervision.supervisor import DRAFT_RETRY_COST, Supervisor, WorkerLoss, WorkerSlot
from drp.leader.supervision.worker import Received
from drp.protocol.messages import Bound, EvaluationError, Prediction, ToLeader
from drp.protocol.timeline import OK


class MessageHandler:
    """Adds predictions to runs, ends runs whose evaluations failed, and reassigns the drafts of lost workers."""

    def __init__(
        self,
        supervisor: Supervisor[InFlightBatch],
        runs: RunTable,
        scheduler: Scheduler,
        recorder: EventRecorder,
        draft_timeout: float | None,
    ) -> None:
        self._supervisor, self._runs, self._scheduler = supervisor, runs, scheduler
        self._recorder, self._draft_timeout = recorder, draft_timeout

    def on_messages(self, received: Sequence[Received]) -> None:
        """Handle messages, and the exits of workers (None)."""
        for worker, message in received:
            worker_slot = self._supervisor.worker_slots[worker.number]
            if worker_slot.worker is worker:  # It was not lost by what came before.
                self._on_message(worker_slot, message)

    def _on_message(self, worker_slot: WorkerSlot[InFlightBatch], message: ToLeader | None) -> None:
        match message:
            case Prediction() if sent := _find_batch(worker_slot, message):
                self._on_prediction(worker_slot, sent, message)
            case EvaluationError() if sent := _find_batch(worker_slot, message):
                self._on_error(worker_slot, sent, message)
            case Bound(number) if self._runs.on_bound(worker_slot, number):
                return
            case Prediction() | EvaluationError() | Bound():
                self.on_worker_lost(
                    self._supervisor.mark_dead(worker_slot, f"{worker_slot.worker} sent an unexpected {message}")
                )
            case _:
                if loss := self._supervisor.on_message(worker_slot, message):
                    self.on_worker_lost(loss)

    def _done(self, worker_slot: WorkerSlot[InFlightBatch], sent: InFlightBatch) -> None:
        """Remove a batch that a worker has finished from its slot, and reset the slot's retry budget."""
        worker_slot.drafts.remove(sent)
        worker_slot.since = self._supervisor.clock.awake_since
        worker_slot.retry_budget_used, worker_slot.restarts = 0.0, 0
        sent.release_rows()

    def _on_prediction(self, worker_slot: WorkerSlot[InFlightBatch], sent: InFlightBatch, message: Prediction) -> None:
        """Handle the predictions of a batch, or the message that a batch of an asynchronous run is queued."""
        run, since = sent.run, time.perf_counter_ns()
        try:
            if sent.sequence:
                return run.on_queued(worker_slot.number, sent, message.seconds)
            self._done(worker_slot, sent)
            counts = sent.is_outstanding  # Else it is the second of two copies, or the run is over.
            if self._recorder.timelines:
                self._recorder.record_predictions("predicted" if counts else "late", sent, worker_slot.number, message)
            if counts:
                run.on_predictions(worker_slot.number, sent, message.seconds)
                if self._recorder.timelines:
                    self._recorder.record_tasks("accumulated", sent, worker_slot.number, since)
                if run.ready:
                    self._runs.schedule_drafts(run)
        except BaseException as error:
            self._runs.fail(run, error)
        if self._runs.draining:
            self._runs.release_if_idle(run)
        return None

    def _on_error(self, worker_slot: WorkerSlot[InFlightBatch], sent: InFlightBatch, message: EvaluationError) -> None:
        run, index = sent.run, sent.tasks[0].index
        self._done(worker_slot, sent)
        consequence = run.follows_failure(sent)
        needed = sent.is_outstanding or (run.withdraw(sent) and run.number in self._runs.running)
        if needed and not consequence:
            reason = f"{worker_slot.worker} failed evaluating step {index} of run {run.number}: {message.error}"
            self._runs.finish(run, WorkerError(f"{reason}\n{message.traceback}"))
        self._runs.release_if_idle(run)

    def on_completion(self, run: RunState, completion: PendingCompletion, status: int | None) -> None:
        worker_slot, sent = self._supervisor.worker_slots[completion.worker], completion.batch
        if status is None:
            reason = f"{worker_slot.worker} answered step {sent.tasks[0].index} of run {run.number}"
            self.on_worker_lost(self._supervisor.mark_dead(worker_slot, f"{reason} without a valid completion record"))
            return
        self._done(worker_slot, sent)
        if self._recorder.timelines:
            self._recorder.record_completion("predicted" if completion.counts else "late", completion)
        if status != OK and completion.counts and run.number in self._runs.running:
            step = f"step {completion.failed_index(status)} of run {run.number}"
            reason = f"{worker_slot.worker} failed evaluating {step}: the denoiser returned NaN or infinity"
            self._runs.finish(run, WorkerError(reason))
        self._runs.release_if_idle(run)

    def next_deadline(self) -> float:
        """Return the time of the next deadline, on the leader's clock."""
        times = [self._supervisor.next_deadline]
        if self._scheduler.policy.hedge:
            times += self._scheduler.hedge_deadlines()
        times += [self._deadline_of(worker_slot) for worker_slot in self._supervisor.ready if worker_slot.drafts]
        for run in self._runs.all_runs:
            if (interval := run.poll_interval) < math.inf:
                times.append(self._supervisor.clock.now() + interval)
        return min(times)

    def _deadline_of(self, worker_slot: WorkerSlot[InFlightBatch]) -> float:
        """Return when the first draft of a busy worker slot times out and its worker counts as lost."""
        first = worker_slot.drafts[0]
        return first.run.deadline(worker_slot.number, first.sequence, worker_slot.since, self._draft_timeout)

    def drop_late_workers(self) -> None:
        """Give up the workers whose first draft has timed out."""
        now = self._supervisor.clock.now()
        for worker_slot in self._supervisor.ready:
            if worker_slot.drafts and self._deadline_of(worker_slot) <= now:
                run, task = worker_slot.drafts[0].run, worker_slot.drafts[0].tasks[0]
                timeout = self._draft_timeout or run.timeout(worker_slot.number)
                why = (
                    f"{worker_slot.worker} has not evaluated step {task.index} of run {run.number} within "
                    f"{timeout:g} s (draft_timeout)"
                )
                self.on_worker_lost(self._supervisor.mark_dead(worker_slot, why))

    def on_worker_lost(self, loss: WorkerLoss[InFlightBatch]) -> None:
        """Reassign a lost worker's drafts to other workers. The drafts and so the predictions are unchanged."""
        number = loss.worker_slot.number
        affected = self._runs.on_worker_lost(loss)
        for place, sent in reversed([*enumerate(loss.drafts)]):
            run, task = sent.run, sent.tasks[0]
            sent.release_rows()
            self._recorder.record_tasks("lost", sent, number)
            missing = sent.is_outstanding and not self._scheduler.copies_of(sent)
            if missing:
                run.waiting.appendleft(sent.tasks)
            if missing or (sent.completion_pending and run in affected):
                run.retry_budget_used[task.index] += DRAFT_RETRY_COST[loss.cause] if place == 0 else 0.0
                if run.retry_budget_used[task.index] > 1 - 1e-9 and run.number in self._runs.running:
                    reason = f"step {task.index} of run {run.number} was given up, after every worker that evaluated it"
                    self._runs.finish(run, WorkerError(f"{reason} was lost; the last: {loss.reason}"))
        for behind in affected:
            if behind.number in self._runs.running:
                try:
                    step = behind.restart()
                except BaseException as error:
                    self._runs.fail(behind, error)
                else:
                    reason = f"run {behind.number} went back to step {step}: predictions that it had used were lost"
                    behind.incidents.append(reason)
                    self._runs.schedule_drafts(behind)
        self._runs.release_idle()
        self._scheduler.flush()  # Messages that were held back because of the lost worker.


def _find_batch(worker_slot: WorkerSlot[InFlightBatch], message: Prediction | EvaluationError) -> InFlightBatch | None:
    """Return the batch that a message answers, None if it answers none.

    A prediction, or the message that a batch is queued, answers the first batch without a pending completion. An error
    may also answer a batch whose completion is pending.
    """
    for sent in worker_slot.drafts:
        if (message.run, message.index, message.row) == (sent.run.number, sent.tasks[0].index, sent.rows[0]):
            return None if sent.completion_pending and isinstance(message, Prediction) else sent
        if not sent.completion_pending:
            return None
    return None
