"""Charts of the report: coordinates for inline SVG, which the template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drp.comparison.choose import distance, speedup
from drp.trace import read
from drp.trace.evaluations import evaluations

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 22, 44
"""The margins of the plot around its axes."""


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: where it is, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class ChartPoint:
    """A setting in the plot; `number` is its row in the table."""

    x: float
    y: float
    number: int
    kind: str
    label: str


@dataclass(frozen=True)
class Plot:
    """Speed-up over distance, the distance on a logarithmic axis."""

    points: list[ChartPoint]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    one: float
    """Where the speed-up is 1."""
    bound: float | None
    """Where the largest distance that was asked for is."""


def plot(cells: Sequence[Mapping[str, Any]], bound: float | None) -> Plot:
    """Return the plot of the cells in their order."""
    shown = [d for d in map(distance, cells) if d > 0] or [1e-3]
    low, high = min(shown), max([*shown, *([bound] if bound else [])])
    first, last = math.floor(math.log10(low) * 2 - 0.1) / 2, math.ceil(math.log10(high) * 2 + 0.1) / 2
    top = max(1.5, max(map(speedup, cells)) * 1.1)

    def x(value: float) -> float:
        share = (math.log10(max(value, 10**first)) - first) / (last - first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    points = [
        ChartPoint(x(distance(cell)), y(speedup(cell)), number, cell["kind"], cell["label"])
        for number, cell in enumerate(cells, start=1)
    ]
    decades = range(math.ceil(first), math.floor(last) + 1)
    marks = [
        m * 10.0**d
        for d in range(math.floor(first), math.ceil(last) + 1)
        for m in ((1,) if len(decades) > 2 else (1, 3))
    ]
    x_ticks = [Tick(x(m), f"{m:g}") for m in marks if first <= math.log10(m) <= last]
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 1000) if top / s <= 6)
    y_ticks = [Tick(y(i * step), f"{i * step:g}") for i in range(int(top / step) + 1)]
    return Plot(points, x_ticks, y_ticks, y(1.0), x(bound) if bound else None)


@dataclass(frozen=True)
class Span:
    """An evaluation on a device: its step, and where it begins and ends, in percent of the run."""

    step: int
    left: float
    width: float
    odd: bool
    """Whether it belongs to a round with an odd number: neighbouring rounds have different colours."""


@dataclass(frozen=True)
class Lane:
    """A device and its evaluations."""

    device: str
    spans: list[Span]


@dataclass(frozen=True)
class DeviceTimeline:
    """What each device evaluated, when, in one run of `milliseconds`."""

    label: str
    milliseconds: float
    lanes: list[Lane]


def timeline(label: str, trace: Path) -> DeviceTimeline | None:
    """Return the timeline of a recorded run, None if nothing was recorded."""
    if not trace.exists():
        return None
    marks, devices, _ = read(trace)
    found = [e for e in evaluations(marks) if e.answered is not None]
    if not found:
        return None
    began, ended = min(e.began for e in found), max(e.ended for e in found)
    rounds: dict[int, int] = {}
    for e in found:
        rounds.setdefault(id(e.scheduled), len(rounds))
    total = max(1, ended - began)
    lanes = [
        Lane(
            f"{number}: {device}",
            [
                Span(
                    e.step,
                    (e.began - began) / total * 100,
                    (e.ended - e.began) / total * 100,
                    bool(rounds[id(e.scheduled)] % 2),
                )
                for e in found
                if e.worker == number
            ],
        )
        for number, device in enumerate(devices)
    ]
    return DeviceTimeline(label, total / 1e6, lanes)
