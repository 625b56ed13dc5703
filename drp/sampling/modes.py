"""Modes: which indices are predicted together, and from where each round goes on.

A mode is a subclass of `Mode` with `width` and `rounds`; writing one takes a few lines (examples/own_mode.py). Counts
are for N steps and n drafts a round.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from drp.sampling.drafts import DAMPED, DraftRule


@dataclass(frozen=True)
class Round:
    """Evaluations that are made at the same time.

    `base` is how far the state is refined before: the run first advances there from the base of the round before, by
    ordinary steps through the predictions there are. `predict` are the indices evaluated: `base` itself, at its state,
    or later ones, at drafts. After the last round the run advances to the end.

    `behind` is how many of the rounds just before it a round does not use: it goes out as soon as the predictions of
    all earlier ones are in. At 0 it waits for the last round, a barrier. What a draft is made of is so written down
    before the run, and the samples do not depend on the order in which predictions arrive. `previous_base` is the index
    that the draft rule looks back on once the run has advanced to `base`; None: the base that it advanced from.
    """

    base: int
    predict: tuple[int, ...]
    unawaited_rounds: int = 0
    previous_base: int | None = None


Rounds = Generator[Round, Sequence[float], None]
"""Rounds in order. What `yield` returns is empty, or, for a mode with `feedback`, the residuals of that round."""


class Mode(ABC):
    """A schedule of rounds.

    `rule` says how drafts are made. A mode with `feedback` learns after each round how stale the predictions are that
    the run could go on through: at base + 1, base + 2, ... up to the last predicted, the norm of the refined state less
    the input of the prediction over the norm of the state, the largest among the samples. Its rounds are then planned
    as they come, which costs some microseconds each; those of others before the run. A mode that `lags` yields rounds
    that leave others behind; it has no feedback. One with `gaps` may leave indices out, the last one excepted: their
    estimates are interpolated. It has no feedback either.
    """

    feedback: ClassVar[bool] = False
    pipelined: ClassVar[bool] = False
    gaps: ClassVar[bool] = False
    rule: DraftRule = DAMPED

    @property
    def name(self) -> str:
        """The name by which a caller selects the mode, as results and reports state it."""
        return type(self).__name__.lower()

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

    rule: DraftRule = DAMPED

    @property
    def width(self) -> int:
        """One."""
        return 1

    def rounds(self, steps: int) -> Rounds:
        """Yield one round a step."""
        for k in range(steps):
            yield Round(k, (k,))


@dataclass(frozen=True)
class Wide(Mode):
    """A mode that has n drafts out at the same time."""

    n: int

    @property
    def width(self) -> int:
        """The drafts, n."""
        return self.n


@dataclass(frozen=True)
class Aggressive(Wide):
    """n drafts a round, the last draft's own prediction starting the next: 1 + ceil((N - 1) / n) rounds."""

    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then blocks of n steps."""
        yield Round(0, (0,))
        for base in range(0, steps - 1, self.n):
            yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))


@dataclass(frozen=True)
class Window(Wide):
    """n drafts a round, of which `stride` are passed: 1 + ceil((N - 1) / stride) rounds.

    Predictions beyond are kept: the states refined through them are the next drafts there, and skip transitions fill
    only the window's new end. So each index is evaluated n / stride times, each time nearer to its final state, and no
    round starts from a prediction that is stale itself. Stride n is aggressive, stride 1 sequential. A stride between
    two whole numbers is kept in the mean: the base of round j is floor(j stride).
    """

    stride: float
    rule: DraftRule = DAMPED

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.n:
            raise ValueError(f"stride is {self.stride:g}; a window of {self.n} drafts moves on by 1 to {self.n} steps")

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then a window that moves on by the stride."""
        yield Round(0, (0,))
        for base in self.bases(steps):
            yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))

    def bases(self, steps: int) -> Iterator[int]:
        """Yield the index that each round starts from."""
        for j in itertools.count():
            base = math.floor(j * self.stride + 1e-9)
            if base >= steps - 1:
                return
            yield base


@dataclass(frozen=True)
class Sparse(Window):
    """A window whose n drafts lie at `offsets` from its base, with gaps: n devices see further.

    The estimates of the data at indices between are interpolated. With offsets 2, 4, ..., 2n and a stride of n a run
    has as few rounds as in the aggressive mode, and each second index is evaluated twice, the second time near its
    final state. Near the end, where fewer indices are left than the window reaches, all that fit in are evaluated.
    """

    gaps: ClassVar[bool] = True
    offsets: tuple[int, ...] = ()
    rule: DraftRule = DAMPED

    @property
    def name(self) -> str:
        """`window`: offsets are an option of that mode."""
        return "window"

    def __post_init__(self) -> None:
        offsets = self.offsets
        if not (len(offsets) == self.n and offsets[0] >= 1 and list(offsets) == sorted(set(offsets))):
            raise ValueError(f"offsets are {offsets}; give as many rising whole numbers from 1 as drafts, {self.n}")
        if not 1 <= self.stride <= offsets[-1]:
            raise ValueError(f"stride is {self.stride:g}; drafts up to {offsets[-1]} ahead allow 1 to {offsets[-1]}")

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then drafts at the offsets; near the end, at the indices between them too."""
        yield Round(0, (0,))
        for base in self.bases(steps):
            yield Round(base, self._drafts(base, steps - 1))

    def _drafts(self, base: int, last: int) -> tuple[int, ...]:
        wanted = {base + offset for offset in self.offsets if base + offset <= last}
        if base + self.offsets[-1] >= last:
            wanted.add(last)
        for k in range(last, base, -1):  # What is beyond the end goes to the indices left out, the last first.
            if len(wanted) >= self.n:
                break
            wanted.add(k)
        return tuple(sorted(wanted))


@dataclass(frozen=True)
class Conservative(Wide):
    """n drafts, then a lone evaluation at the refined state: n + 1 steps every two rounds.

    2 floor(N / (n + 1)) + min(2, N mod (n + 1)) rounds.
    """

    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        """Yield a lone evaluation and a block of drafts in turn."""
        for base in range(0, steps, self.n + 1):
            yield Round(base, (base,))
            last = min(base + self.n, steps - 1)
            if last > base:
                yield Round(base, tuple(range(base + 1, last + 1)))


@dataclass(frozen=True)
class Adaptive(Wide):
    """n drafts a round, of which as many are passed as were taken close enough to the state they stand for.

    The run advances to the last index before the residual first exceeds `tolerance`, by one step at least. Predictions
    beyond are kept: the next drafts there are the states refined through them. Tolerance 0 is sequential, infinity is
    aggressive: from 1 + ceil((N - 1) / n) to N rounds.
    """

    feedback: ClassVar[bool] = True
    tolerance: float
    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then a window of n drafts that moves on by what was passed."""
        yield Round(0, (0,))
        base = 0
        while base < steps - 1:
            residuals = yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))
            exceeding = (j for j, residual in enumerate(residuals) if not residual <= self.tolerance)
            base += max(1, next(exceeding, len(residuals)))


@dataclass(frozen=True)
class Rolling(Wide):
    """A window of n drafts without a barrier: as soon as the state at k is refined, the draft n ahead of it goes out.

    The draft at k + n is made of the state at k and the predictions up to k. It needs no other of the n - 1 that are
    being evaluated meanwhile, so a device that answers is given work at once. A late prediction holds up the drafts n
    and more behind it, not the next round. Every draft is n ahead, where the aggressive mode's are 1 to n: its error is
    that of the furthest of those.

    The longest way through it is 1 + ceil((N - 1) / n) evaluations, as in the aggressive mode. With times that vary the
    run takes as long as the slowest sequence of evaluations whose indices lie at least n apart; the aggressive mode's
    barrier lets a sequence take the slowest of every block.
    """

    pipelined: ClassVar[bool] = True
    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then a round for each draft."""
        yield Round(0, (0,))
        for k in range(1, steps):
            base = max(0, k - self.n)
            yield Round(base, (k,), unawaited_rounds=k - 1 - base, previous_base=max(0, base - self.n))
