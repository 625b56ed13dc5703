"""A buffer of evaluations by run, for clients that requested them."""

from __future__ import annotations

from collections import deque
from typing import Final

from drp.leader.events import TraceEvent
from drp.protocol.client_messages import Evaluation

MAX_RUNS: Final = 1024


class EvaluationBuffer(list[TraceEvent]):
    """A timeline that keeps each run's evaluations: step, worker and times. The leader's thread appends to it."""

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[int, int] = {}
        self._evaluations: dict[int, deque[Evaluation]] = {}

    def append(self, mark: TraceEvent) -> None:
        if mark.kind == "begin":
            if len(self._began) == MAX_RUNS:  # Runs of other users of the leader are never discarded explicitly.
                self.discard(next(iter(self._began)))
            self._evaluations[mark.run] = deque()
            self._began[mark.run] = mark.ns
        elif mark.kind == "predicted" and mark.run in self._began:
            zero = self._began[mark.run] / 1e9
            _, began, _, ended = mark.times
            self._evaluations[mark.run].append(Evaluation(mark.step, mark.worker, began - zero, ended - zero))

    def pop_evaluations(self, run: int, max_count: int) -> tuple[Evaluation, ...]:
        """Return and remove a run's evaluations, at most `max_count` of them."""
        found = self._evaluations.get(run)
        return tuple(found.popleft() for _ in range(min(max_count, len(found)))) if found else ()

    def discard(self, run: int) -> None:
        self._began.pop(run, None)
        self._evaluations.pop(run, None)
