"""The completion records of a run's asynchronous batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from drp.protocol.timeline import COMPLETION_SIZE, PENDING, Stream


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
        self._stream.enqueue(_copy_records, self._records, rows, seen)
        return seen.copy


def _copy_records(records: memoryview, rows: Sequence[int], seen: list[list[int]]) -> None:
    for place, row in enumerate(rows):
        seen[place] = [records[row, number] for number in range(COMPLETION_SIZE)]
