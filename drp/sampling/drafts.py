"""Draft rules: how data estimates are extrapolated, and how a prediction is carried to another state.

`drp.sampling` and `drp.diffusers` use the same objects. A custom rule is a subclass of `DraftRule`
(examples/own_rule.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

AXES = ("index", "log-sigma", "angle", "time")


@dataclass(frozen=True)
class Levels:
    """What a rule may use: alpha, sigma and the timestep at each index that is evaluated, and the prediction type."""

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    prediction_type: str

    def on(self, axis: str, k: int) -> float:
        """Return index k's position on an axis: the index, log(sigma / alpha), atan2(sigma, alpha) or the timestep."""
        match axis:
            case "log-sigma":  # The first state of flow matching has no signal: its alpha is 0.
                return math.log(self.sigmas[k] / max(self.alphas[k], 1e-3 * self.sigmas[k]))
            case "angle":
                return math.atan2(self.sigmas[k], self.alphas[k])
            case "time":
                return self.timesteps[k]
        return float(k)


Pair = tuple[float, float]
"""A number for networks that predict epsilon, and one for all others."""


@dataclass(frozen=True)
class DraftRule:
    """The two choices that each round leaves open (docs/drafts.md).

    carry: w, from 0 to 1: how a prediction made at a draft d is used at the refined state x. The estimate of the
        data there is c_x ((1 - w) x + w d) + c_p prediction, with c_x and c_p of the prediction type: at 0 the
        network's output is carried unchanged, at 1 the data that it implied.
    slope: from 0 to 1: the share of the change of the data estimate, from the previous round's base to the last
        prediction, that is extrapolated linearly over the axis. At 0 the last estimate is kept.
    axis: the axis of the extrapolation: "index", "log-sigma", "angle" (atan2(sigma, alpha)) or "time" (the timestep).

    A subclass overrides `carry_at`, `extrapolate` or `interpolate`. It must be hashable, and equal only to rules that
    behave in the same way, since plans are cached.
    """

    carry: float | Pair = (0.45, 0.1)
    slope: float | Pair = (0.4, 0.5)
    axis: str = "index"

    def __post_init__(self) -> None:
        for name, value in (("carry", self.carry), ("slope", self.slope)):
            numbers = value if isinstance(value, tuple) else (value, value)
            if len(numbers) != 2 or not all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in numbers):
                raise ValueError(f"{name} is {value!r}; give a number from 0 to 1, or two: for epsilon, and for others")
        if self.axis not in AXES:
            raise ValueError(f"axis is {self.axis!r}; choose one of {', '.join(AXES)}")

    @property
    def looks_back(self) -> bool:
        """Whether `extrapolate` uses an index below the state that a round starts from, which is then kept."""
        return self.slope not in (0, (0, 0))

    def carry_at(self, k: int, levels: Levels) -> float:
        """Return w at index k."""
        return _of(self.carry, levels)

    def extrapolate(self, k: int, previous_base: int, last: int, levels: Levels) -> Mapping[int, float]:
        """Return the weights by which the data estimate at index k, beyond the last prediction, is extrapolated.

        There is one for the estimate at `last`, the last predicted index, and one for that at `previous_base`, the
        previous round's base, or `last` itself in the first round. They add up to 1.
        """
        ahead, block = k - last, last - previous_base
        slope = _of(self.slope, levels) if 0 < ahead <= block else 0.0
        if slope == 0.0:
            return {last: 1.0}
        if self.axis == "index":
            share = slope * ahead / block
        else:
            at = levels.on(self.axis, last)
            share = slope * (levels.on(self.axis, k) - at) / (at - levels.on(self.axis, previous_base))
        return {last: 1.0 + share, previous_base: -share}

    def interpolate(self, k: int, below: int, above: int, levels: Levels) -> Mapping[int, float]:
        """Return the weights by which the data estimate at index k is interpolated from those at `below` and `above`.

        They add up to 1.
        """
        share = (k - below) / (above - below)
        return {below: 1.0 - share, above: share}


def _of(value: float | Pair, levels: Levels) -> float:
    return value[levels.prediction_type != "epsilon"] if isinstance(value, tuple) else value


PAPER = DraftRule(carry=0.0, slope=0.0)
"""The choices of the paper (DRiffusion, arXiv 2603.25872)."""

SECANT = DraftRule(carry=(0.5, 0.25), slope=1.0)
"""The whole change of the block before goes on: best on DDIM with trailing timesteps, and too much elsewhere."""

DAMPED = DraftRule()
"""What measured best over networks, solvers and guidance (docs/drafts.md); the default."""

STEADY = DraftRule(carry=(0.3, 0.1), slope=0.0)
"""The default of windows under solvers that add noise: the noise of each step hides where the estimate is going."""

STEADY_WIDE = DraftRule(carry=(0.4, 0.1), slope=0.0)
"""The same for more than four drafts per round, which are further from the refined states."""

RULES = {"paper": PAPER, "secant": SECANT, "damped": DAMPED}


def find_rule(rule: str | DraftRule) -> DraftRule:
    """Return the rule with this name, or a given rule itself; raise ValueError for an unknown name."""
    if isinstance(rule, DraftRule):
        return rule
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}, or give a DraftRule")
    return RULES[rule]
