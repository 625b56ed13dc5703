"""Ahead: runs whose drafts are answered before a device has evaluated them: `GpuOptions(dispatch="async")`.

A prediction is folded in as soon as the worker has queued it, or, if it is on cores, as soon as it is asked for: the
run's stream waits for the worker's, reads the stamp behind the prediction, and only then the prediction itself. The
leader looks at what was read when it comes to it. Until then the draft is still the worker's, with its row and its
deadline, and nothing that was made of it leaves the leader, neither a callback's state nor samples. If a worker is lost
with answers that were not stamped, the run goes back to the last round all of whose predecessors were.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drp.leader.clock import Clock
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.request import Job, Request
from drp.leader.runs.run_state import InFlightBatch, RunFuture, SyncRun
from drp.protocol.cuda import MAX_COUNTERS, WorkerCounterView
from drp.protocol.memory import aligned
from drp.protocol.messages import AsyncConfig, Bind
from drp.protocol.timeline import (
    CANCEL_ALL,
    CANCELLED,
    COMPLETION_SIZE,
    PENDING,
    RAISED,
    TIMELINE_NBYTES,
    WorkerEvent,
    decode_status,
    encode_status,
)
from drp.sampling.result import Result
from drp.sampling.run import Checkpoint, Run, Task, batches, residual


@dataclass(eq=False)
class PendingCompletion:
    """An answer whose stamps are being read, a list of STAMP numbers each; it `counts` if it was folded in."""

    batch: InFlightBatch
    worker: int
    read: Callable[[], list[list[int]]]
    counts: bool
    since: float

    @property
    def status(self) -> int | None:
        """What the stamps say, the worst of a batch; None if one is not the draft's, UNREAD if one was not read yet."""
        words = [stamp[0] for stamp in self.read()]
        if PENDING in words:
            return PENDING
        found = [decode_status(each, self.batch.sequence) for each in words]
        known = [verdict for verdict in found if verdict is not None]
        return max(known) if len(known) == len(found) else None

    @property
    def seconds(self) -> float:
        """How long the evaluation took, 0 if the device does not tell."""
        return sum(stamp[1] for stamp in self.read()) / 1e9

    @property
    def ended_at(self) -> float:
        """When the evaluation ended, in seconds of perf_counter, 0 if the device does not tell."""
        return max(stamp[2] for stamp in self.read()) / 1e9

    def failed_index(self, verdict: int) -> int:
        """Return the index of the first draft of the batch whose stamp says so."""
        words = [stamp[0] for stamp in self.read()]
        return self.batch.tasks[words.index(encode_status(self.batch.sequence, verdict))].index


@dataclass(frozen=True)
class KeptState:
    """A state [B * D] kept for the caller, the draft at its index, both if asked for; behind so many answers."""

    k: int
    state: Tensor | None
    draft: Tensor | None
    needs: int
    event: Any


@dataclass(frozen=True)
class Proven:
    """A round's beginning to which a run can go back once `needs` answers are proven: the batches that were out."""

    checkpoint: Checkpoint
    needs: int
    out: tuple[tuple[Task, ...], ...]


COMPLETION_POLL_INTERVAL = 0.001
"""Seconds between two looks at completion records that a GPU writes."""


class AsyncRun(SyncRun):
    """A run on a stream of its own, so that no run waits for another's workers."""

    binds_with_drafts = schedules_ahead = True

    def __init__(
        self,
        number: int,
        job: Job,
        request: Request,
        pending: RunFuture,
        spare: int,
        batch: int,
        placement: MemoryPlacement,
        places: int,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._placement, self.stream, self._worker_count = placement, placement.new_stream(), places
        self._worker_events: dict[int, WorkerEvent] = {}
        """What each records."""
        self._in_flight: dict[int, None] = {}
        """Sequence numbers of the drafts that workers have, in order."""
        self._pending: deque[PendingCompletion] = deque()
        """In the order in which they were folded in, which is that in which their stamps are read."""
        self._steps: deque[KeptState] = deque()
        self._residuals: dict[int, float] = {}
        self._rounds_of: dict[int, int] = {}
        """By index, which round the draft there was formed with."""
        self._reserved: dict[int, int] = {}
        """By slot, the row that the draft in it will be given."""
        self._batch_of: dict[int, tuple[Task, ...]] = {}
        """By slot, the batch of the draft in it."""
        self._proven: deque[Proven] = deque()
        """At most two: one that can be gone back to, and one that will be."""
        self._evaluated: list[tuple[int, float]] = []
        """Of each answer that is proven, in their order, how many evaluations it was and how long they took."""
        self._rounds_formed = self._batches_added = self._batches_verified = self._last_recorded = 0
        self._exhausted = False
        self._last_progress = clock.now()
        self._base_depth, self._round_begun = 0, False
        self.rounds_begun = 0
        """How many rounds have begun: their drafts are written."""
        spare += job.mode.width  # A round is not divided.
        rows = job.slots(checkpoints=True) + spare
        lines = aligned(rows * COMPLETION_SIZE * 8)
        try:
            with self.stream.current():
                more = lines + (1 + places) * TIMELINE_NBYTES
                super().__init__(
                    number, job, request, pending, spare, batch, placement.allocate_ordered, more, checkpoints=True
                )
        except BaseException:
            self.stream.close()
            raise
        stamps = self.arena.memory.tensor(self.arena.end, (rows, COMPLETION_SIZE), torch.int64)
        self._completions: Tensor | memoryview = stamps if stamps.is_cuda else stamps.numpy().data
        self._timelines_offset = self.arena.end + lines
        self.arena.memory.tensor(self._timelines_offset, (1 + places, TIMELINE_NBYTES), torch.uint8).zero_()
        self._leader_event = placement.leader_event(self.arena.memory, self._timelines_offset, self.stream)

    def _make_run(self) -> Run:
        job = replace(self.job, watch=False)  # Residuals are computed when the states are looked at.
        return job.run(self.arena.drafts, self.arena.predictions, self.stream)

    # What the engine calls, in the order of a draft's life.

    def bind(self, worker: int) -> Bind:
        """Join this run's stream to a worker's; return what it is told."""
        placement, place = self._placement, self._timelines_offset + (1 + worker) * TIMELINE_NBYTES
        record = self._worker_events[worker] = placement.worker_event(worker, self.arena.memory, place, self.stream)
        bell = placement.wakeup.handle if placement.wakeup is not None else None
        order = AsyncConfig(
            completions=self.arena.end,
            timelines=self._timelines_offset,
            workers=self._worker_count,
            index=worker,
            acknowledge=placement.workers_acknowledge,
            wakeup=bell,
        )
        if isinstance(record, WorkerCounterView):
            order = replace(
                order, counters=record.counters.handle, timelines=0, workers=MAX_COUNTERS, index=record.index
            )
        return replace(self.arena.bind, async_config=order)

    def prepare_dispatch(self, worker: int) -> tuple[int, int]:
        """Return the numbers of the next draft that a worker is given, and of the last record."""
        sequence = self._placement.next_sequence()
        self._in_flight[sequence] = None
        return sequence, self._last_recorded

    def on_dispatched(self, worker: int, sent: InFlightBatch) -> None:
        """Take it as answered, if nothing will be heard of it."""
        if not self._placement.workers_acknowledge:
            self.on_queued(worker, sent, counts=True)

    def _queue_drafts(self, tasks: Sequence[Task]) -> None:
        super()._queue_drafts(tasks)
        self._rounds_formed += 1
        for task in tasks:
            self._rounds_of[task.index] = self._rounds_formed
            # Now, and not when it is sent: by then there may be waits in between, for others that were formed with it.
            self._reserved[task.slot] = super().free_row(task.slot)
        for some in batches(tasks, self._batch):
            self._batch_of.update((task.slot, some) for task in some)
        if len(self._proven) < 2:
            out = {id(some): some for some in (self._batch_of[slot] for slot in self.outstanding)}
            self._proven.append(Proven(self.run.checkpoint(), self._batches_added, tuple(out.values())))

    def place_drafts(
        self, queues: Sequence[Sequence[InFlightBatch]], depth: int
    ) -> Iterator[tuple[int, tuple[Task, ...]]] | None:
        """Yield drafts of two rounds at most, each for the first worker that would evaluate the fewest before it."""
        self._round_begun = False
        self._base_depth = min(depth * len(queues), 2 * -(-self.job.mode.width // self._batch))
        return self._place(queues, self._base_depth - sum(map(len, queues)))

    def _place(self, queues: Sequence[Sequence[InFlightBatch]], room: int) -> Iterator[tuple[int, tuple[Task, ...]]]:
        last: tuple[Task, ...] | None = None
        while self.waiting and (
            room > 0 or (last is not None and self._joins_last_batch(self.waiting[0], last, len(queues)))
        ):
            last, room = self.waiting.popleft(), room - 1
            before = [self._evaluated_before(last, queue) for queue in queues]
            yield before.index(min(before)), last

    def _joins_last_batch(self, tasks: Sequence[Task], last: Sequence[Task], workers: int) -> bool:
        """Whether drafts go out with the last ones: of the same round, if that has no more than one for each worker."""
        mine = self._rounds_of[tasks[0].index]
        return self._rounds_of[last[0].index] == mine and self.job.mode.width <= workers * self._batch

    def _evaluated_before(self, tasks: Sequence[Task], drafts: Sequence[InFlightBatch]) -> int:
        """Count the drafts that a device would evaluate first: formed with these, if rounds wait for each other."""
        mine = self._rounds_of[tasks[0].index]
        return sum(
            self.job.mode.pipelined or sent.run is not self or self._rounds_of.get(sent.tasks[0].index) == mine
            for sent in drafts
        )

    def free_row(self, slot: int) -> int:
        """Return a row for a draft's prediction, which nobody reads once what was recorded is done."""
        row = self._reserved.pop(slot, None)
        if row is None:  # It is given again, after a loss.
            row = super().free_row(slot)
            with self.stream.current():
                self._last_recorded = self._leader_event.record()
        return row

    def rows_in_use(self) -> set[int]:
        """Return the rows that the arithmetic may still read, and those that were promised."""
        return super().rows_in_use() | set(self._reserved.values())

    def on_queued(self, worker: int, sent: InFlightBatch, counts: bool) -> bool:
        """Queue the wait for a worker's stream, the reading of the stamps, and, if it counts, the arithmetic."""
        sent.completion_pending = True
        with self.stream.current():
            self._worker_events[worker].wait()
            self._pending.append(
                PendingCompletion(sent, worker, self._read_completions(sent.rows), counts, self._clock.now())
            )
            for task, row in zip(sent.tasks, sent.rows, strict=True) if counts else ():
                del self.outstanding[task.slot]
                self.run.accumulate(task.slot, row)
        self._batches_added += counts
        return True

    def _read_completions(self, rows: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Queue the reading of stamps; return what tells them."""
        if isinstance(self._completions, Tensor):
            pinned = torch.full((len(rows), COMPLETION_SIZE), PENDING, dtype=torch.int64, pin_memory=True)
            for place, row in zip(pinned, rows, strict=True):
                self.stream.enqueue(partial(place.copy_, self._completions[row], non_blocking=True))
            return pinned.tolist
        seen = [[PENDING] * COMPLETION_SIZE for _ in rows]
        self.stream.enqueue(partial(_copy_completions, self._completions, rows, seen))
        return lambda: seen

    def schedule_drafts(self) -> bool | None:
        """Form all drafts whose predictions are queued; at the end wait, with None, until all stamps were seen."""
        with self.stream.current():
            if super().schedule_drafts():
                # What is sent from now on waits for what was queued so far.
                self._last_recorded = self._leader_event.record()
                self.stream.enqueue(self._on_round_begun)
                return True
        self._exhausted = True
        return None if self._pending else False

    @property
    def ready(self) -> bool:
        """Whether there are drafts to form, or nothing is left. Feedback is made of numbers, which must be there.

        Until the first device is done there are only drafts of three rounds: workers open the memory meanwhile.
        """
        waits = self._pending and (self._exhausted or self.job.mode.feedback)
        opening = self._rounds_formed > 2 and self.rounds_begun == 1
        return self.run.ready and not (opening or waits)

    def run_ready(self) -> float:
        """Do what can be done of what was queued, if that takes this thread; return when to go on."""
        with self.stream.current():
            due = self.stream.run_ready()
        if due is None:  # Nothing is waited for; what was read may be looked at.
            read = bool(self._pending) and self._pending[0].status not in (PENDING, RAISED)
            return 0.0 if read else math.inf
        return due

    @property
    def waits_for_bind(self) -> bool:
        """Whether others are to be left alone: a worker opens the memory, and its device waits for that."""
        return bool(self.bind_pending)

    @property
    def workers_saturated(self) -> bool:
        """Whether workers have the next round too. If none has just begun, one is about to end: that comes first."""
        least = self._base_depth if self._round_begun else self._base_depth // 2 + 1
        wanted = self._round_begun and self.wants_states
        return not (self.ready or wanted) and self.stream.pending_waits >= max(1, least)

    def _on_round_begun(self) -> None:
        self._round_begun = True
        self.rounds_begun += 1

    @property
    def poll_interval(self) -> float:
        """Seconds to the next look at stamps, or at states to be handed out: a GPU announces nothing."""
        looks = self._placement.on_gpu and (bool(self._pending) or self.needs_refine)
        return COMPLETION_POLL_INTERVAL if looks else math.inf

    def poll_completions(self) -> Iterator[tuple[PendingCompletion, int | None]]:
        """Yield answers whose stamps were read, in their order, with the verdict; None is for one that is not proven.

        One whose evaluation raised is left: a Fault follows. So is one that is not proven, to be lost with its worker.
        """
        while self._pending:
            answer = self._pending[0]
            verdict = answer.status
            if verdict in (PENDING, RAISED):
                return
            if verdict == CANCELLED and answer.counts:
                verdict = None  # It is.
            if verdict is not None:
                self._verify(self._pending.popleft())
            yield answer, verdict
            if verdict is None:
                return

    def _verify(self, answer: PendingCompletion) -> None:
        now, seconds = self._clock.now(), answer.seconds
        self._slowest = max(self._slowest, seconds or now - max(answer.since, self._last_progress))
        if seconds:
            self._recent.append(seconds)
        self._last_progress = now
        self.served_by.add(answer.worker)
        del self._in_flight[answer.batch.sequence]
        if answer.counts:
            self._batches_verified += 1
            self._evaluated.append((len(answer.batch.tasks), seconds))
            self.evaluations += len(answer.batch.tasks)
            self.device_seconds += seconds
            while len(self._proven) > 1 and self._proven[1].needs <= self._batches_verified:
                self._drop(self._proven.popleft())
            for task in answer.batch.tasks:
                self.retry_budget_used.pop(task.index, None)
            self.needs_refine = self.needs_refine or bool(self._steps)

    def withdraw(self, sent: InFlightBatch) -> bool:
        """Forget a draft that cannot be evaluated; return whether its prediction was folded in."""
        self._in_flight.pop(sent.sequence, None)
        found = [answer for answer in self._pending if answer.batch is sent]
        for answer in found:
            self._pending.remove(answer)
        return any(answer.counts for answer in found)

    def drop_worker(self, worker: int, drafts: tuple[InFlightBatch, ...]) -> bool:
        """Go on without a worker and the drafts that it had; return whether one was folded in that was not proven."""
        self._last_progress = self._clock.now()  # Others may have waited for it, and have their time from now on.
        record = self._worker_events.pop(worker, None)
        if record is not None:
            record.release()
        folded = [self.withdraw(sent) for sent in drafts if sent.run is self]
        return any(folded)

    def cancel_queued(self) -> None:
        """Have workers not begin what they were given."""
        self._leader_event.cancel_before(CANCEL_ALL)
        for answer in self._pending:
            answer.counts = False

    def _drop(self, proven: Proven) -> None:
        if proven.checkpoint.kept:
            self.run.drop(proven.checkpoint)

    def restart(self) -> int:
        """Go back to what is proven, if it was kept, else to the beginning; return from which step on it is done again.

        Callbacks that were called are not called again; what is still out is nobody's.
        """
        self.waiting.clear()
        self.outstanding.clear()
        self._reserved.clear()
        self._leader_event.cancel_before(self._last_recorded + 1)
        for answer in self._pending:
            answer.counts = False
        self._exhausted = False
        usable = [each for each in self._proven if each.checkpoint.kept and each.needs <= self._batches_verified]
        last = usable[-1] if usable else None
        self._batches_added = self._batches_verified = last.needs if last is not None else 0
        self._steps = deque(step for step in self._steps if last is not None and step.needs <= last.needs)
        del self._evaluated[self._batches_added :]
        self.evaluations = sum(count for count, _ in self._evaluated)
        self.device_seconds = sum(seconds for _, seconds in self._evaluated)
        self._proven.clear()
        with self.stream.current():
            if last is None:
                self._begin()
                return 0
            self.run.restore(last.checkpoint)
            self._rounds = self.run.rounds()
            self._proven.append(last)
            for some in last.out:
                tasks = tuple(map(replace, some))  # other objects: what workers still have of the old ones is nobody's
                self.waiting.append(tasks)
                for task in tasks:
                    self.outstanding[task.slot] = task
                    self._reserved[task.slot] = super().free_row(task.slot)
            return self.run.steps_done

    def due_since(self, sequence: int, since: float) -> float:
        """Return since when a worker owes a draft: only the one that the run's stream waits for, or comes to next."""
        first = self._pending[0].batch.sequence if self._pending else next(iter(self._in_flight))
        return max(since, self._last_progress) if sequence == first else math.inf

    def refine(self) -> None:
        """Queue what nobody waits for, and hand out the states that are proven."""
        with self.stream.current():
            self.run.refine(self._keep_state, between=self.wants_states)
        if self._exhausted and not self._pending:
            self.stream.synchronize()  # Nothing in it waits for a worker any more.
        self.future.rounds = max(self.future.rounds, self.run.rounds_done)
        while self._steps and self._steps[0].needs <= self._batches_verified:
            if self._steps[0].event is not None and not self.stream.query(self._steps[0].event):
                break
            self._deliver_state(self._steps.popleft())
        self.run.residuals.update(self._residuals)
        self.needs_refine = bool(self._steps) and self._steps[0].needs <= self._batches_verified

    @property
    def wants_states(self) -> bool:
        """Whether somebody is given the states between."""
        return self._callback is not None or self.job.watch

    def _keep_state(self, k: int, x: Tensor) -> None:
        """Note a state that is being computed; the next round may be computed in its place, so keep it if need be."""
        state = given = mark = None
        if k > self.steps_done and self.wants_states:
            draft = self.run.draft_at(k) if self.job.watch else None
            state, given = self._copy(x.reshape(-1)), None if draft is None else self._copy(draft)
            mark = self.stream.record()
        self._steps.append(KeptState(k, state, given, self._batches_added, mark))

    def _copy(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x)
        self.stream.enqueue(partial(kept.copy_, x))
        return kept

    def _deliver_state(self, step: KeptState) -> None:
        if step.k <= self.steps_done:
            return
        self.steps_done = step.k
        if step.state is None:
            return
        with self.stream.side_stream():  # The run's own stream may be waiting for workers, for as long as they take.
            if step.state.is_cuda:
                step.state.record_stream(torch.cuda.current_stream())
            if step.draft is not None:
                self._residuals[step.k] = residual(step.state, step.draft, len(self.job.start))
            if self._callback is not None:
                self._call_back(step.k, step.state.view(self.job.start.shape))

    def _result(self, devices: tuple[str, ...]) -> Result:
        with self.stream.side_stream():
            return super()._result(devices)

    def release(self) -> None:
        """Let go of the memory; whoever has it next comes after what is still queued."""
        with self.stream.current():
            self.arena.memory.record_event()
        self.stream.close()
        super().release()


def _copy_completions(stamps: memoryview, rows: Sequence[int], seen: list[list[int]]) -> None:
    """Read stamps where they lie, int64 [rows, STAMP], one for one."""
    for place, row in enumerate(rows):
        seen[place] = [stamps[row, number] for number in range(COMPLETION_SIZE)]
