"""A buffer of evaluations by run, for the clients that asked for them."""

from __future__ import annotations

from collections import deque
from typing import Final

from drp.leader.events import TraceEvent
from drp.protocol.client_messages import Evaluation

MAX_RUNS: Final = 1024


class EvaluationBuffer(list[TraceEvent]):
    """A timeline that keeps of each run when which worker evaluated what. The leader's thread appends to it."""

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[int, int] = {}
        self._evaluations: dict[int, deque[Evaluation]] = {}

    def append(self, mark: TraceEvent) -> None:
        """Take a mark."""
        if mark.kind == "begin":
            if len(self._began) == MAX_RUNS:  # of somebody who shares the leader, and tells nobody when they end
                self.forget(next(iter(self._began)))
            self._evaluations[mark.run] = deque()
            self._began[mark.run] = mark.ns
        elif mark.kind == "answer" and mark.run in self._began:
            zero = self._began[mark.run] / 1e9
            _, began, _, ended = mark.times
            self._evaluations[mark.run].append(Evaluation(mark.step, mark.worker, began - zero, ended - zero))

    def take(self, run: int, most: int) -> tuple[Evaluation, ...]:
        """Return a run's evaluations that were not taken yet, at most so many."""
        found = self._evaluations.get(run)
        return tuple(found.popleft() for _ in range(min(most, len(found)))) if found else ()

    def forget(self, run: int) -> None:
        """Let go of a run."""
        self._began.pop(run, None)
        self._evaluations.pop(run, None)
