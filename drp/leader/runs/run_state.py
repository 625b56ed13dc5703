"""The state of a run, or of an evaluation session, while the engine executes it, and of its batches in flight."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from drp.protocol.arena import Arena
from drp.protocol.messages import Bind
from drp.protocol.timeline import OK, PENDING, decode_status, encode_status
from drp.sampling.run import Task, batches

LATENCY_HISTORY = 32
"""Number of recent evaluations whose times are kept, for the median."""
FIRST_TIMEOUT = 60.0
"""Default timeout of a worker's first evaluation of a run, in seconds."""
MIN_TIMEOUT, TIMEOUT_FACTOR = 5.0, 20.0
"""Default timeout of later evaluations: at least so many seconds, and so many times the longest evaluation so far."""


@dataclass(eq=False)
class InFlightBatch:
    """Drafts of one run that were sent to a worker as one batch.

    run: the run.
    tasks: the drafts.
    rows: for each draft, the row of the run's predictions to which the worker writes.
    sequence: the sequence number of an asynchronous batch, 0 for a synchronous one.
    after: the number of the leader's event that an asynchronous batch waits for, 0 for none.
    completion_pending: whether an asynchronous batch is queued and its completion record was not read yet. The worker
        has the batch until then.
    """

    run: RunState
    tasks: tuple[Task, ...]
    rows: tuple[int, ...]
    sequence: int = 0
    after: int = 0
    completion_pending: bool = False

    @property
    def is_outstanding(self) -> bool:
        """Whether the predictions are still needed: another copy may have been used, or the run be over."""
        return self.run.outstanding.get(self.tasks[0].slot) is self.tasks[0]

    def release_rows(self) -> None:
        """Record that the worker no longer writes to the rows of this batch."""
        in_flight = self.run.rows_in_flight
        for row in self.rows:
            in_flight[row] -= 1
            if not in_flight[row]:
                del in_flight[row]


@dataclass(eq=False)
class PendingCompletion:
    """A queued batch whose completion records are being read.

    batch: the batch.
    worker: the worker's number.
    read: returns the completion records read so far, a list of COMPLETION_SIZE numbers for each draft.
    counts: whether the batch's predictions were added to the run.
    since: when the batch was queued, on the leader's clock.
    """

    batch: InFlightBatch
    worker: int
    read: Callable[[], list[list[int]]]
    counts: bool
    since: float

    @property
    def status(self) -> int | None:
        """The worst status of the batch's records.

        None if a record is not of this batch, PENDING if one was not read yet.
        """
        worst: int | None = OK
        for word, _, _ in self.read():
            if word == PENDING:
                return PENDING
            status = decode_status(word, self.batch.sequence)
            worst = None if status is None or worst is None else max(status, worst)
        return worst

    @property
    def seconds(self) -> float:
        """The evaluation's time in seconds, 0 if unknown."""
        return self.read()[0][1] / 1e9  # The batch's time is in its first record.

    @property
    def ended_at(self) -> float:
        """When the evaluation ended, in seconds of perf_counter, 0 if unknown."""
        return self.read()[0][2] / 1e9

    def failed_index(self, status: int) -> int:
        """Return the index of the first draft of the batch whose record has this status."""
        statuses = [record[0] for record in self.read()]
        return self.batch.tasks[statuses.index(encode_status(self.batch.sequence, status))].index


class RunState(ABC):
    """The state of a run or session: its memory, its drafts by state, and its statistics.

    A draft passes through these states:

        state      where it is kept                     left by
        waiting    `waiting`, `outstanding`             being sent to a worker
        in flight  `outstanding`, the worker's slot,    the prediction's arrival, or the worker's loss,
                   its row in `rows_in_flight`          after which the draft is waiting again
        added      the run's arithmetic                 `refine`

    In an asynchronous run a draft is added as soon as the worker has it, and is verified later; see `AsyncRun`.

    `waiting` has the drafts in batches of at most `batch`, each of which is sent to one worker. The methods that the
    engine, the scheduler and the run table call have defaults here for synchronous runs, whose predictions are complete
    when the worker's message arrives.
    """

    binds_with_drafts = False
    """Whether all workers but the first open the run's memory with their first draft, not when the run begins."""
    schedules_ahead = False
    """Whether drafts can be scheduled before the predictions that they depend on are complete."""
    idle: bool = False
    """Whether there is nothing to evaluate until the caller asks for more."""
    round_begun = False
    """Whether devices have begun a round since drafts were last assigned; False where that is unknown."""
    poll_interval = math.inf
    """Seconds between two polls of completion records; infinite if workers notify the leader."""
    needs_refine = False
    """Whether `refine` has states to compute or callbacks to call."""
    steps_done = 0
    cuts: Sequence[int] = ()
    """The steps from which a mode with feedback continued, discarding predictions beyond them."""
    callback_recorder: Callable[[int, int], None] | None = None
    """Called after each callback of the user with its step and its start, in ns of perf_counter."""

    def __init__(self, number: int, arena: Arena, batch: int = 1) -> None:
        self.number, self.arena, self._batch = number, arena, batch
        self.waiting: deque[tuple[Task, ...]] = deque()
        self.outstanding: dict[int, Task] = {}
        """By slot, the scheduled drafts whose predictions have not arrived."""
        self.rows_in_flight: defaultdict[int, int] = defaultdict(int)
        """Rows to which workers may still write, with the number of drafts that may do so, including late ones."""
        self._reassigned_rows: set[int] = set()
        """Rows that were used at some time for a slot with another number."""
        self.bound_workers: set[int] = set()
        """Numbers of the workers that were sent a Bind."""
        self.bind_pending: set[int] = set()
        """Numbers of the workers that must acknowledge a Bind; until then the memory's descriptor stays open."""
        self.retry_budget_used: defaultdict[int, float] = defaultdict(float)
        """By draft index, the share of the draft's retry budget that lost workers have used."""
        self.served_by: set[int] = set()
        """Numbers of the workers that have returned a prediction of this run."""
        self.incidents: list[str] = []
        """Descriptions of workers lost during the run."""
        self.tainted = False
        """Whether a worker that had bound the memory was lost: a killed process may still complete its last write."""
        self.evaluations = 0
        self.device_seconds = 0.0
        self._slowest = 0.0
        self._recent: deque[float] = deque(maxlen=LATENCY_HISTORY)

    @property
    @abstractmethod
    def cancel_requested(self) -> bool:
        """Whether the caller has cancelled the run or closed the session."""

    @abstractmethod
    def schedule_drafts(self) -> bool | None:
        """Schedule the next drafts.

        Returns:
            True if drafts were scheduled or predictions are outstanding, False if the run is finished except for
            `refine`, None if there is nothing to schedule yet.
        """

    @property
    def has_work(self) -> bool:
        """Whether the engine has anything to do for the run before the next message: to send drafts or to refine."""
        return self.needs_refine or bool(self.waiting)

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `schedule_drafts` has something to do."""

    @property
    def round_ending(self) -> bool:
        """Whether the predictions of the last scheduled round have begun to arrive, so that the next round is near."""
        return not self.outstanding

    @abstractmethod
    def rows_in_use(self) -> set[int]:
        """Return the rows whose predictions are still needed."""

    @abstractmethod
    def add_prediction(self, task: Task, row: int) -> None:
        """Add the prediction of a draft, which is in this row."""

    @abstractmethod
    def refine(self) -> None:
        """Compute the final states that no worker waits for, and call the callback."""

    @abstractmethod
    def finish(self, error: BaseException | None, devices: tuple[str, ...]) -> None:
        """Resolve the caller's futures: with the error, or without one with the result."""

    def bind(self, worker: int) -> Bind:
        """Return the message that describes the run's memory to a worker."""
        self.arena.memory.record_event()
        return self.arena.bind

    def begin_batch(self, tasks: tuple[Task, ...]) -> InFlightBatch:
        """Return the batch of drafts that are about to be sent to a worker, with the rows for their predictions."""
        rows: list[int] = []
        for task in tasks:
            rows.append(self.free_row(task.slot))
            self.rows_in_flight[rows[-1]] += 1
        return InFlightBatch(self, tasks, tuple(rows), *self.prepare_dispatch())

    def prepare_dispatch(self) -> tuple[int, int]:
        """Make what was written to the memory visible to a worker that is about to be sent a batch.

        Returns:
            The batch's sequence number, and the number of the leader's event that it waits for; 0 for none.
        """
        self.arena.memory.record_event()  # It does nothing on the host.
        return 0, 0

    def on_dispatched(self, worker: int, sent: InFlightBatch) -> None:
        """Update the run after an asynchronous batch was enqueued for a worker."""
        raise NotImplementedError(f"run {self.number} has no asynchronous batches")

    def place_drafts(
        self, queues: Sequence[Sequence[InFlightBatch]], depth: int
    ) -> Iterator[tuple[int, tuple[Task, ...]]]:
        """Assign waiting batches to workers; only called for a run that schedules ahead.

        Args:
            queues: for each ready worker, the batches that it has. They grow during the iteration.
            depth: the maximum number of batches per worker.

        Yields:
            The index of a worker in `queues`, and the batch for it.
        """
        raise NotImplementedError(f"run {self.number} does not schedule ahead")

    def on_queued(self, worker: int, sent: InFlightBatch, seconds: float) -> None:
        """Handle the message that an asynchronous batch is queued.

        `seconds` is the time of an earlier batch of the run, 0 if unknown.
        """
        raise NotImplementedError(f"run {self.number} has no asynchronous batches")

    def run_ready(self, notify: bool) -> float:
        """Execute queued arithmetic that is ready; return when to call this again, in seconds of perf_counter.

        With `notify`, request a notification of the next completion that the arithmetic waits for.
        """
        return math.inf

    def poll_completions(self) -> Iterator[tuple[PendingCompletion, int | None]]:
        """Yield batches whose completion records were read, with their status.

        The status is None if a record is not that of the batch, so that the worker has not evaluated it.
        """
        return iter(())

    def drop_worker(self, worker: int, drafts: tuple[InFlightBatch, ...]) -> bool:
        """Remove a lost worker and its batches; return whether `restart` is needed."""
        return False

    def restart(self) -> int:
        """Return to the last verified checkpoint; return its step."""
        raise NotImplementedError(f"run {self.number} uses nothing that is not proven")

    def deadline(self, worker: int, sequence: int, since: float, timeout: float | None) -> float:
        """Return when a worker is late; infinity if its time does not count yet.

        Args:
            worker: the worker's number.
            sequence: the sequence number of the first batch in the worker's queue.
            since: when that batch became the first in the queue.
            timeout: the timeout in seconds; by default, `timeout(worker)`.
        """
        return since + (timeout or self.timeout(worker))

    def withdraw(self, sent: InFlightBatch) -> bool:
        """Remove a batch that will not be evaluated; return whether its predictions were added already."""
        return False

    def follows_failure(self, sent: InFlightBatch) -> bool:
        """Whether an evaluation that the batch depends on has failed, so that its own failure may be a consequence."""
        return False

    def cancel_queued(self) -> None:  # noqa: B027  # most have nothing to do
        """Cancel drafts that workers have not begun, where that is possible."""

    def release(self) -> None:
        self.arena.close(reuse=not self.tainted)

    def free_row(self, slot: int) -> int:
        """Return a row for a draft's prediction that is not read and that no late worker may write to.

        It is the row with the slot's number if that is free, else a spare row, else another slot's row. A free row
        always exists: each slot has at most one row that is reserved, written or read, and there are as many spare rows
        as workers can write to at once.
        """
        if slot not in self.rows_in_flight and slot not in self._reassigned_rows:
            return slot
        slots, rows = self.arena.bind.slots, self.arena.bind.rows
        used = self.rows_in_use() | self.rows_in_flight.keys()
        row: int = next(row for row in (slot, *range(slots, rows), *range(slots)) if row not in used)
        if row < slots and row != slot:
            self._reassigned_rows.add(row)
        return row

    def on_predictions(self, worker: int, sent: InFlightBatch, seconds: float) -> None:
        """Add the predictions of a batch and update the statistics."""
        self.served_by.add(worker)
        self.device_seconds += seconds
        self._slowest = max(self._slowest, seconds)
        self._recent.append(seconds)
        for task, row in zip(sent.tasks, sent.rows, strict=True):
            del self.outstanding[task.slot]
            self.retry_budget_used.pop(task.index, None)
            self.evaluations += 1
            self.add_prediction(task, row)

    def _queue_drafts(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """Schedule the drafts of a round; return them in the batches in which they wait."""
        groups = batches(tasks, self._batch)
        self.waiting.extend(groups)
        for task in tasks:
            self.outstanding[task.slot] = task
        return groups

    def timeout(self, worker: int) -> float:
        """Return a worker's timeout for a draft, in seconds: a multiple of the slowest evaluation so far."""
        return max(MIN_TIMEOUT, TIMEOUT_FACTOR * self._slowest) if worker in self.served_by else FIRST_TIMEOUT

    @property
    def median_latency(self) -> float | None:
        """The median time of recent evaluations in seconds; None before the first."""
        return statistics.median(self._recent) if self._recent else None
