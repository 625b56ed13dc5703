"""The schedule of a run: a mode's rounds and the predictions they wait for, without computing any tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from drp.sampling.modes import Mode, Round
from drp.sampling.plan import PlanProgress


@dataclass(eq=False)
class ScheduledDraft:
    """A draft that a run has scheduled."""

    step: int
    distance: int
    """Steps from the state from which the draft was computed."""
    width: int = 1
    """The number of drafts of its round."""


class Schedule:
    """Schedules drafts by the rounds that a mode yields.

    staleness: stands for the network in a mode with feedback: the residual of a draft at distance j from the state from
        which it was computed is assumed to be `staleness` j^2.

    `depth` is the length of the longest sequence of rounds that waited for each other.
    """

    def __init__(self, mode: Mode, steps: int, staleness: float) -> None:
        self._mode, self._steps, self._staleness = mode, steps, staleness
        self._rounds = mode.rounds(steps)
        self._next: Round | None = next(self._rounds, None)
        self._known = True  # whether _next is the next round, which with feedback depends on residuals
        self._progress = PlanProgress()
        self._in_flight: deque[tuple[set[ScheduledDraft], int]] = deque()
        self._distance: dict[int, int] = {}
        self.depth = 0
        self.states = 0
        """The number of states that the last `form` has made final."""

    @property
    def base(self) -> int:
        return self._progress.base

    @property
    def ready(self) -> bool:
        """Whether there are drafts to schedule, or the run is finished."""
        unawaited = self._next.unawaited_rounds if self._known and self._next is not None else 0
        used = len(self._in_flight) - unawaited
        return not any(missing for missing, _ in (self._in_flight[i] for i in range(used)))

    def arrive(self, draft: ScheduledDraft) -> None:
        for missing, _ in self._in_flight:
            missing.discard(draft)
        self._distance[draft.step] = draft.distance

    def schedule_drafts(self) -> list[ScheduledDraft] | None:
        """Return the next drafts; None if the run is over."""
        drafts: list[ScheduledDraft] = []
        before = self._progress.base
        while self.ready:
            r = self._next_round()
            if r is None:
                self.depth = max([self.depth, *(depth for _, depth in self._in_flight)])
                self._progress.end(self._mode, self._steps)
                self.states = self._steps - self._progress.base
                return None
            self._progress.begin(r, self._mode, self._steps)
            while len(self._in_flight) > r.unawaited_rounds:
                self.depth = max(self.depth, self._in_flight.popleft()[1])
            self._progress.base = r.base
            made = [ScheduledDraft(k, k - r.base, len(r.predict)) for k in r.predict]
            self._progress.in_flight.append(r)
            self._in_flight.append((set(made), self.depth + 1))
            drafts += made
            if self._mode.feedback:
                self._known = False
            else:
                self._next = next(self._rounds, None)
        self.states = self._progress.base - before
        return drafts

    def _next_round(self) -> Round | None:
        """Return the next round, after sending the last residuals to a mode with feedback."""
        if not self._known:
            self._progress.receive(0)
            ahead = range(self._progress.base + 1, self._progress.last + 1)
            residuals = [self._staleness * self._distance[k] ** 2 for k in ahead]
            try:
                self._next = self._rounds.send(residuals)
            except StopIteration:
                self._next = None
            self._known = True
        return self._next
