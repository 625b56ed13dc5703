"""The checkpoints to which an asynchronous run returns when predictions that it has used are lost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from drp.sampling.checkpoint import Checkpoint
from drp.sampling.run import Run, Task


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint at the start of a round, to which a run can return once `needs` batches are verified.

    `out` are the batches whose predictions were outstanding at the checkpoint.
    """

    checkpoint: Checkpoint
    needs: int
    out: tuple[tuple[Task, ...], ...]


class RunCheckpoints:
    """At most two checkpoints: the one to return to, and the next, whose batches are not all verified."""

    def __init__(self) -> None:
        self._kept: deque[RunCheckpoint] = deque()

    @property
    def has_room(self) -> bool:
        return len(self._kept) < 2

    def add(self, checkpoint: RunCheckpoint) -> None:
        self._kept.append(checkpoint)

    def on_verified(self, run: Run, verified: int) -> None:
        """Drop the first checkpoint once the run can return to the second, since `verified` batches are verified."""
        while len(self._kept) > 1 and self._kept[1].needs <= verified:
            dropped = self._kept.popleft()
            if dropped.checkpoint.kept:
                run.drop(dropped.checkpoint)

    def return_to_last(self, verified: int) -> RunCheckpoint | None:
        """Return the last usable checkpoint, which is the only one kept from now on; None if there is none."""
        usable = [each for each in self._kept if each.checkpoint.kept and each.needs <= verified]
        self._kept = deque(usable[-1:])
        return usable[-1] if usable else None
