"""Modes by name, their defaults, and the window for a target speed-up or number of rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drp.sampling.drafts import DAMPED, PAPER, STEADY, STEADY_WIDE, DraftRule, find_rule
from drp.sampling.modes import (
    Adaptive,
    Aggressive,
    Conservative,
    Mode,
    Rolling,
    Rounds,
    Sequential,
    Sparse,
    Wide,
    Window,
)

DEFAULT_TOLERANCE = 0.0025
"""Of mode adaptive, a relative residual."""
MODE_NAMES = ("sequential", "conservative", "aggressive", "window", "adaptive", "rolling")
PATTERNS: Mapping[str, Callable[[int], tuple[int, ...]]] = {
    "dense": lambda n: tuple(range(1, n + 1)),
    "even": lambda n: tuple(range(2, 2 * n + 1, 2)),
    "tapered": lambda n: tuple(j if j <= n // 2 else 2 * j - n // 2 for j in range(1, n + 1)),
}
"""Offsets of n drafts by name: all indices; every second one; all in the nearer half, every second one beyond."""

MIN_SPACED_DRAFTS = 4
"""Drafts a round below which a gap costs more than it gains: with two, three times the error."""
MAX_STEADY_DRAFTS = 4
"""Drafts a round beyond which a window under a solver that adds noise carries more of the data estimate."""
LEAST_STEPS_A_SPACED_DRAFT = 6
"""Steps per draft of a round below which offsets with gaps reach too far ahead to gain."""


def spaced_offsets(n: int) -> tuple[int, ...]:
    """Return n offsets of which the last n // 4 are two apart: 1, 2, 3, 5 for n = 4, 1 to 6, 8 and 10 for n = 8."""
    dense = n - n // 4
    return (*range(1, dense + 1), *range(dense + 2, dense + 2 * (n // 4) + 1, 2))


def default_stride(n: int, adds_noise: bool = False) -> float:
    """Return the default stride of a window of n drafts, n / 2 + 1: 2, 3 and 5 for n = 2, 4 and 8.

    With a larger stride, the run advances past drafts that were evaluated only once early on, where that costs most;
    with a smaller one, rounds are spent on errors that are small already. Solvers that add noise have larger errors,
    and from 3 drafts on the stride of the paper's conservative mode, (n + 1) / 2 (docs/quality.md).
    """
    return (n + 1) / 2 if adds_noise and n > 2 else min(n, n / 2 + 1)


def default_rule(name: str, n: int, stride: float | None, adds_noise: bool) -> DraftRule:
    """Return the default draft rule of a mode, which depends on whether the solver adds noise.

    With noise, carrying anything but the network's output increases the error if predictions are made only once. In a
    window, whose predictions are made again at refined states, it decreases the error (docs/quality.md).
    """
    if not adds_noise:
        return DAMPED
    if name == "adaptive":
        return STEADY
    if name != "window" or (default_stride(n, True) if stride is None else stride) >= n:
        return PAPER
    return STEADY if n <= MAX_STEADY_DRAFTS else STEADY_WIDE


def check_tolerance(mode: str | Mode, tolerance: float) -> None:
    """Raise ValueError if a tolerance is given for a mode that has none."""
    if mode != "adaptive" and tolerance != DEFAULT_TOLERANCE:
        raise ValueError(f"tolerance is {tolerance!r}, which mode {mode!r} does not have; choose mode 'adaptive'")


def make_mode(
    name: str,
    n: int,
    tolerance: float,
    rule: str | DraftRule | None,
    stride: float | None = None,
    offsets: str | Sequence[int] | None = None,
    adds_noise: bool = False,
) -> Mode:
    """Return the mode with this name and `n` drafts per round; raise ValueError for invalid arguments.

    `tolerance` is for the adaptive mode; `stride` and `offsets`, a name in PATTERNS or numbers, are for the window. If
    `rule` or `stride` is None, it is the default, which depends on whether the solver `adds_noise`.
    """
    if name != "window" and not (stride is None and offsets is None):
        what = f"stride is {stride}" if stride is not None else f"offsets are {offsets!r}"
        raise ValueError(f"{what}, which mode {name!r} does not have; choose mode 'window'")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"drafts is {n!r}; a round needs at least 1 draft")
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance!r}; give a relative residual from 0 to infinity, such as 0.01")
    if stride is not None and not (isinstance(stride, (int, float)) and math.isfinite(stride)):
        raise ValueError(f"stride is {stride!r}; give a number from 1 to {n}, the drafts of a round")
    rule = default_rule(name, n, stride, adds_noise) if rule is None else find_rule(rule)
    match name:
        case "sequential":
            return Sequential(rule)
        case "conservative":
            return Conservative(n, rule)
        case "aggressive":
            return Aggressive(n, rule)
        case "window":
            dense = offsets is None or offsets == "dense"
            if stride is None:
                stride = default_stride(n, adds_noise) if dense else n
            return Window(n, stride, rule) if dense else Sparse(n, stride, rule, _offsets(n, offsets))
        case "adaptive":
            return Adaptive(n, tolerance, rule)
        case "rolling":
            return Rolling(n, rule)
    raise ValueError(f"unknown mode {name!r}; choose one of {', '.join(MODE_NAMES)}")


def _offsets(n: int, offsets: str | Sequence[int] | None) -> tuple[int, ...]:
    if not isinstance(offsets, str):
        return tuple(offsets or ())
    if offsets not in PATTERNS:
        raise ValueError(f"unknown offsets {offsets!r}; choose one of {', '.join(PATTERNS)}, or give numbers")
    return PATTERNS[offsets](n)


class ModeArguments(NamedTuple):
    """Arguments of `drp.sampling.mode_selection.make_mode`."""

    mode: str
    drafts: int
    stride: float | None
    offsets: tuple[int, ...] | None = None


def choose_rounds(
    rounds: int, steps: int, max_drafts: int, rounds_before: int = 0, gaps: bool = False
) -> ModeArguments:
    """Return the window that takes `steps` steps in at most `rounds` rounds; raise ValueError if there is none.

    `rounds` includes `rounds_before`, the rounds that a warm-up has taken, of one step each.

    Its stride follows from the number of rounds. It has as many drafts as there may be, `max_drafts`, since each index
    is then evaluated more often; but if the stride allows, no more than a quarter of the steps, beyond which drafts are
    too far ahead to be of use, and no more than four evaluations of each index need (docs/quality.md).

    In the fewest rounds, each index is evaluated once only. If there may be `gaps`, the last quarter of the drafts is
    then spaced two apart, so that the run has a prediction beyond where the next round starts (docs/quality.md).
    """
    remaining = rounds - rounds_before
    if remaining >= steps:
        return ModeArguments("sequential", 1, None)
    fewest = 1 + math.ceil((steps - 1) / max_drafts)
    if remaining < fewest:
        after = f" after {rounds_before} of warm-up" if rounds_before else ""
        raise ValueError(
            f"target_rounds is {rounds}; with at most {max_drafts} drafts, {steps} steps{after} take "
            f"{rounds_before + fewest} rounds or more: use more devices or drafts, or fewer steps"
        )
    stride = (steps - 1) / (remaining - 1)
    drafts = min(max(math.ceil(stride), min(steps // 4, math.ceil(4 * stride))), max_drafts)
    spaced = gaps and remaining == fewest and MIN_SPACED_DRAFTS <= drafts <= steps // LEAST_STEPS_A_SPACED_DRAFT
    return ModeArguments("window", drafts, stride, spaced_offsets(drafts) if spaced else None)


def choose_speedup(
    speedup: float, steps: int, max_drafts: int, rounds_before: int = 0, gaps: bool = False
) -> ModeArguments:
    """Return the window whose steps divided by rounds reach `speedup`; raise ValueError if there is none.

    Steps and rounds include `rounds_before`, as of `choose_rounds`; `gaps` as there.
    """
    if not speedup >= 1:
        raise ValueError(f"target_speedup is {speedup}; give 1 or more")
    total = steps + rounds_before
    fewest = rounds_before + 1 + math.ceil((steps - 1) / max_drafts)
    if total / fewest < speedup:
        after = f", {rounds_before} of them in a warm-up," if rounds_before else ""
        raise ValueError(
            f"target_speedup is {speedup:g}; with at most {max_drafts} drafts, {total} steps{after} allow "
            f"{total / fewest:.3g}: use more devices or drafts, or more steps"
        )
    return choose_rounds(math.floor(total / speedup + 1e-9), steps, max_drafts, rounds_before, gaps)


@dataclass(frozen=True)
class TargetWindow(Wide):
    """The window with at most n drafts that reaches a target; which one that is depends on the number of steps.

    Exactly one of `target_rounds` and `target_speedup` (steps divided by rounds) is given. They count a warm-up too.
    `draft_rule` is None for the default, which depends on the window and on whether the solver `adds_noise`.
    `skips`: whether the window may skip indices; in the fewest rounds that then decreases the error, unless the solver
    adds noise.
    """

    target_rounds: int | None = None
    target_speedup: float | None = None
    draft_rule: DraftRule | None = None
    adds_noise: bool = False
    skips: bool = True

    def __post_init__(self) -> None:
        if self.target_rounds is not None and self.target_speedup is not None:
            raise ValueError("both target_speedup and target_rounds are given; leave one of them out")
        if self.target_rounds is not None and not (isinstance(self.target_rounds, int) and self.target_rounds >= 1):
            raise ValueError(f"target_rounds is {self.target_rounds!r}; give a whole number from 1")
        if self.target_rounds is None and not (self.target_speedup or 0) >= 1:
            raise ValueError(f"target_speedup is {self.target_speedup!r}; give 1 or more")

    @property
    def name(self) -> str:
        return "window"

    def for_steps(self, steps: int, rounds_before: int = 0) -> Mode:
        """Return the window that reaches the target in this number of steps; raise ValueError if there is none."""
        gaps = self.skips and not self.adds_noise
        if self.target_rounds is not None:
            choice = choose_rounds(self.target_rounds, steps, self.n, rounds_before, gaps)
        else:
            assert self.target_speedup is not None
            choice = choose_speedup(self.target_speedup, steps, self.n, rounds_before, gaps)
        mode, drafts, stride, offsets = choice
        return make_mode(mode, drafts, 0.0, self.draft_rule, stride, offsets, self.adds_noise)

    def rounds(self, steps: int) -> Rounds:
        yield from self.for_steps(steps).rounds(steps)
