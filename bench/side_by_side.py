"""What does a round lose when other means carry it? The same aggressive runs on the same emulated devices, in turn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from bench.figures import console
from bench.rounds import RunTime, split, summary
from bench.transports.base import Transport, Work
from bench.transports.gloo import Gloo
from bench.transports.ours import Ours, OursAsync
from bench.transports.pipes import Pipes
from bench.transports.queues import Queues

TURNS = 12


def measure(work: Work, turns: int = TURNS) -> dict[str, Any]:
    """Return the figures of every carrier, its results checked against the reference.

    All run in turn, so that what else the machine does falls on each alike. Ray keeps processes of its own busy, so it
    has its turns after the others, against drp once more.
    """
    figures = _in_turn([Ours, OursAsync, Pipes, Queues, Gloo], work, turns)
    if importlib.util.find_spec("ray") is None:
        figures["ray"] = None
    else:
        from bench.transports.actors import Actors

        beside_ray = _in_turn([Ours, OursAsync, Actors], work, turns)
        figures["drp beside ray"], figures["drp, ahead, beside ray"] = beside_ray["drp"], beside_ray["drp, ahead"]
        figures["ray"] = beside_ray["ray"]
    return figures


def _in_turn(kinds: Sequence[type[Transport]], work: Work, turns: int) -> dict[str, Any]:
    transports: list[Transport] = []
    runs: dict[str, list[RunTime]] = {kind.name: [] for kind in kinds}
    expected = work.reference()
    try:
        for kind in kinds:
            transports.append(kind(work))
        for turn in range(turns + 1):
            for carrier in transports:
                if not torch.equal(carrier.sample(), expected):
                    raise RuntimeError(f"{carrier.name} computes other samples than the reference")
                if turn:  # the first warms up
                    runs[carrier.name].append(split(carrier.timeline))
    finally:
        for carrier in transports:
            carrier.close()
    return {name: summary(times, work.count) for name, times in runs.items()}


def table(figures: dict[str, Any], work: Work) -> Table:
    """Return the table."""
    shown = Table(title=f"A round of {work.count} drafts, {work.count} x {work.device}, carried by")
    for column in ("", "lost, us: p50", "p95", "of that, floor apart: p50", "efficiency"):
        shown.add_column(column, justify="right" if column else "left")
    floor = figures["pipes (floor)"]["lost_p50"]
    for name, row in figures.items():
        if row is None:
            shown.add_row(name, "not installed: pip install 'drp\\[ray]'")
            continue
        shown.add_row(
            name,
            f"{row['lost_p50'] * 1e6:.0f}",
            f"{row['lost_p95'] * 1e6:.0f}",
            f"{(row['lost_p50'] - floor) * 1e6:.0f}",
            f"{row['efficiency_p50']:.3f}",
        )
    return shown


def main() -> None:
    """Measure eight emulated devices of 20 ms."""
    torch.set_num_threads(1)
    work = Work("emulated:20ms", 8)
    console().print(table(measure(work), work))


if __name__ == "__main__":
    main()
