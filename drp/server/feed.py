"""Feed: the leader's marks, kept by run until the server has told them to the clients that want them."""

from __future__ import annotations

from collections import deque
from typing import Final

from drp.leader.timeline import Mark
from drp.protocol.door import Evaluation

MOST_RUNS: Final = 1024


class Feed(list[Mark]):
    """A timeline that keeps of each run when which worker evaluated what. The leader's thread appends to it."""

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[int, int] = {}
        self._evaluations: dict[int, deque[Evaluation]] = {}

    def append(self, mark: Mark) -> None:
        """Take a mark."""
        if mark.what == "begin":
            if len(self._began) == MOST_RUNS:  # of somebody who shares the leader, and tells nobody when they end
                self.forget(next(iter(self._began)))
            self._evaluations[mark.run] = deque()
            self._began[mark.run] = mark.ns
        elif mark.what == "answer" and mark.run in self._began:
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
