"""Recommendation: the setting that a bound on distance or speed-up asks for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_DISTANCE = 0.05
"""The largest mean relative L2 distance of a setting that is recommended if no bound is given."""

PLAUSIBLE = 1.1
"""A measured speed-up is reported as implausible above this multiple of steps / rounds."""


@dataclass(frozen=True)
class Recommendation:
    """A recommendation: a cell's key, None if no setting is within the bounds, and the reasons in words."""

    key: str | None
    text: str
    code: str = ""


def choose(
    cells: Mapping[str, Mapping[str, Any]], max_distance: float | None = None, min_speedup: float | None = None
) -> Recommendation:
    """Return the drafted setting within the bounds: the fastest, or, if only a speed-up is asked for, the nearest.

    max_distance: the largest mean relative L2 distance to the untouched samples.
    min_speedup: the least measured speed-up.
    """
    drafted = {key: cell for key, cell in cells.items() if cell["kind"] == "drafted"}
    if not drafted:
        return Recommendation(None, "No drafted setting was measured.")
    unbounded = max_distance is None and min_speedup is None
    largest = DEFAULT_DISTANCE if unbounded else max_distance
    fits = [
        key
        for key, cell in drafted.items()
        if (largest is None or distance(cell) <= largest) and (min_speedup is None or cell["speedup"] >= min_speedup)
    ]
    wanted = _bounds(largest, min_speedup, unbounded)
    if not fits:
        order = speedup if largest is None else (lambda cell: -distance(cell))
        near = max(drafted.values(), key=order)
        return Recommendation(None, f"No setting is {wanted}. The closest is {_described(near)}.")
    best = max(fits, key=lambda key: speedup(drafted[key]) if largest is not None else -distance(drafted[key]))
    cell = drafted[best]
    first = "the fastest" if largest is not None else "the nearest"
    text = f"Of the settings that are {wanted}, {first} is {_described(cell)}."
    if speedup(cell) < 1:
        text += " It is slower than the untouched run: drafting gains nothing here."
    if why := implausible(speedup(cell), cell["steps"], statistics.fmean(cell["rounds"])):
        text += f" {why}"
    rivals = [c for c in cells.values() if c["kind"] != "drafted" and distance(c) <= distance(cell)]
    rivals = [c for c in rivals if speedup(c) >= speedup(cell)]
    if rivals:
        text += f" Fewer steps do better: {_described(max(rivals, key=speedup))}."
    return Recommendation(best, text, cell["code"])


def implausible(speedup: float, steps: int, rounds: float) -> str:
    """Return why a measured speed-up cannot be right, in a sentence; empty if it can."""
    if speedup <= PLAUSIBLE * steps / rounds:
        return ""
    return (
        f"{rounds:.4g} rounds in place of {steps} steps allow only {steps / rounds:.2f} times: something slowed the "
        "untouched run down. Measure the times again on a quiet machine."
    )


def distance(cell: Mapping[str, Any]) -> float:
    """Return the mean relative L2 distance of a cell."""
    return float(cell["distances"]["relative_l2"]["mean"])


def speedup(cell: Mapping[str, Any]) -> float:
    """Return the measured speed-up of a cell."""
    return float(cell["speedup"])


def _bounds(largest: float | None, least: float | None, default: bool) -> str:
    parts = (
        []
        if largest is None
        else [f"within a relative L2 distance of {largest:g}{' (the default bound)' if default else ''}"]
    )
    return " and ".join(parts + ([] if least is None else [f"at least {least:g} times as fast"]))


def _described(cell: Mapping[str, Any]) -> str:
    return f"{cell['label']}: {speedup(cell):.2f} times as fast, at a relative L2 distance of {distance(cell):.4f}"
