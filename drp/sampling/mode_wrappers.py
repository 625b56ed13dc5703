"""Modes that change the rounds of another mode: sequential steps first, Picard sweeps, drafts sent one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drp.sampling.drafts import DraftRule
from drp.sampling.modes import Mode, Round, Rounds


@dataclass(frozen=True)
class ModeWrapper(Mode):
    """A mode that does something to the rounds of another."""

    mode: Mode

    @property
    def name(self) -> str:
        """That of `mode`."""
        return self.mode.name

    @property
    def feedback(self) -> bool:  # type: ignore[override]  # it is that of the mode inside
        """Whether `mode` has it."""
        return self.mode.feedback

    @property
    def pipelined(self) -> bool:  # type: ignore[override]  # likewise
        """Whether `mode` does."""
        return self.mode.pipelined

    @property
    def gaps(self) -> bool:  # type: ignore[override]  # likewise
        """Whether `mode` leaves indices out."""
        return self.mode.gaps

    @property
    def rule(self) -> DraftRule:  # type: ignore[override]  # likewise
        """That of `mode`."""
        return self.mode.rule

    @property
    def width(self) -> int:
        """That of `mode`."""
        return self.mode.width


@dataclass(frozen=True)
class Warmup(ModeWrapper):
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
class PicardSweeps(ModeWrapper):
    """Each block of `mode`'s drafts evaluated `extra` times more, each time at the states refined through the last.

    A Picard iteration: with n - 1 extra sweeps a block of n drafts equals the sequential steps.
    """

    extra: int

    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds of `mode`, each with drafts 1 + `extra` times."""
        if self.mode.pipelined:
            raise ValueError(f"{self.mode} has no blocks to sweep; leave out sweeps, or sweep a mode with a barrier")
        yield from _pass_on(self.mode.rounds(steps), 0, 1 + self.extra)


@dataclass(frozen=True)
class Eager(ModeWrapper):
    """The rounds of `mode`, each draft going out as soon as what it is made of is there.

    A draft at an index that has been predicted before is the state refined through the predictions below that index: in
    the second sweep of a block, the first draft needs one prediction, the last needs n. Drafts that need the same go
    out together. The samples are those of `mode`.

    Where every draft is made of all predictions, as in the aggressive and the conservative mode, nothing changes. A
    sweep takes as long as its slowest device only if that has the last draft; with s sweeps of n, a run takes as long
    as the slowest sequence of evaluations, one a sweep, whose indices rise within a block. Rounds of a mode with
    feedback are known only when all of the last are in: they stay as they are.
    """

    @property
    def pipelined(self) -> bool:  # type: ignore[override]  # by what it does
        """Whether there can be drafts that need less than all."""
        return not self.mode.feedback

    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds of `mode`, divided by what drafts need."""
        if self.mode.feedback or self.mode.pipelined:
            yield from self.mode.rounds(steps)
            return
        before: list[tuple[int, ...]] = []  # the round before, as divided
        for r in self.mode.rounds(steps):
            needs = [sum(part[0] < k for part in before) for k in r.predict]
            parts = [[k for k, need in zip(r.predict, needs, strict=True) if need == n] for n in sorted(set(needs))]
            for i, part in enumerate(parts):
                unused = len(before) - needs[r.predict.index(part[0])]
                yield Round(r.base, tuple(part), unawaited_rounds=unused + i, previous_base=r.previous_base)
            before = [tuple(part) for part in parts]


def _pass_on(rounds: Rounds, moved: int, times: int) -> Rounds:
    """Yield another mode's rounds, moved by some indices, drafts several times; hand it the last residuals."""
    residuals: Sequence[float] | None = None
    while True:
        try:
            r = next(rounds) if residuals is None else rounds.send(residuals)
        except StopIteration:
            return
        previous_base = None if r.previous_base is None else r.previous_base + moved
        for _ in range(times if r.predict[0] > r.base else 1):
            residuals = yield Round(
                r.base + moved, tuple(k + moved for k in r.predict), r.unawaited_rounds, previous_base
            )
