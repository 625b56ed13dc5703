"""Asynchronous execution in a worker: drafts are queued and executed in order, here by a thread.

The thread replaces a CUDA stream: it executes in order and asynchronously, so asynchronous dispatch runs anywhere.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from drp.errors import ProtocolError
from drp.protocol.arena import Arena
from drp.protocol.handles import PipeHandle
from drp.protocol.messages import AsyncConfig, Draft
from drp.protocol.timeline import (
    CANCELLED,
    COMPLETION_SIZE,
    POLL_INTERVAL,
    RAISED,
    RECHECK_INTERVAL,
    RING_SIZE,
    TIMELINE_NBYTES,
    LeaderEvent,
    OwnEvent,
    TimelineSemaphore,
    WorkerTimelines,
    write_completion_now,
)
from drp.protocol.waiting import set_timer_slack, sleep_until
from drp.protocol.wakeup import Wakeup
from drp.workers.emulated import EvaluationTimes

CLOSE_TIMEOUT = 1.0
"""Seconds to wait for the operation that a closed stream is executing, which cannot be interrupted."""


@dataclass(frozen=True)
class WorkItem:
    """A draft or a batch of drafts, with the input and output tensors of each."""

    draft: Draft
    arena: Arena
    inputs: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Mapping[str, Tensor]]

    @property
    def timesteps(self) -> list[float]:
        return [self.draft.timestep, *(also.timestep for also in self.draft.batched)]

    @property
    def rows(self) -> list[int]:
        return [self.draft.row, *(also.row for also in self.draft.batched)]


class AsyncExecutor(Protocol):
    """Executes drafts in order, after the worker has received them."""

    @property
    def busy(self) -> bool:
        """Whether queued work is unfinished. Raises an error that makes it impossible to continue."""
        ...

    def bind(self, run: int, arena: Arena) -> None:
        """Open the events and completion records of a run."""
        ...

    def submit(self, work: WorkItem) -> float:
        """Queue an evaluation and its completion record. Errors are raised before the draft is answered.

        Returns:
            The seconds of the run's last evaluation that is complete, if completion records do not contain them and
            they were not returned yet; else 0.
        """
        ...

    def unbind(self, run: int) -> Any:
        """Release the run; return its binding, for `rebind`, or None if it has none."""
        ...

    def rebind(self, run: int, bound: Any) -> None:
        """Use another run's binding for this one, which has the same memory, cleared."""
        ...

    def take_failures(self) -> list[tuple[Draft, BaseException]]:
        """Return drafts whose evaluation failed after they were queued, each once."""
        ...

    def synchronize(self) -> None:
        """Wait until all queued work is finished."""
        ...

    def close(self) -> None:
        """Accept no more work."""
        ...


class RunBinding:
    """The events and completion records of one run, as its Bind describes them."""

    def __init__(self, arena: Arena, leaders: LeaderEvent, own: OwnEvent) -> None:
        assert arena.bind.async_config is not None
        self.leader_event, self.worker_event = leaders, own
        self.completions = arena.memory.tensor(
            arena.bind.async_config.completions, (arena.bind.rows, COMPLETION_SIZE), torch.int64
        )


class HostRunBinding(RunBinding):
    """A RunBinding on the host; `completion_view` are the completion records as a memoryview."""

    leader_event: HostLeaderEvent
    worker_event: HostWorkerEvent

    def __init__(self, arena: Arena, leaders: HostLeaderEvent, own: HostWorkerEvent) -> None:
        super().__init__(arena, leaders, own)
        self.completion_view = self.completions.numpy().data


def host_timelines(arena: Arena) -> tuple[Tensor, Tensor]:
    """Return the memory of the leader's semaphore, int64 [TIMELINE_NBYTES / 8], and of the workers', [workers, ...]."""
    config = arena.bind.async_config
    assert config is not None
    if config.index >= config.workers:
        raise ProtocolError(f"timeline {config.index} is out of range; there are {config.workers}")
    timelines = arena.memory.tensor(config.timelines, (1 + config.workers, TIMELINE_NBYTES // 8), torch.int64)
    return timelines[0], timelines[1:]


class ThreadStream:
    """A thread that executes operations in order, as a CUDA stream does on a GPU.

    `device_time`, in nanoseconds of CLOCK_MONOTONIC, is the time at which the executed operations complete on an
    emulated device, which may lie ahead. Waits and events refer to it.
    """

    def __init__(self) -> None:
        self._operations: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._enqueued_count = self._done_count = 0
        self._error: BaseException | None = None
        self.device_time = 0
        self.closed = False
        self._thread = threading.Thread(target=self._serve, name="drp-worker", daemon=True)
        self._thread.start()

    def enqueue(self, do: Callable[[], object]) -> None:
        """Execute `do` after what was enqueued before; raise the error of an earlier operation."""
        if self._error is not None:
            raise self._error
        self._enqueued_count += 1
        self._operations.put(do)

    @property
    def busy(self) -> bool:
        """Whether operations are left; raises the error of one."""
        if self._error is not None:
            raise self._error
        return self._done_count < self._enqueued_count

    def synchronize(self) -> None:
        """Wait until all operations are executed and complete."""
        while self.busy:
            time.sleep(POLL_INTERVAL)
        sleep_until(self.device_time / 1e9)

    def close(self) -> None:
        """Drop the operations that are left, and abandon a wait."""
        self.closed = True
        self._operations.put(None)
        self._thread.join(CLOSE_TIMEOUT)

    def _serve(self) -> None:
        torch.get_num_threads()  # The first call gives this thread the process's number of threads for its sums.
        set_timer_slack()
        with torch.inference_mode():
            while (do := self._operations.get()) is not None and not self.closed:
                try:
                    do()
                except BaseException as error:  # raised in the thread that enqueues
                    self._error = error
                    return
                self._done_count += 1
                del do  # It holds tensors, and the next operation may come much later.


class HostWorkerEvent:
    """The event of this worker: its semaphore among those of all workers, signalled by the worker's thread.

    It notifies the leader on request.
    """

    def __init__(self, timelines: Tensor, config: AsyncConfig, stream: ThreadStream, wakeup: Wakeup | None) -> None:
        self._semaphore, self._all_workers = TimelineSemaphore(timelines[config.index]), WorkerTimelines(timelines)
        self._index, self._stream, self._wakeup = config.index, stream, wakeup

    def restart(self) -> None:
        self._semaphore.restart()

    def record(self) -> int:
        count = self._semaphore.next_value()
        self._stream.enqueue(functools.partial(self._signal, count))
        return count

    def _signal(self, count: int) -> None:
        last = self._semaphore.completed_at(count - RING_SIZE)
        if last is not None and not self._stream.closed:
            sleep_until(last / 1e9)  # Waiters must have seen the event whose time was here.
        self._semaphore.signal(count, max(self._stream.device_time, time.perf_counter_ns()))
        if self._all_workers.notification(self._index, count) and self._wakeup is not None:
            self._wakeup.notify()


class HostLeaderEvent:
    """The leader's event, for which the worker's thread waits."""

    def __init__(self, semaphore: Tensor, stream: ThreadStream) -> None:
        self._semaphore, self._stream = TimelineSemaphore(semaphore), stream

    def wait(self, number: int) -> None:
        self._stream.enqueue(functools.partial(self._wait_for, number))

    def is_cancelled(self, number: int) -> bool:
        return self._semaphore.is_cancelled(number)

    def _wait_for(self, count: int) -> None:
        while (since := self._semaphore.completed_at(count)) is None:
            if self._stream.closed:
                return
            self._semaphore.wait(count, RECHECK_INTERVAL)
        self._stream.device_time = max(self._stream.device_time, since)


class HostExecutor:
    """A thread that evaluates queued drafts in order.

    `evaluate` takes the earliest time to begin, in seconds of `time.perf_counter`, and returns the times of
    the evaluation. An emulated device is busy until the last of them while the thread continues, so its next evaluation
    begins when the device is free, not when the thread is.
    """

    def __init__(self, evaluate: Callable[[WorkItem, float], EvaluationTimes]) -> None:
        self._evaluate = evaluate
        self._stream = ThreadStream()
        self._runs: dict[int, HostRunBinding] = {}
        self._wakeups: dict[PipeHandle, Wakeup] = {}
        self._failed: deque[tuple[Draft, BaseException]] = deque()

    @property
    def busy(self) -> bool:
        return self._stream.busy or bool(self._failed)

    def bind(self, run: int, arena: Arena) -> None:
        config = arena.bind.async_config
        assert config is not None
        if config.wakeup is not None and config.wakeup not in self._wakeups:
            self._wakeups[config.wakeup] = Wakeup(config.wakeup)
        leaders, workers = host_timelines(arena)
        wakeup = self._wakeups[config.wakeup] if config.wakeup is not None else None
        own = HostWorkerEvent(workers, config, self._stream, wakeup)
        self._runs[run] = HostRunBinding(arena, HostLeaderEvent(leaders, self._stream), own)

    def unbind(self, run: int) -> HostRunBinding | None:
        return self._runs.pop(run, None)

    def rebind(self, run: int, bound: HostRunBinding) -> None:
        bound.worker_event.restart()
        self._runs[run] = bound

    def take_failures(self) -> list[tuple[Draft, BaseException]]:
        return [self._failed.popleft() for _ in range(len(self._failed))]

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._stream.close()
        for wakeup in self._wakeups.values():
            wakeup.close()

    def submit(self, work: WorkItem) -> float:
        """Queue the evaluation of a draft and its completion record, after the leader's event."""
        bound = self._runs[work.draft.run]
        bound.leader_event.wait(work.draft.after)
        self._stream.enqueue(functools.partial(self._run, bound, work, time.perf_counter_ns()))
        bound.worker_event.record()
        return 0.0

    def _run(self, bound: HostRunBinding, work: WorkItem, submitted: int) -> None:
        draft = work.draft
        if bound.leader_event.is_cancelled(draft.after):
            for row in work.rows:
                write_completion_now(bound.completion_view, row, draft.sequence, status=CANCELLED)
            return
        try:
            times = self._evaluate(work, max(self._stream.device_time, submitted) / 1e9)
        except BaseException as error:  # The status says that there is no prediction; an EvaluationError says why.
            self._failed.append((draft, error))
            for row in work.rows:
                write_completion_now(bound.completion_view, row, draft.sequence, status=RAISED)
            return
        self._stream.device_time = round(times.there * 1e9)
        for place, row in enumerate(work.rows):
            took = round((times.ended - times.began) * 1e9) if place == 0 else 0  # a batch's, once
            write_completion_now(bound.completion_view, row, draft.sequence, took, round(times.ended * 1e9))
