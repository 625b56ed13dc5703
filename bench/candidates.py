"""Candidates: what `bench.drafting` compares, in groups of about as many rounds as one of the paper's modes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from drp.sampling.drafts import DAMPED, PAPER, SECANT, DraftRule
from drp.sampling.mode_selection import TargetWindow
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Mode, Round, Rounds, Sparse, Wide, Window

PAPERS: Mapping[str, Mode] = {
    **{f"aggressive {n}": Aggressive(n, PAPER) for n in (2, 4, 8)},
    **{f"conservative {n}": Conservative(n, PAPER) for n in (2, 4, 8)},
}


@dataclass(frozen=True)
class Warped(Wide):
    """The rounds of a window with this stride, unevenly spaced: base j of M is (N - 1 - tail) (j / M)^power.

    A power above 1 is dense at first. `tail` is how many steps the last round advances.
    """

    stride: float
    power: float
    tail: int
    rule: DraftRule = DAMPED

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then windows of n drafts."""
        yield Round(0, (0,))
        base, more = 0, math.ceil((steps - 1) / self.stride) - 1
        for j in range(more + 1):
            if j:
                wanted = int((steps - 1 - self.tail) * (j / more) ** self.power + 1e-9)
                base = max(base + 1, min(wanted, base + self.n), steps - 1 - self.n * (more + 1 - j))
            yield Round(base, tuple(range(base + 1, min(base + self.n, steps - 1) + 1)))


@dataclass(frozen=True)
class Fewest(Wide):
    """The window that `target_rounds` chooses for the fewest rounds. `skips`: it may leave out indices."""

    skips: bool

    def for_steps(self, steps: int, rounds_before: int = 0) -> Mode:
        """Return the window for so many steps."""
        rounds = 1 + math.ceil((steps - 1) / self.n)
        return TargetWindow(self.n, rounds, skips=self.skips).for_steps(steps, rounds_before)

    def rounds(self, steps: int) -> Rounds:
        """Yield the rounds of that window."""
        yield from self.for_steps(steps).rounds(steps)


def _rules() -> dict[str, DraftRule]:
    found: dict[str, DraftRule] = {"secant": SECANT, "paper": PAPER}
    for carry in (0.0, 0.1, 0.25, 0.4, 0.5):
        found[f"carry {carry}, slope 0.3"] = DraftRule(carry, 0.3)
    for slope in (0.0, 0.5, 0.75):
        found[f"carry 0.4 / 0.1, slope {slope}"] = DraftRule((0.4, 0.1), slope)
    for axis in ("log-sigma", "angle", "time"):
        found[f"carry 0.4 / 0.1, slope 0.5, {axis}"] = DraftRule((0.4, 0.1), 0.5, axis)
    return found


EVEN = tuple(range(2, 17, 2))
TAPERED = (1, 2, 3, 4, 6, 8, 10, 12)
HALF = DraftRule((0.4, 0.1), 0.5)
ANGLE = DraftRule((0.4, 0.1), 0.5, "angle")

STRONG = DraftRule((0.5, 0.1), 0.5)
SINGLE: Mapping[str, DraftRule] = {
    "secant": SECANT,
    "damped": DAMPED,
    "carry 0.4 / 0.1, slope 0.5": HALF,
    "carry 0.5 / 0.1, slope 0.5": STRONG,
    "carry 0.4 / 0.1, slope 0.5, angle": ANGLE,
}

CANDIDATES: Mapping[str, tuple[str, Mapping[str, Mode]]] = {
    "rules, window 5 of 8": ("conservative 8", {name: Window(8, 5, rule) for name, rule in _rules().items()}),
    "rules, aggressive 4": ("aggressive 4", {name: Aggressive(4, rule) for name, rule in SINGLE.items()}),
    "rules, aggressive 8": ("aggressive 8", {name: Aggressive(8, rule) for name, rule in SINGLE.items()}),
    "strides of 8": (
        "conservative 8",
        {
            **{f"window {s:g} of 8": Window(8, s) for s in (4, 4.7, 5, 6)},
            "window 5 of 8, carry 0.5 / 0.1, slope 0.5": Window(8, 5, STRONG),
            **{f"warped, power {p}, tail {t}": Warped(8, 5, p, t) for p in (1.0, 1.2) for t in (1, 2, 5, 8)},
            "tapered, stride 5": Sparse(8, 5, HALF, TAPERED),
            "adaptive": Adaptive(8, 0.0025),
        },
    ),
    "strides of 4": (
        "conservative 4",
        {**{f"window {s:g} of 4": Window(4, s) for s in (2.5, 3)}, "even, stride 3": Sparse(4, 3, HALF, (2, 4, 6, 8))},
    ),
    "seven rounds": (
        "aggressive 8",
        {
            "window 7 of 8": Window(8, 7),
            "even, stride 8": Sparse(8, 8, HALF, EVEN),
            "tapered, stride 8": Sparse(8, 8, HALF, TAPERED),
            "1-6, 8, 10, stride 8": Sparse(8, 8, HALF, (1, 2, 3, 4, 5, 6, 8, 10)),
        },
    ),
    "thirteen rounds": (
        "aggressive 4",
        {
            "even, stride 4": Sparse(4, 4, HALF, (2, 4, 6, 8)),
            "1, 2, 4, 6, stride 4": Sparse(4, 4, HALF, (1, 2, 4, 6)),
            "window 3.9 of 8": Window(8, 47 / 12),
        },
    ),
    "drafts, 13 rounds": ("aggressive 4", {f"window 3.92 of {n}": Window(n, 47 / 12) for n in (4, 5, 6, 8, 12)}),
    "drafts, 17 rounds": ("conservative 4", {f"window 2.94 of {n}": Window(n, 47 / 16) for n in (3, 4, 5, 6, 8, 12)}),
    "fewest 4": ("aggressive 4", {"dense": Fewest(4, False), "spaced": Fewest(4, True)}),
    "fewest 8": ("aggressive 8", {"dense": Fewest(8, False), "spaced": Fewest(8, True)}),
    "two": ("aggressive 2", {name: Window(2, 2, rule) for name, rule in SINGLE.items()}),
    "default": ("conservative 8", {"window 5 of 8": Window(8, 5)}),
    "default 4": ("conservative 4", {"window 3 of 4": Window(4, 3)}),
    "default 2": ("aggressive 2", {"window 2 of 2": Window(2, 2)}),
}
