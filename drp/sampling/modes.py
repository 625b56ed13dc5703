"""Modes: which indices are predicted together, and how far each round advances.

A mode is any object with `width` and `rounds`; the three here are those of the paper (DRiffusion, arXiv 2603.25872)
and the sequential loop. Counts are for N steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

MODE_NAMES = ("sequential", "conservative", "aggressive")


@dataclass(frozen=True)
class Round:
    """Evaluations that are made at the same time, and what follows from them.

    `predict` are the indices evaluated: `base` itself, at its state, or later ones, at drafts made from the state and
    the prediction at `base`. With the predictions in, the state is refined from `base` to `advance`, which is the next
    round's base.
    """

    base: int
    predict: tuple[int, ...]
    advance: int


class Mode(Protocol):
    """A schedule of rounds."""

    @property
    def width(self) -> int:
        """The most indices that one round predicts."""
        ...

    def rounds(self, steps: int) -> Iterator[Round]:
        """Yield the rounds that lead from index 0 to index N = `steps`."""
        ...


@dataclass(frozen=True)
class Sequential:
    """The ordinary loop: N rounds of one evaluation."""

    @property
    def width(self) -> int:
        """One."""
        return 1

    def rounds(self, steps: int) -> Iterator[Round]:
        """Yield one round a step."""
        for k in range(steps):
            yield Round(k, (k,), k + 1)


@dataclass(frozen=True)
class Aggressive:
    """n drafts a round, the last draft's own prediction starting the next: 1 + ceil((N - 1) / n) rounds."""

    n: int

    @property
    def width(self) -> int:
        """The drafts a round, n."""
        return self.n

    def rounds(self, steps: int) -> Iterator[Round]:
        """Yield the first evaluation, then blocks of n steps."""
        yield Round(0, (0,), 0 if steps > 1 else 1)
        base = 0
        while base < steps - 1:
            last = min(base + self.n, steps - 1)
            advance = steps if last == steps - 1 else last
            yield Round(base, tuple(range(base + 1, last + 1)), advance)
            base = last


@dataclass(frozen=True)
class Conservative:
    """n drafts, then a lone evaluation at the refined state: n + 1 steps every two rounds.

    2 floor(N / (n + 1)) + min(2, N mod (n + 1)) rounds.
    """

    n: int

    @property
    def width(self) -> int:
        """The drafts a round, n."""
        return self.n

    def rounds(self, steps: int) -> Iterator[Round]:
        """Yield a lone evaluation and a block of drafts in turn."""
        base = 0
        while base < steps:
            last = min(base + self.n, steps - 1)
            if last == base:
                yield Round(base, (base,), steps)
            else:
                yield Round(base, (base,), base)
                yield Round(base, tuple(range(base + 1, last + 1)), last + 1)
            base = last + 1


def make_mode(name: str, n: int) -> Mode:
    """Return the mode called `name` with `n` drafts a round; raise ValueError for a name or n that is none."""
    if n < 1:
        raise ValueError(f"drafts is {n}; a round needs at least 1 draft")
    if name == "sequential":
        return Sequential()
    if name == "conservative":
        return Conservative(n)
    if name == "aggressive":
        return Aggressive(n)
    raise ValueError(f"unknown mode {name!r}; choose one of {', '.join(MODE_NAMES)}")
