"""Asynchronous execution in a worker: drafts are queued and executed in order, here by a thread.

It stands in for a stream of a GPU, in order and asynchronous like one, so that everything around it runs anywhere.
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
from drp.protocol.messages import AsyncConfig, Draft, PipeHandle
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
    encode_status,
    write_completion_now,
)
from drp.protocol.waiting import set_timer_slack, sleep_until
from drp.protocol.wakeup import Wakeup
from drp.workers.emulated import EvaluationTimes

CLOSE_TIMEOUT = 1.0
"""Seconds that what a closed stream is doing may still take: it cannot be broken off."""


@dataclass(frozen=True)
class WorkItem:
    """A draft, or a batch of them: the tensors given, and those to be written, of each."""

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
    """What a worker that answers ahead of its device asks of it."""

    @property
    def busy(self) -> bool:
        """Whether something that was queued is not done. Raises what makes it impossible to go on."""
        ...

    def bind(self, run: int, arena: Arena) -> None:
        """Take up a run's records and stamps."""
        ...

    def submit(self, work: WorkItem) -> None:
        """Queue an evaluation, and the stamp behind it; what is raised here is raised before anything was answered."""
        ...

    def unbind(self, run: int) -> Any:
        """Let go of them; return what `bind_again` takes, None if there are none."""
        ...

    def rebind(self, run: int, bound: Any) -> None:
        """Take up those of another run for this one, whose memory is the same, and was cleared."""
        ...

    def take_failures(self) -> list[tuple[Draft, BaseException]]:
        """Return the drafts that were answered, and then could not be evaluated; each once."""
        ...

    def synchronize(self) -> None:
        """Wait for what was queued."""
        ...

    def close(self) -> None:
        """Queue no more."""
        ...


class RunBinding:
    """What the leader records of a run, what this worker does, and its stamps, as the run's Bind says."""

    def __init__(self, arena: Arena, leaders: LeaderEvent, own: OwnEvent) -> None:
        assert arena.bind.async_config is not None
        self.leader_event, self.worker_event = leaders, own
        self.completions = arena.memory.tensor(
            arena.bind.async_config.completions, (arena.bind.rows, COMPLETION_SIZE), torch.int64
        )


class HostRunBinding(RunBinding):
    """Likewise, on the host; `places` are the stamps."""

    leader_event: HostLeaderEvent
    worker_event: HostWorkerEvent

    def __init__(self, arena: Arena, leaders: HostLeaderEvent, own: HostWorkerEvent) -> None:
        super().__init__(arena, leaders, own)
        self.completion_view = self.completions.numpy().data


def host_timelines(arena: Arena) -> tuple[Tensor, Tensor]:
    """Return the leader's numbers [LINE / 8], and the workers' [workers, LINE / 8], for an arena on the host."""
    order = arena.bind.async_config
    assert order is not None
    if order.index >= order.workers:
        raise ProtocolError(f"the line {order.index} of {order.workers}")
    lines = arena.memory.tensor(order.timelines, (1 + order.workers, TIMELINE_NBYTES // 8), torch.int64)
    return lines[0], lines[1:]


class ThreadStream:
    """A thread that does what it is given in order: on the host what a stream is on a GPU.

    `time`, in nanoseconds of CLOCK_MONOTONIC, is when what was done counts as done, if that is not at once: what it
    waits for, and what it says of itself, is as of then.
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
        """Have this done after what was given before; raise what something given before has raised."""
        if self._error is not None:
            raise self._error
        self._enqueued_count += 1
        self._operations.put(do)

    @property
    def busy(self) -> bool:
        """Whether not all of it was done; raises what something given has raised."""
        if self._error is not None:
            raise self._error
        return self._done_count < self._enqueued_count

    def synchronize(self) -> None:
        """Wait until all was done, and counts as done."""
        while self.busy:
            time.sleep(POLL_INTERVAL)
        sleep_until(self.device_time / 1e9)

    def close(self) -> None:
        """Drop what was not done; a wait is given up."""
        self.closed = True
        self._operations.put(None)
        self._thread.join(CLOSE_TIMEOUT)

    def _serve(self) -> None:
        torch.get_num_threads()  # At its first call a thread takes the process's number, which its sums then have.
        set_timer_slack()
        with torch.inference_mode():
            while (do := self._operations.get()) is not None and not self.closed:
                try:
                    do()
                except BaseException as error:  # told to the thread that gives
                    self._error = error
                    return
                self._done_count += 1
                del do  # It holds tensors, and the next may be long in coming.


class HostWorkerEvent:
    """A worker's own records, as its thread makes them: among the `lines` of all, as the `order` says.

    It rings the leader's bell where that is wanted.
    """

    def __init__(self, lines: Tensor, order: AsyncConfig, stream: ThreadStream, bell: Wakeup | None) -> None:
        self._semaphore, self._all_workers = TimelineSemaphore(lines[order.index]), WorkerTimelines(lines)
        self._index, self._stream, self._wakeup = order.index, stream, bell

    def restart(self) -> None:
        self._semaphore.restart()

    def record(self) -> int:
        count = self._semaphore.next_value()
        self._stream.enqueue(functools.partial(self._signal, count))
        return count

    def _signal(self, count: int) -> None:
        last = self._semaphore.completed_at(count - RING_SIZE)
        if last is not None and not self._stream.closed:
            sleep_until(last / 1e9)  # Whoever waits for the record that had this place must have seen it.
        self._semaphore.signal(count, max(self._stream.device_time, time.perf_counter_ns()))
        if self._all_workers.notification(self._index, count) and self._wakeup is not None:
            self._wakeup.notify()


class HostLeaderEvent:
    """The leader's records, for which a worker's thread waits."""

    def __init__(self, line: Tensor, stream: ThreadStream) -> None:
        self._semaphore, self._stream = TimelineSemaphore(line), stream

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
    """A thread that evaluates what was answered, in order.

    `evaluate` is given since when it might have, in seconds of perf_counter, and says when it had begun, had the
    prediction, had it in its row, and when it was there for whoever waits. An emulated device is at work until then,
    while this thread goes on: it starts the next evaluation when it is done with the last, not when the thread is.
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
        order = arena.bind.async_config
        assert order is not None
        if order.wakeup is not None and order.wakeup not in self._wakeups:
            self._wakeups[order.wakeup] = Wakeup(order.wakeup)
        leaders, workers = host_timelines(arena)
        bell = self._wakeups[order.wakeup] if order.wakeup is not None else None
        own = HostWorkerEvent(workers, order, self._stream, bell)
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
        for bell in self._wakeups.values():
            bell.close()

    def submit(self, work: WorkItem) -> None:
        """Have the thread evaluate a draft and stamp it, once the leader has written it."""
        bound = self._runs[work.draft.run]
        bound.leader_event.wait(work.draft.after)
        self._stream.enqueue(functools.partial(self._run, bound, work, time.perf_counter_ns()))
        bound.worker_event.record()

    def _run(self, bound: HostRunBinding, work: WorkItem, given: int) -> None:
        draft = work.draft
        if bound.leader_event.is_cancelled(draft.after):
            for row in work.rows:
                bound.completion_view[row, 0] = encode_status(draft.sequence, CANCELLED)
            return
        try:
            times = self._evaluate(work, max(self._stream.device_time, given) / 1e9)
        except BaseException as error:  # the denoiser's: the stamp says that there is none, and a Fault says why
            self._failed.append((draft, error))
            for row in work.rows:
                bound.completion_view[row, 0] = encode_status(draft.sequence, RAISED)
            return
        self._stream.device_time = round(times.there * 1e9)
        for place, (row, output) in enumerate(zip(work.rows, work.outputs, strict=True)):
            took = round((times.ended - times.began) * 1e9) if place == 0 else 0  # a batch's, once
            write_completion_now(
                bound.completion_view, row, draft.sequence, output.values(), took, round(times.ended * 1e9)
            )
