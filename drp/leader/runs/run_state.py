"""The state of a run, or of a caller's evaluation session, while the engine executes it."""

from __future__ import annotations

import logging
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from drp.leader.request import Job, Request
from drp.nvtx import annotate, annotate_methods
from drp.protocol.arena import Allocate, Arena
from drp.protocol.messages import Bind
from drp.sampling.result import Result
from drp.sampling.run import Run, Task, batches

LATENCY_HISTORY = 32
"""Evaluations whose times are kept."""
FIRST_TIMEOUT = 60.0
"""Seconds that a worker's first evaluation of a run may take, if nothing else was said."""
MIN_TIMEOUT, TIMEOUT_FACTOR = 5.0, 20.0
"""Seconds that any evaluation may take, and how many times the longest so far, if nothing else was said."""


log = logging.getLogger(__name__)


class RunFuture(Future[Result]):
    """A run that was submitted: a `concurrent.futures.Future` whose `cancel` also ends a run that is under way.

    `number` is its own in the timeline, `steps` those of its grid; both from when it begins. `rounds` are those done.
    """

    number: int | None = None
    steps = 0
    rounds = 0

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._notify = wake
        self.cancel_requested = False

    def cancel(self) -> bool:
        """Ask for the end of the run, after which `result` raises CancelledError; return False if it is over already.

        It ends within a round; its workers are free for other runs as soon as they have answered.
        """
        over = self.done()
        self.cancel_requested = True
        if not over:
            self._notify()
        return not over

    def add_done_callback(self, fn: Callable[[Future[Result]], object]) -> None:
        """Have `fn` called with this future once it is done, in the leader's thread, or at once if it is done already.

        What it raises in the leader's thread is logged, and does not keep other callbacks from being called.
        """
        super().add_done_callback(fn if self.done() else partial(_call_done_callback, fn))


def _call_done_callback(fn: Callable[[Future[Result]], object], future: Future[Result]) -> None:
    try:
        fn(future)
    except BaseException:  # Future itself logs an Exception only; SystemExit would end the leader's thread.
        log.exception("a done-callback raised")


@dataclass(eq=False)
class InFlightBatch:
    """Drafts that a worker has as one batch: of a run, each to be answered in a row of its predictions.

    With a sequence number they may be `answered`, and are the worker's until they are stamped.
    """

    run: RunState
    tasks: tuple[Task, ...]
    rows: tuple[int, ...]
    sequence: int = 0
    completion_pending: bool = False


class Completion(Protocol):
    """What is known of a batch that a worker's device has come to, which the worker has announced before."""

    @property
    def batch(self) -> InFlightBatch:
        """The batch."""
        ...

    @property
    def worker(self) -> int:
        """The worker's number."""
        ...

    @property
    def counts(self) -> bool:
        """Whether the run uses the predictions."""
        ...

    @property
    def seconds(self) -> float:
        """How long the evaluation took, 0 if the device does not tell."""
        ...

    @property
    def ended_at(self) -> float:
        """When the evaluation ended, in seconds of perf_counter, 0 if the device does not tell."""
        ...

    def failed_index(self, verdict: int) -> int:
        """Return the index of the first draft of the batch with this status."""
        ...


class RunState(ABC):
    """Memory and accounts. `waiting` are the drafts formed but not given to any worker, in batches for one each.

    `batch` is how many drafts there are in one at most. What engine, scheduler and run table ask of a run has defaults
    here for runs whose predictions are there when a worker says so.
    """

    binds_with_drafts = False
    """Workers open the memory when they are given the first draft, and need not say that they have."""
    schedules_ahead = False
    """Drafts can be formed before the predictions that they are made of are there."""
    rounds_begun = 0
    """How many rounds devices have begun, where that is known."""
    needs_refine = False
    """States are to be refined, callbacks to be called."""
    steps_done = 0
    cuts: Sequence[int] = ()
    """Of a run, those of its arithmetic."""
    callback_recorder: Callable[[int, int], None] | None = None
    """Called with the step of each callback and since when it ran, in ns of perf_counter."""

    def __init__(self, number: int, arena: Arena, batch: int = 1) -> None:
        self.number, self.arena, self._batch = number, arena, batch
        self.waiting: deque[tuple[Task, ...]] = deque()
        self.outstanding: dict[int, Task] = {}
        """By slot, the drafts formed whose predictions are not in."""
        self.rows_in_flight: Counter[int] = Counter()
        """Rows that workers may write to: of drafts that they have, late ones too."""
        self._reassigned_rows: set[int] = set()
        """Rows that another slot than that of their number was given at some time."""
        self.bound_workers: set[int] = set()
        """Numbers of the workers that were sent Bind."""
        self.bind_pending: set[int] = set()
        """Those of them that have not answered: until then the memory's descriptor stays open."""
        self.retry_budget_used: defaultdict[int, float] = defaultdict(float)
        """By index, how much of the losses allowed it has had."""
        self.served_by: set[int] = set()
        """Numbers of the workers that have answered."""
        self.incidents: list[str] = []
        """What happened to workers meanwhile."""
        self.tainted = False
        """Whether a worker was lost that may have used the memory: a killed process may yet be at its last write."""
        self.evaluations = 0
        self.device_seconds = 0.0
        self._slowest = 0.0
        self._recent: deque[float] = deque(maxlen=LATENCY_HISTORY)

    @property
    @abstractmethod
    def cancel_requested(self) -> bool:
        """Whether its caller has given it up."""

    @abstractmethod
    def schedule_drafts(self) -> bool | None:
        """Form the next drafts; return False if there is none and it is over but for `refine`, None if not yet."""

    @property
    def workers_saturated(self) -> bool:
        """Whether workers have all that they need for now, so that this thread would only take their cores."""
        return False

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `form` has something to do."""

    @abstractmethod
    def rows_in_use(self) -> set[int]:
        """Return the rows whose predictions are still needed."""

    @abstractmethod
    def add_prediction(self, task: Task, row: int) -> None:
        """Take a prediction."""

    @abstractmethod
    def refine(self) -> None:
        """Do what nobody waits for."""

    @abstractmethod
    def finish(self, error: BaseException | None, devices: tuple[str, ...]) -> None:
        """Tell the caller that it is over."""

    def bind(self, worker: int) -> Bind:
        """Return what a worker is told of the memory."""
        self.arena.memory.record_event()
        return self.arena.bind

    def prepare_dispatch(self, worker: int) -> tuple[int, int]:
        """Let a worker that is given a draft now see what was written.

        Return the draft's sequence number, and that of the record that it is to wait for, 0 if it has none.
        """
        self.arena.memory.record_event()  # on a GPU; elsewhere it is nothing
        return 0, 0

    def on_dispatched(self, worker: int, sent: InFlightBatch) -> None:  # noqa: B027  # most have nothing to do
        """Take note of what a worker was given."""

    @property
    def waits_for_bind(self) -> bool:
        """Whether messages to other workers are to wait: a worker opens the memory, and its device waits for that."""
        return False

    @property
    def poll_interval(self) -> float:
        """Seconds to the next look at completions, where nobody announces them."""
        return math.inf

    def place_drafts(
        self, queues: Sequence[Sequence[InFlightBatch]], depth: int
    ) -> Iterator[tuple[int, tuple[Task, ...]]] | None:
        """Take waiting drafts, and yield for which worker each batch is, where the run says so itself.

        `queues` are the batches that workers have, of which each may have `depth`; they grow meanwhile. Return None to
        leave it to the policy.
        """
        return None

    def on_queued(self, worker: int, sent: InFlightBatch, counts: bool) -> bool:
        """Take the message that a batch is queued; return False if its predictions are there when it comes."""
        return False

    def run_ready(self) -> float:
        """Run the arithmetic that was queued for this thread; return when there is more, in seconds of perf_counter."""
        return math.inf

    def poll_completions(self) -> Iterator[tuple[Completion, int | None]]:
        """Yield batches that devices have come to, with their status, None for one that the worker has not done."""
        return iter(())

    def drop_worker(self, worker: int, drafts: tuple[InFlightBatch, ...]) -> bool:
        """Go on without a worker and what it had; return whether `restart` is needed."""
        return False

    def restart(self) -> int:
        """Go back to what is proven; return the step."""
        raise NotImplementedError(f"run {self.number} uses nothing that is not proven")

    def due_since(self, sequence: int, since: float) -> float:
        """Return since when a worker owes a draft that it has had first since then."""
        return since

    def withdraw(self, sent: InFlightBatch) -> bool:
        """Forget a draft that cannot be evaluated; return whether its prediction was taken already."""
        return False

    def cancel_queued(self) -> None:  # noqa: B027  # most have nothing to do
        """Have workers not begin what they were given, where they can be told."""

    def release(self) -> None:
        """Let go of the memory: no worker uses it any more."""
        self.arena.close(reuse=not self.tainted)

    def free_row(self, slot: int) -> int:
        """Return a row for a draft's prediction: one that nobody reads, and that no late worker may write to.

        It is the one of the slot's number, or else a spare one, or else another slot's. There always is one: a slot has
        one row that is promised, written or read, and beside those there are as many as workers can write to at once.
        """
        if slot not in self.rows_in_flight and slot not in self._reassigned_rows:
            return slot
        slots, rows = self.arena.bind.slots, self.arena.bind.rows
        used = self.rows_in_use() | self.rows_in_flight.keys()
        row: int = next(row for row in (slot, *range(slots, rows), *range(slots)) if row not in used)
        if row < slots and row != slot:
            self._reassigned_rows.add(row)
        return row

    def on_predictions(self, worker: int, tasks: Sequence[Task], rows: Sequence[int], seconds: float) -> None:
        """Account for the predictions of a batch and take them."""
        self.served_by.add(worker)
        self.device_seconds += seconds
        self._slowest = max(self._slowest, seconds)
        self._recent.append(seconds)
        for task, row in zip(tasks, rows, strict=True):
            del self.outstanding[task.slot]
            self.retry_budget_used.pop(task.index, None)
            self.evaluations += 1
            self.add_prediction(task, row)

    def _queue_drafts(self, tasks: Sequence[Task]) -> None:
        self.waiting.extend(batches(tasks, self._batch))
        self.outstanding.update((task.slot, task) for task in tasks)

    def timeout(self, worker: int) -> float:
        """Return the seconds that a worker may take for a draft: many times what the slowest took so far."""
        return max(MIN_TIMEOUT, TIMEOUT_FACTOR * self._slowest) if worker in self.served_by else FIRST_TIMEOUT

    @property
    def median_latency(self) -> float | None:
        """The median of the seconds that evaluations took lately, once there are some."""
        return statistics.median(self._recent) if self._recent else None


class SyncRun(RunState):
    """One run's arithmetic with it, and the future that its caller holds."""

    def __init__(
        self,
        number: int,
        job: Job,
        request: Request,
        pending: RunFuture,
        spare: int,
        batch: int,
        make: Allocate,
        more: int = 0,
        checkpoints: bool = False,
    ) -> None:
        self._began, slots = time.perf_counter(), job.slots(checkpoints)
        arena = Arena.create(number, job.start, slots, slots + spare, job.cond, make, more)
        super().__init__(number, arena, batch)
        self.job, self.future = job.to(arena.memory.device), pending
        pending.number, pending.steps = number, job.solver.grid.steps
        self._callback = request.callback
        self._begin()

    def _begin(self) -> None:
        self.run = self._make_run()
        self.cuts = self.run.cuts
        self._rounds = self.run.rounds()

    def _make_run(self) -> Run:
        return self.job.run(self.arena.drafts, self.arena.predictions)

    @property
    def cancel_requested(self) -> bool:
        """Whether the future was cancelled."""
        return self.future.cancel_requested

    def annotate_nvtx(self) -> None:
        """Name in NVTX ranges what is done here."""
        annotate_methods(self, schedule_drafts="drp draft", refine="drp refine")
        if self._callback is not None:
            self._callback = annotate("drp callback", self._callback)

    def schedule_drafts(self) -> bool | None:
        """Form all drafts whose predictions are in."""
        self.needs_refine = True
        while self.run.ready:
            tasks = next(self._rounds, None)
            if tasks is None:
                return False
            self._queue_drafts(tasks)
        return True

    @property
    def ready(self) -> bool:
        """Whether there are drafts to form, or nothing is left."""
        return self.run.ready

    def rows_in_use(self) -> set[int]:
        """Return the rows that the arithmetic may still read."""
        return self.run.rows

    def add_prediction(self, task: Task, row: int) -> None:
        """Fold a prediction in."""
        self.run.accumulate(task.slot, row)

    def refine(self) -> None:
        """Compute the states that the last round has passed, and call the callback for each."""
        self.needs_refine = False
        self.future.rounds = self.run.rounds_done
        self.run.refine(self._on_state if self._callback else None)
        self.steps_done = self.run.steps_done

    def _on_state(self, step: int, state: Tensor) -> None:
        """Call the callback with a copy: it may write to it, and the run goes on from the state."""
        self._call_back(step, state.clone())

    def _call_back(self, step: int, state: Tensor) -> None:
        assert self._callback is not None
        since = time.perf_counter_ns()
        self._callback(step, state)
        if self.callback_recorder is not None:
            self.callback_recorder(step, since)

    def finish(self, error: BaseException | None, devices: tuple[str, ...]) -> None:
        """Resolve the future: with the error if there is one, or if there is no result, with the reason."""
        if error is None:
            try:
                result = self._result(devices)
            except BaseException as own:  # such as an `out` that its owner has resized meanwhile
                error = own
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def _result(self, devices: tuple[str, ...]) -> Result:
        seconds = time.perf_counter() - self._began
        return Result(
            samples=self.job.samples(self.run.state),
            mode=self.job.mode.name,
            drafts=self.job.mode.width,
            steps=self.job.solver.grid.steps,
            devices=devices,
            rounds=self.run.rounds_done,
            evaluations=self.evaluations,
            seconds=seconds,
            device_seconds=self.device_seconds,
            residuals=self.run.residuals,
            cuts=tuple(self.run.cuts),
            evaluated=tuple(self.run.evaluated),
            incidents=tuple(self.incidents),
        )
