"""The numbers of rounds of the modes, by closed formulas."""

from __future__ import annotations

import math

from drp.sampling.mode_selection import default_stride
from drp.sampling.modes import Window


def rounds_of(name: str, steps: int, n: int, stride: float | None = None) -> int:
    """Return the number of rounds of `steps` steps in a mode whose rounds are known before the run."""
    match name:
        case "sequential":
            return steps
        case "aggressive" | "rolling":
            return 1 + math.ceil((steps - 1) / n)
        case "window":
            return len(list(Window(n, default_stride(n) if stride is None else stride).rounds(steps)))
        case "conservative":
            return 2 * (steps // (n + 1)) + min(2, steps % (n + 1))
    raise ValueError(f"the rounds of mode {name!r} are not known before the run")
