"""Batches that workers have, and the completion records of those that were dispatched asynchronously."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drp.protocol.timeline import COMPLETION_SIZE, PENDING, Stream, decode_status, encode_status
from drp.sampling.run import Task

if TYPE_CHECKING:
    from drp.leader.runs.run_state import RunState


@dataclass(eq=False)
class InFlightBatch:
    """Drafts of one run that were sent to a worker as one batch.

    run: the run.
    tasks: the drafts.
    rows: for each draft, the row of the run's predictions to which the worker writes.
    sequence: the sequence number of an asynchronous batch, 0 for a synchronous one.
    completion_pending: whether an asynchronous batch is queued and its completion record was not read yet. The worker
        has the batch until then.
    """

    run: RunState
    tasks: tuple[Task, ...]
    rows: tuple[int, ...]
    sequence: int = 0
    completion_pending: bool = False


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
        words = [record[0] for record in self.read()]
        if PENDING in words:
            return PENDING
        found = [decode_status(word, self.batch.sequence) for word in words]
        known = [status for status in found if status is not None]
        return max(known) if len(known) == len(found) else None

    @property
    def seconds(self) -> float:
        """The evaluation's time in seconds, 0 if unknown."""
        return sum(record[1] for record in self.read()) / 1e9

    @property
    def ended_at(self) -> float:
        """When the evaluation ended, in seconds of perf_counter, 0 if unknown."""
        return max(record[2] for record in self.read()) / 1e9

    def failed_index(self, status: int) -> int:
        """Return the index of the first draft of the batch whose record has this status."""
        words = [record[0] for record in self.read()]
        return self.batch.tasks[words.index(encode_status(self.batch.sequence, status))].index


class CompletionRecords:
    """The completion records in an asynchronous run's memory, int64 [rows, COMPLETION_SIZE], which workers write."""

    def __init__(self, records: Tensor, stream: Stream) -> None:
        self._records: Tensor | memoryview = records if records.is_cuda else records.numpy().data
        self._stream = stream

    def read(self, rows: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Queue the reading of the records of these rows; return a function that returns what was read so far."""
        if isinstance(self._records, Tensor):
            pinned = torch.full((len(rows), COMPLETION_SIZE), PENDING, dtype=torch.int64, pin_memory=True)
            for place, row in zip(pinned, rows, strict=True):
                self._stream.enqueue(partial(place.copy_, self._records[row], non_blocking=True))
            return pinned.tolist
        seen = [[PENDING] * COMPLETION_SIZE for _ in rows]
        self._stream.enqueue(partial(_copy_records, self._records, rows, seen))
        return lambda: seen


def _copy_records(records: memoryview, rows: Sequence[int], seen: list[list[int]]) -> None:
    for place, row in enumerate(rows):
        seen[place] = [records[row, number] for number in range(COMPLETION_SIZE)]
