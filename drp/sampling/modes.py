"""Modes: which indices are predicted together, and from where each round goes on.

A mode is a subclass of `Mode` with `width` and `rounds`; writing one takes a few lines (examples/own_mode.py). Counts
are for N steps and n drafts a round.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from drp.sampling.drafts import SECANT, DraftRule

MODE_NAMES = ("sequential", "conservative", "aggressive", "adaptive")


@dataclass(frozen=True)
class Round:
    """Evaluations that are made at the same time.

    `base` is how far the state is refined before: the run first advances there from the base of the round before, by
    ordinary steps through the predictions there are. `predict` are the indices evaluated: `base` itself, at its state,
    or later ones, at drafts. After the last round the run advances to the end.
    """

    base: int
    predict: tuple[int, ...]


Rounds = Generator[Round, Sequence[float], None]
"""Rounds in order. What `yield` returns is empty, or, for a mode with `feedback`, the residuals of that round."""


class Mode(ABC):
    """A schedule of rounds.

    `rule` says how drafts are made. A mode with `feedback` learns after each round how stale the predictions are that
    the run could go on through: at base + 1, base + 2, ... up to the last predicted, the norm of the refined state less
    the input of the prediction over the norm of the state, the largest among the samples. Its rounds are then planned
    as they come, which costs some microseconds each; those of others before the run.
    """

    feedback: ClassVar[bool] = False
    rule: DraftRule = SECANT

    @property
    @abstractmethod
    def width(self) -> int:
        """The most indices that one round predicts."""

    @abstractmethod
    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds that lead from index 0 to index N = `steps`."""


@dataclass(frozen=True)
class Sequential(Mode):
    """The ordinary loop: N rounds of one evaluation."""

    rule: DraftRule = SECANT

    @property
    def width(self) -> int:
        """One."""
        return 1

    def rounds(self, steps: int) -> Rounds:
        """Yield one round a step."""
        for k in range(steps):
            yield Round(k, (k,))


@dataclass(frozen=True)
class Aggressive(Mode):
    """n drafts a round, the last draft's own prediction starting the next: 1 + ceil((N - 1) / n) rounds."""

    n: int
    rule: DraftRule = SECANT

    @property
    def width(self) -> int:
        """The drafts a round, n."""
        return self.n

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then blocks of n steps."""
        yield Round(0, (0,))
        for base in range(0, steps - 1, self.n):
            yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))


@dataclass(frozen=True)
class Conservative(Mode):
    """n drafts, then a lone evaluation at the refined state: n + 1 steps every two rounds.

    2 floor(N / (n + 1)) + min(2, N mod (n + 1)) rounds.
    """

    n: int
    rule: DraftRule = SECANT

    @property
    def width(self) -> int:
        """The drafts a round, n."""
        return self.n

    def rounds(self, steps: int) -> Rounds:
        """Yield a lone evaluation and a block of drafts in turn."""
        for base in range(0, steps, self.n + 1):
            yield Round(base, (base,))
            last = min(base + self.n, steps - 1)
            if last > base:
                yield Round(base, tuple(range(base + 1, last + 1)))


@dataclass(frozen=True)
class Adaptive(Mode):
    """n drafts a round, of which as many are passed as were taken close enough to the state they stand for.

    The run advances to the last index before the residual first exceeds `tolerance`, by one step at least. Predictions
    beyond are kept: the next drafts there are the states refined through them. Tolerance 0 is sequential, infinity is
    aggressive: from 1 + ceil((N - 1) / n) to N rounds.
    """

    feedback: ClassVar[bool] = True
    n: int
    tolerance: float
    rule: DraftRule = SECANT

    @property
    def width(self) -> int:
        """The drafts a round, n."""
        return self.n

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then a window of n drafts that moves on by what was passed."""
        yield Round(0, (0,))
        base = 0
        while base < steps - 1:
            residuals = yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))
            exceeding = (j for j, residual in enumerate(residuals) if not residual <= self.tolerance)
            base += max(1, next(exceeding, len(residuals)))


@dataclass(frozen=True)
class Around(Mode):
    """A mode that does something to the rounds of another."""

    mode: Mode

    @property
    def feedback(self) -> bool:  # type: ignore[override]  # it is that of the mode inside
        """Whether `mode` has it."""
        return self.mode.feedback

    @property
    def rule(self) -> DraftRule:  # type: ignore[override]  # likewise
        """That of `mode`."""
        return self.mode.rule

    @property
    def width(self) -> int:
        """That of `mode`."""
        return self.mode.width


@dataclass(frozen=True)
class Warmup(Around):
    """The first `steps` steps sequentially, the others as `mode` has it."""

    steps: int

    def rounds(self, steps: int) -> Rounds:
        """Yield a round a step, then those of `mode`, moved."""
        first = min(self.steps, steps)
        for k in range(first):
            yield Round(k, (k,))
        if steps > first:
            yield from _pass_on(self.mode.rounds(steps - first), first, 1)


@dataclass(frozen=True)
class Sweeps(Around):
    """Each block of `mode`'s drafts evaluated `extra` times more, each time at the states refined through the last.

    A Picard iteration: with n - 1 extra sweeps a block of n drafts equals the sequential steps.
    """

    extra: int

    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds of `mode`, each with drafts 1 + `extra` times."""
        yield from _pass_on(self.mode.rounds(steps), 0, 1 + self.extra)


def _pass_on(rounds: Rounds, moved: int, times: int) -> Rounds:
    """Yield another mode's rounds, moved by some indices, drafts several times; hand it the last residuals."""
    residuals: Sequence[float] | None = None
    while True:
        try:
            r = next(rounds) if residuals is None else rounds.send(residuals)
        except StopIteration:
            return
        for _ in range(times if r.predict[0] > r.base else 1):
            residuals = yield Round(r.base + moved, tuple(k + moved for k in r.predict))


def make_mode(name: str, n: int, tolerance: float, rule: DraftRule) -> Mode:
    """Return the mode called `name` with `n` drafts a round; raise ValueError for what is none.

    `tolerance` is adaptive's.
    """
    if n < 1:
        raise ValueError(f"drafts is {n}; a round needs at least 1 draft")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give a relative residual from 0 to infinity, such as 0.01")
    match name:
        case "sequential":
            return Sequential(rule)
        case "conservative":
            return Conservative(n, rule)
        case "aggressive":
            return Aggressive(n, rule)
        case "adaptive":
            return Adaptive(n, tolerance, rule)
    raise ValueError(f"unknown mode {name!r}; choose one of {', '.join(MODE_NAMES)}")


def rounds_of(name: str, steps: int, n: int) -> int:
    """Return how many rounds `steps` steps take in a mode whose rounds are known before the run."""
    match name:
        case "sequential":
            return steps
        case "aggressive":
            return 1 + math.ceil((steps - 1) / n)
        case "conservative":
            return 2 * (steps // (n + 1)) + min(2, steps % (n + 1))
    raise ValueError(f"the rounds of mode {name!r} are not known before the run")
