"""Modes that change the rounds of another mode: sequential steps first, Picard sweeps, drafts sent one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from drp.sampling.drafts import DraftRule
from drp.sampling.modes import Mode, Round, Rounds


@dataclass(frozen=True)
class ModeWrapper(Mode):
    """A mode that changes the rounds of another mode."""

    mode: Mode

    @property
    def name(self) -> str:
        return self.mode.name

    @property
    def feedback(self) -> bool:  # type: ignore[override]  # it is that of the mode inside
        return self.mode.feedback

    @property
    def pipelined(self) -> bool:  # type: ignore[override]  # likewise
        return self.mode.pipelined

    @property
    def gaps(self) -> bool:  # type: ignore[override]  # likewise
        return self.mode.gaps

    @property
    def rule(self) -> DraftRule:  # type: ignore[override]  # likewise
        return self.mode.rule

    @property
    def width(self) -> int:
        return self.mode.width

    def for_steps(self, steps: int, rounds_before: int = 0) -> Mode:
        return replace(self, mode=self.mode.for_steps(steps, rounds_before))


@dataclass(frozen=True)
class Warmup(ModeWrapper):
    """Takes the first `steps` steps sequentially, and the others in `mode`."""

    steps: int

    def for_steps(self, steps: int, rounds_before: int = 0) -> Mode:
        """Return this wrapper of what `mode` takes for the steps that remain."""
        if self.steps >= steps:
            return self
        return replace(self, mode=self.mode.for_steps(steps - self.steps, rounds_before + self.steps))

    def rounds(self, steps: int) -> Rounds:
        first = min(self.steps, steps)
        for k in range(first):
            yield Round(k, (k,))
        if steps > first:
            yield from _pass_on(self.mode.rounds(steps - first), first, 1)


@dataclass(frozen=True)
class PicardSweeps(ModeWrapper):
    """Evaluates each block of `mode`'s drafts `extra` more times, at the states refined with the last predictions.

    A Picard iteration: with n - 1 extra sweeps a block of n drafts equals the sequential steps.
    """

    extra: int

    def rounds(self, steps: int) -> Rounds:
        if self.mode.pipelined:
            raise ValueError(f"{self.mode} has no blocks to sweep; leave out sweeps, or sweep a mode with a barrier")
        yield from _pass_on(self.mode.rounds(steps), 0, 1 + self.extra)


@dataclass(frozen=True)
class EagerRounds(ModeWrapper):
    """Divides the rounds of `mode`, so that each draft is sent as soon as the predictions that it depends on are there.

    A draft at an index that was predicted before is the state refined with the predictions below that index: in the
    second sweep of a block, the first draft depends on one prediction, and the last on n. Drafts that depend on the
    same predictions are sent together. The samples are those of `mode`.

    If every draft depends on all predictions, as in the aggressive and the conservative mode, nothing changes. With s
    sweeps of n drafts, a run takes as long as the slowest sequence of evaluations, one per sweep, whose indices rise
    within a block. A mode with feedback knows its next round only after the last one, so its rounds are not divided.
    """

    @property
    def pipelined(self) -> bool:  # type: ignore[override]  # by what it does
        """Whether rounds can be divided."""
        return not self.mode.feedback

    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds of `mode`, divided by the predictions that their drafts depend on."""
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
    """Yield another mode's rounds, shifted, and those with drafts `times` times; pass on the residuals."""
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
