"""The events of an asynchronous run, and its completion records, which lie in the run's memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from drp.leader.memory.placement import MemoryPlacement
from drp.leader.runs.completion_records import CompletionRecords
from drp.protocol.arena import Arena
from drp.protocol.cuda import MAX_COUNTERS, WorkerCounterView
from drp.protocol.memory import aligned
from drp.protocol.messages import AsyncConfig, Bind
from drp.protocol.timeline import COMPLETION_SIZE, TIMELINE_NBYTES, Stream, WorkerEvent


class RunEvents:
    """The completion records of a run, the leader's event, and an event for each worker that has bound the run.

    They follow the arena's drafts, predictions and conditions in memory:

        completion records  int64 [rows, COMPLETION_SIZE], one for each row of predictions
        semaphores          [1 + workers, TIMELINE_NBYTES] bytes: the leader's, then one for each worker; see
                            `drp.protocol.timeline.TimelineSemaphore`. On a GPU, events are used in their place.
    """

    def __init__(self, arena: Arena, workers: int, placement: MemoryPlacement, stream: Stream) -> None:
        self._arena, self._workers, self._placement, self._stream = arena, workers, placement, stream
        rows = arena.bind.rows
        records = arena.memory.tensor(arena.end, (rows, COMPLETION_SIZE), torch.int64)
        self.completions = CompletionRecords(records, stream)
        self._semaphores = arena.end + _records_nbytes(rows)
        arena.memory.tensor(self._semaphores, (1 + workers, TIMELINE_NBYTES), torch.uint8).zero_()
        self.leader = placement.leader_event(arena.memory, self._semaphores, stream)
        self.by_worker: dict[int, WorkerEvent] = {}

    @staticmethod
    def nbytes(rows: int, workers: int) -> int:
        """Return the number of bytes that they need in memory."""
        return _records_nbytes(rows) + (1 + workers) * TIMELINE_NBYTES

    def bind(self, worker: int) -> Bind:
        """Create a worker's event; return the message that describes the run's memory and events to the worker."""
        placement, place = self._placement, self._semaphores + (1 + worker) * TIMELINE_NBYTES
        event = self.by_worker[worker] = placement.worker_event(worker, self._arena.memory, place, self._stream)
        config = AsyncConfig(
            completions=self._arena.end,
            timelines=self._semaphores,
            workers=self._workers,
            index=worker,
            acknowledge=placement.workers_acknowledge,
            wakeup=placement.wakeup.handle if placement.wakeup is not None else None,
        )
        if isinstance(event, WorkerCounterView):
            config = replace(
                config, counters=event.counters.handle, timelines=0, workers=MAX_COUNTERS, index=event.index
            )
        return replace(self._arena.bind, async_config=config)

    def release(self, worker: int) -> None:
        """Release the event of a worker that is lost, so that nothing waits for it any longer."""
        event = self.by_worker.pop(worker, None)
        if event is not None:
            event.release()


def _records_nbytes(rows: int) -> int:
    return aligned(rows * COMPLETION_SIZE * 8)
