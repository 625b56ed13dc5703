"""Asynchronous runs, whose predictions are added before a device has computed them.

A worker on a GPU answers as soon as it has queued a batch; for a worker on cores, a batch counts as queued when it is
sent. The run's arithmetic continues at once: its stream waits for the worker's event, reads the batch's completion
records, and only then reads the predictions. The leader verifies the records when it next polls them. Until then the
batch remains in the worker's slot, with its rows and its deadline, and nothing that depends on it leaves the leader:
no callback is called with such a state, and no samples are returned. If a worker is lost with batches that were added
but not verified, the run returns to the last checkpoint that depends on verified batches only.

    state of a batch  kept in                           changed by
    waiting           `waiting`, `outstanding`          `prepare_dispatch`, when it is sent
    sent              `outstanding`, `_in_flight`       `on_queued`; immediately for workers on cores
    added             `_pending`, `_in_flight`          `poll_completions`, when its completion records were read
    verified          `_evaluated`                      `restart` may discard it if it follows the checkpoint
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from drp.leader.runs.kept_states import KeptStates
from drp.leader.runs.run_checkpoints import RunCheckpoint, RunCheckpoints
from drp.leader.runs.run_events import RunEvents
from drp.leader.runs.run_state import InFlightBatch, PendingCompletion
from drp.leader.runs.submission import RunConfig, Submission
from drp.leader.runs.sync_run import SyncRun
from drp.protocol.messages import Bind
from drp.protocol.timeline import CANCEL_ALL, CANCELLED, PENDING, RAISED
from drp.sampling.result import Result
from drp.sampling.run import Run, Task

COMPLETION_POLL_INTERVAL = 0.001
"""Seconds between two polls of completion records that a GPU writes, which sends no notification."""


class AsyncRun(SyncRun):
    """A run with asynchronous dispatch. It has its own stream, so that no run waits for another run's workers.

    The state, in addition to that of `RunState`:

        stream, _events                       the stream; the events and completion records in the run's memory
        _in_flight, _pending                  batches that workers have; those that were added and are not verified
        _batches_added, _batches_verified     the number of batches in each state so far
        _batch_of, _reserved                  by slot, the batch of its draft, and the row reserved for its prediction
        _rounds_formed, _rounds_refined       the number of rounds scheduled; of them, before the last refinement
        _round_size                           the number of batches of the last scheduled round
        _rounds_begun                         the number of rounds that have begun, whose drafts are written
        _base_depth                           the number of batches that workers should have
        _checkpoints, _kept_states            what is kept until batches are verified: checkpoints and states
        _evaluated, _reported_seconds         the sizes and times of verified batches; the times that GPUs report
        _exhausted                            whether all drafts were scheduled
        _last_recorded, _last_progress        the number of the leader's last event; when a batch was last verified
    """

    binds_with_drafts = schedules_ahead = True

    def __init__(self, submission: Submission, config: RunConfig) -> None:
        job, placement = submission.job, config.placement
        self._clock, self._placement = config.clock, placement
        self.stream = placement.new_stream()
        self._in_flight: dict[int, None] = {}
        """Sequence numbers of the batches that workers have, in the order in which they were sent."""
        self._pending: deque[PendingCompletion] = deque()
        """In the order in which the batches were added, in which their completion records are also read."""
        self._reserved: dict[int, int] = {}
        """By slot, the row reserved for the prediction of the draft in it."""
        self._batch_of: dict[int, tuple[Task, ...]] = {}
        """By slot, the batch to which the draft in it belongs."""
        self._checkpoints = RunCheckpoints()
        self._evaluated: list[tuple[int, float]] = []
        """For each verified batch, in order, the number of evaluations and their time in seconds."""
        self._reported_seconds: list[float] = []
        """Times of batches from workers whose completion records have none: GPUs, which report most of them."""
        self._rounds_formed = self._rounds_refined = self._round_size = 0
        self._batches_added = self._batches_verified = self._last_recorded = 0
        self._exhausted = False
        self._last_progress = self._clock.now()
        self._base_depth = self._rounds_begun = 0
        if placement.on_gpu:
            self.poll_interval = COMPLETION_POLL_INTERVAL
        # All rows of a round are reserved at once.
        config = replace(config, spare_rows=config.spare_rows + job.mode.width)
        slots = job.slots(checkpoints=True)
        extra = RunEvents.nbytes(slots + config.spare_rows, config.workers)
        try:
            with self.stream.current:
                super().__init__(submission, config, placement.allocate_ordered, extra, slots)
        except BaseException:
            self.stream.close()
            raise
        self._events = RunEvents(self.arena, config.workers, placement, self.stream)
        self._kept_states = KeptStates(self.stream, job.start.shape, self._callback is not None or job.watch)

    def _make_run(self) -> Run:
        job = replace(self.job, watch=False)  # Residuals are computed when the states are handed out.
        return job.run(self.arena.drafts, self.arena.predictions, self.stream)

    # Called by the engine, in the order of a draft's states.

    def bind(self, worker: int) -> Bind:
        """Create the worker's event; return the message that describes the run's memory and events to it."""
        return self._events.bind(worker)

    def prepare_dispatch(self) -> tuple[int, int]:
        """Return the sequence number of the batch to be sent, and the number of the leader's last event."""
        sequence = self._placement.next_sequence()
        self._in_flight[sequence] = None
        return sequence, self._last_recorded

    def on_dispatched(self, worker: int, sent: InFlightBatch) -> None:
        """Treat the batch as queued if the worker sends no acknowledgement."""
        if not self._placement.workers_acknowledge:
            self.on_queued(worker, sent, 0.0)

    def _queue_drafts(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        groups = super()._queue_drafts(tasks)
        self._rounds_formed += 1
        self._round_size = len(groups)
        for task in tasks:
            # Reserve the row now: at send time the waits for other drafts of the round may be queued ahead of it.
            self._reserved[task.slot] = super().free_row(task.slot)
        for some in groups:
            for task in some:
                self._batch_of[task.slot] = some
        if self._checkpoints.has_room:
            out = {id(some): some for some in (self._batch_of[slot] for slot in self.outstanding)}
            self._checkpoints.add(RunCheckpoint(self.run.checkpoint(), self._batches_added, tuple(out.values())))
        return groups

    def place_drafts(
        self, queues: Sequence[Sequence[InFlightBatch]], depth: int
    ) -> Iterator[tuple[int, tuple[Task, ...]]]:
        """Yield batches of at most two rounds, each for the worker that would evaluate the fewest batches before it."""
        self._base_depth = min(depth * len(queues), 2 * -(-self.job.mode.width // self._batch))
        return self._place(queues, self._base_depth - sum(map(len, queues)))

    def _place(
        self, queues: Sequence[Sequence[InFlightBatch]], capacity: int
    ) -> Iterator[tuple[int, tuple[Task, ...]]]:
        last: tuple[Task, ...] | None = None
        while self.waiting and (
            capacity > 0 or (last is not None and self._joins_last_batch(self.waiting[0], last, len(queues)))
        ):
            last, capacity = self.waiting.popleft(), capacity - 1
            before = [self._evaluated_before(last, queue) for queue in queues]
            yield before.index(min(before)), last

    def _joins_last_batch(self, tasks: Sequence[Task], last: Sequence[Task], workers: int) -> bool:
        """Whether a batch is sent together with the last one: both are of a round with at most one batch per worker."""
        return last[0].round == tasks[0].round and self.job.mode.width <= workers * self._batch

    def _evaluated_before(self, tasks: Sequence[Task], drafts: Sequence[InFlightBatch]) -> int:
        """Count the batches that a device would evaluate before these drafts.

        If rounds wait for each other, only batches of the same round count, since earlier ones are finished by then.
        """
        count = 0
        for sent in drafts:
            count += self.job.mode.pipelined or sent.run is not self or sent.tasks[0].round == tasks[0].round
        return count

    def free_row(self, slot: int) -> int:
        """Return the row for a draft's prediction, which is free once the leader's last event is complete."""
        row = self._reserved.pop(slot, None)
        if row is None:  # The draft is sent again after a loss.
            row = super().free_row(slot)
            with self.stream.current:
                self._last_recorded = self._events.leader.record()
        return row

    def rows_in_use(self) -> set[int]:
        return super().rows_in_use() | set(self._reserved.values())

    def on_queued(self, worker: int, sent: InFlightBatch, seconds: float) -> None:
        """Queue the wait for the worker's event, the reading of the records and, if it is needed, the arithmetic."""
        sent.completion_pending, counts = True, sent.is_outstanding
        if seconds:
            self._reported_seconds.append(seconds)
        with self.stream.current:
            self._events.by_worker[worker].wait()
            self._pending.append(
                PendingCompletion(sent, worker, self._events.completions.read(sent.rows), counts, self._clock.now())
            )
            for task, row in zip(sent.tasks, sent.rows, strict=True) if counts else ():
                del self.outstanding[task.slot]
                self.run.accumulate(task.slot, row)
        self._batches_added += counts

    def schedule_drafts(self) -> bool | None:
        """Schedule all drafts whose predictions are queued.

        After the last drafts, returns None until all completion records were read, then False.
        """
        with self.stream.current:
            if super().schedule_drafts():
                # Batches sent from now on wait for what was queued so far.
                self._last_recorded = self._events.leader.record()
                self.stream.enqueue(self._on_round_begun)
                return True
        self._exhausted = True
        return None if self._pending else False

    @property
    def ready(self) -> bool:
        """Whether there are drafts to schedule, or the run is finished.

        A mode with feedback decides by the values of predictions, so all pending batches must be verified first. Until
        the drafts of the second round are written, three rounds are scheduled, while workers open the memory.
        """
        waits = self._pending and (self._exhausted or self.job.mode.feedback)
        opening = self._rounds_formed > 2 and self._rounds_begun == 1
        return self.run.ready and not (opening or waits)

    @property
    def round_ending(self) -> bool:
        """Whether the last scheduled round is about to end, so that the next one would soon have workers.

        It is once one of its batches is verified; in a pipelined mode, once fewer batches are pending than a round has.
        The second round is not held back: of runs that begin together, the oldest gets the workers first.
        """
        width = -(-self.job.mode.width // self._batch)
        least = width if self.job.mode.pipelined else self._round_size
        return self._rounds_formed == 1 or len(self._pending) < least

    def run_ready(self, notify: bool) -> float:
        """Execute the operations of the run's stream that are ready, if this thread executes it."""
        due = self.stream.run_ready(notify)
        if due is None:  # The stream is empty; a completion record that was read can be verified.
            read = bool(self._pending) and self._pending[0].status not in (PENDING, RAISED)
            return 0.0 if read else math.inf
        return due

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do before a worker's next event: not while workers have the next round queued.

        If no round has just begun, one is about to end, and half the queue is enough: its end is handled first.
        """
        least = self._base_depth if self.round_begun else self._base_depth // 2 + 1
        wanted = self.round_begun and self._kept_states.wanted
        return self.ready or wanted or self.stream.pending_waits < max(1, least)

    def _on_round_begun(self) -> None:
        self.round_begun = True
        self._rounds_begun += 1

    def poll_completions(self) -> Iterator[tuple[PendingCompletion, int | None]]:
        """Yield batches whose completion records were read, in order, with their status.

        The status is None if a record does not prove the batch; the batch then stays pending, to be lost with its
        worker. A batch whose evaluation raised also stays pending, since an EvaluationError follows.
        """
        while self._pending:
            completion = self._pending[0]
            status = completion.status
            if status in (PENDING, RAISED):
                return
            if status == CANCELLED and completion.counts:
                status = None  # The run has used the predictions, so the batch must not have been cancelled.
            if status is not None:
                self._verify(self._pending.popleft())
            yield completion, status
            if status is None:
                return

    def _verify(self, completion: PendingCompletion) -> None:
        now, seconds = self._clock.now(), completion.seconds
        self._slowest = max(self._slowest, seconds or now - max(completion.since, self._last_progress))
        if seconds:
            self._recent.append(seconds)
        self._last_progress = now
        self.served_by.add(completion.worker)
        del self._in_flight[completion.batch.sequence]
        if completion.counts:
            self._batches_verified += 1
            self._evaluated.append((len(completion.batch.tasks), seconds))
            self.evaluations += len(completion.batch.tasks)
            self.device_seconds += seconds
            self._checkpoints.on_verified(self.run, self._batches_verified)
            for task in completion.batch.tasks:
                self.retry_budget_used.pop(task.index, None)
            self.needs_refine = self.needs_refine or self._kept_states.is_due(self._batches_verified)

    def withdraw(self, sent: InFlightBatch) -> bool:
        """Remove a batch that will not be evaluated; return whether its predictions were added."""
        self._in_flight.pop(sent.sequence, None)
        found = [completion for completion in self._pending if completion.batch is sent]
        for completion in found:
            self._pending.remove(completion)
        return any(completion.counts for completion in found)

    def follows_failure(self, sent: InFlightBatch) -> bool:
        """Whether the evaluation of a batch before this one has failed; its EvaluationError may arrive later."""
        before = itertools.takewhile(lambda completion: completion.batch is not sent, self._pending)
        return any(completion.counts and completion.status == RAISED for completion in before)

    def drop_worker(self, worker: int, drafts: tuple[InFlightBatch, ...]) -> bool:
        """Remove a lost worker and its batches; return whether an unverified one was added to the run."""
        self._last_progress = self._clock.now()  # Other workers may have waited for it: restart their timeouts.
        self._events.release(worker)
        added = [self.withdraw(sent) for sent in drafts if sent.run is self]
        return any(added)

    def cancel_queued(self) -> None:
        self._events.leader.cancel_before(CANCEL_ALL)
        for completion in self._pending:
            completion.counts = False

    def restart(self) -> int:
        """Return to the last verified checkpoint that is still kept, else to the start; return its step.

        Callbacks are not called again for steps already handed out. Predictions of batches sent before are ignored.
        """
        self.waiting.clear()
        self.outstanding.clear()
        self._reserved.clear()
        self._events.leader.cancel_before(self._last_recorded + 1)
        for completion in self._pending:
            completion.counts = False
        self._exhausted = False
        last = self._checkpoints.return_to_last(self._batches_verified)
        self._batches_added = self._batches_verified = last.needs if last is not None else 0
        self._kept_states.discard(last.needs if last is not None else -1)
        del self._evaluated[self._batches_added :]
        self.evaluations = sum(count for count, _ in self._evaluated)
        self.device_seconds = sum(seconds for _, seconds in self._evaluated)
        with self.stream.current:
            if last is None:
                self._begin()
                return 0
            self.run.restore(last.checkpoint)
            self._rounds = self.run.rounds()
            for some in last.out:
                tasks = tuple(map(replace, some))  # New objects, so that batches that workers still have do not count.
                self.waiting.append(tasks)
                for task in tasks:
                    self.outstanding[task.slot] = task
                    self._reserved[task.slot] = super().free_row(task.slot)
            return self.run.steps_done

    def deadline(self, worker: int, sequence: int, since: float, timeout: float | None) -> float:
        """Return when a worker is late: only the time of the batch that the run's stream reads next counts."""
        first = self._pending[0].batch.sequence if self._pending else next(iter(self._in_flight))
        if sequence != first:
            return math.inf
        return super().deadline(worker, sequence, max(since, self._last_progress), timeout)

    def refine(self) -> None:
        """Queue the computation of final states, and hand out the states whose batches are verified."""
        if self._exhausted or self._rounds_refined != self._rounds_formed:
            self._rounds_refined = self._rounds_formed
            with self.stream.current:
                self.run.refine(self._keep_state, between=self._kept_states.wanted)
        if self._exhausted and not self._pending:
            self.stream.synchronize()  # No operation waits for a worker any more.
        self.future.rounds = max(self.future.rounds, self.run.rounds_done)
        self._kept_states.deliver(self._batches_verified, self._call_back if self._callback else None)
        self.steps_done = self._kept_states.steps_done
        self.run.residuals.update(self._kept_states.residuals)
        self.needs_refine = self._kept_states.is_due(self._batches_verified)

    def _keep_state(self, k: int, x: Tensor) -> None:
        draft = self.run.draft_at(k) if self.job.watch else None
        self._kept_states.keep(k, x, draft, self._batches_added)

    def _result(self, devices: tuple[str, ...]) -> Result:
        if self._reported_seconds and not self.device_seconds:
            self.device_seconds = statistics.fmean(self._reported_seconds) * len(self._evaluated)
        with self.stream.side_stream:
            return super()._result(devices)

    def release(self) -> None:
        """Release the memory; its next user is ordered after what is still queued."""
        with self.stream.current:
            self.arena.memory.record_event()
        self.stream.close()
        super().release()
