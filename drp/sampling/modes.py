"""Modes: which indices are predicted in each round, and from which index each round starts.

A mode is a subclass of `Mode` with `width` and `rounds`; writing one takes a few lines (examples/own_mode.py). Counts
are for N steps and n drafts per round.
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

    base: the index up to which states are refined before the round. The run advances there from the previous round's
        base by ordinary steps, with the predictions that it has. After the last round it advances to the end.
    predict: the indices that are evaluated: `base` itself, at its state, or later ones, at drafts.
    unawaited_rounds: the number of immediately preceding rounds whose predictions this round does not use. Its drafts
        are sent once the predictions of all earlier rounds have arrived; with 0 it waits for the previous round, which
        is a barrier. What a draft is computed from is thus fixed before the run, and the samples do not depend on the
        order in which predictions arrive.
    previous_base: the index that the draft rule looks back on once the run has advanced to `base`; by default the
        previous round's base.
    """

    base: int
    predict: tuple[int, ...]
    unawaited_rounds: int = 0
    previous_base: int | None = None


Rounds = Generator[Round, Sequence[float], None]
"""Yields rounds in order. `yield` returns the residuals of the round for a mode with `feedback`, else nothing."""


class Mode(ABC):
    """A schedule of rounds.

    rule: how drafts are computed.
    feedback: after each round the mode receives the residuals of the predictions that the run could continue with, at
        base + 1, base + 2, ... up to the last predicted index: the norm of the refined state minus the input of the
        prediction, over the norm of the state, the maximum over the samples. Each of its rounds is planned when it is
        yielded, which takes some microseconds; the rounds of other modes are planned before the run.
    pipelined: the mode yields rounds with `unawaited_rounds`. It has no feedback.
    gaps: the mode may leave out indices except the last. Their estimates are interpolated. It has no feedback.
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
        """The maximum number of indices that a round predicts."""

    @abstractmethod
    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds that lead from index 0 to index N = `steps`."""

    def for_steps(self, steps: int, rounds_before: int = 0) -> Mode:
        """Return the mode that a run of `steps` steps takes: this one, unless its choices depend on the steps.

        `rounds_before`: rounds of one step each that precede, which count towards a target.
        """
        return self


@dataclass(frozen=True)
class Sequential(Mode):
    """The ordinary loop: N rounds of one evaluation."""

    rule: DraftRule = DAMPED

    @property
    def width(self) -> int:
        return 1

    def rounds(self, steps: int) -> Rounds:
        for k in range(steps):
            yield Round(k, (k,))


@dataclass(frozen=True)
class Wide(Mode):
    """A mode with n drafts per round."""

    n: int

    @property
    def width(self) -> int:
        return self.n


@dataclass(frozen=True)
class Aggressive(Wide):
    """n drafts per round; the last draft's own prediction starts the next round: 1 + ceil((N - 1) / n) rounds."""

    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        yield Round(0, (0,))
        for base in range(0, steps - 1, self.n):
            yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))


@dataclass(frozen=True)
class Window(Wide):
    """n drafts per round, after which the run advances by `stride` steps: 1 + ceil((N - 1) / stride) rounds.

    The predictions beyond are kept: the states refined with them are the next round's drafts there, and only the new
    end of the window is drafted by skip transitions. Each index is thus evaluated n / stride times, each time closer
    to its final state. Stride n is the aggressive mode, stride 1 is sequential. With a fractional stride, round j
    starts at floor(j stride).
    """

    stride: float
    rule: DraftRule = DAMPED

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.n:
            raise ValueError(f"stride is {self.stride:g}; a window of {self.n} drafts advances by 1 to {self.n} steps")

    def rounds(self, steps: int) -> Rounds:
        yield Round(0, (0,))
        for base in self.bases(steps):
            yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))

    def bases(self, steps: int) -> Iterator[int]:
        for j in itertools.count():
            base = math.floor(j * self.stride + 1e-9)
            if base >= steps - 1:
                return
            yield base


@dataclass(frozen=True)
class Sparse(Window):
    """A window whose n drafts lie at `offsets` from its base, with gaps, so that n drafts reach further.

    The data estimates of the indices between them are interpolated. With offsets 2, 4, ..., 2n and stride n, a run has
    as few rounds as in the aggressive mode, and every second index is evaluated twice, the second time close to its
    final state. Near the end, where the window reaches past the last index, the indices between are evaluated as well.
    """

    gaps: ClassVar[bool] = True
    offsets: tuple[int, ...] = ()
    rule: DraftRule = DAMPED

    @property
    def name(self) -> str:
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
        for base in range(0, steps, self.n + 1):
            yield Round(base, (base,))
            last = min(base + self.n, steps - 1)
            if last > base:
                yield Round(base, tuple(range(base + 1, last + 1)))


@dataclass(frozen=True)
class Adaptive(Wide):
    """n drafts per round; the run advances as long as the drafts were close to the refined states.

    The run advances to the last index before the residual first exceeds `tolerance`, but at least one step. Predictions
    beyond are kept: the states refined with them are the next round's drafts there. Tolerance 0 is sequential, infinity
    is aggressive: there are between 1 + ceil((N - 1) / n) and N rounds.
    """

    feedback: ClassVar[bool] = True
    tolerance: float
    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then windows of n drafts, each from the index that the run has advanced to."""
        yield Round(0, (0,))
        base = 0
        while base < steps - 1:
            residuals = yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))
            exceeding = (j for j, residual in enumerate(residuals) if not residual <= self.tolerance)
            base += max(1, next(exceeding, len(residuals)))


@dataclass(frozen=True)
class Rolling(Wide):
    """A window of n drafts without a barrier: the draft at k + n is sent as soon as the state at k is refined.

    The draft at k + n is computed from the state at k and the predictions up to k, so it does not wait for the n - 1
    drafts that are being evaluated. A late prediction delays only drafts at indices n or more beyond it. Every draft is
    n steps ahead, where those of the aggressive mode are 1 to n steps ahead, so its error is that of the last of those.

    The longest sequence of dependent evaluations is 1 + ceil((N - 1) / n), as in the aggressive mode. If evaluation
    times vary, a run takes as long as the slowest sequence of evaluations whose indices are at least n apart, whereas
    with the barrier of the aggressive mode the slowest evaluation of every block counts.
    """

    pipelined: ClassVar[bool] = True
    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        yield Round(0, (0,))
        for k in range(1, steps):
            base = max(0, k - self.n)
            yield Round(base, (k,), unawaited_rounds=k - 1 - base, previous_base=max(0, base - self.n))
