"""Choice: a mode, a number of drafts and a stride for a wanted speed-up or number of rounds."""

from __future__ import annotations

import math
from typing import NamedTuple


class Choice(NamedTuple):
    """Arguments of `drp.sampling.modes.make_mode`."""

    mode: str
    drafts: int
    stride: float | None


def choose_rounds(rounds: int, steps: int, most_drafts: int) -> Choice:
    """Return the window that takes `steps` steps in `rounds` rounds, or less; ValueError if none does.

    Its stride follows from the rounds. It has the drafts whose default stride that is, n = 2 (stride - 1), or as many
    as there may be: more would be evaluated more often for little, and with fewer the error is larger.
    """
    if rounds >= steps:
        return Choice("sequential", 1, None)
    fewest = 1 + math.ceil((steps - 1) / most_drafts)
    if rounds < fewest:
        raise ValueError(
            f"target_rounds is {rounds}; with at most {most_drafts} drafts, {steps} steps take {fewest} rounds or "
            "more: use more devices or drafts, or fewer steps"
        )
    stride = (steps - 1) / (rounds - 1)
    drafts = max(math.ceil(stride), math.ceil(2 * (stride - 1) - 1e-9))
    return Choice("window", min(drafts, most_drafts), stride)


def choose_speedup(speedup: float, steps: int, most_drafts: int) -> Choice:
    """Return the window whose steps over rounds reach `speedup`; ValueError if none does."""
    if not speedup >= 1:
        raise ValueError(f"target_speedup is {speedup}; give 1 or more")
    fewest = 1 + math.ceil((steps - 1) / most_drafts)
    if steps / fewest < speedup:
        raise ValueError(
            f"target_speedup is {speedup:g}; with at most {most_drafts} drafts, {steps} steps allow "
            f"{steps / fewest:.3g}: use more devices or drafts, or more steps"
        )
    return choose_rounds(math.floor(steps / speedup + 1e-9), steps, most_drafts)
