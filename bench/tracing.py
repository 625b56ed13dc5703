"""What does a trace cost? The same runs with tracing off and on, in turn.

python -m bench.tracing
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from bench.figures import console
from drp.leader import Leader
from drp.trace import record

CHEAP = "drp.workers.emulated:load"
SHAPE = (4, 64, 64)
MODES = ("sequential", "aggressive", "rolling")


def measure(device: str, devices: int, turns: int) -> dict[str, Any]:
    """Return medians of the runs' seconds by mode, off and on, and of writing a trace."""
    figures: dict[str, Any] = {}
    with (
        Leader(CHEAP, devices=[device] * devices) as leader,
        tempfile.TemporaryDirectory(prefix="drp-trace-") as folder,
    ):

        def sample(mode: str) -> float:
            return leader.sample(shape=SHAPE, mode=mode, drafts=devices, callback=lambda k, x: None).seconds

        for mode in MODES:
            off, on = [], []
            for turn in range(turns + 1):
                first = sample(mode) if turn % 2 else None  # which of the two comes first changes
                with record(leader, Path(folder) / "run.json"):
                    traced = sample(mode)
                plain = first if first is not None else sample(mode)
                if turn:  # the first warms up
                    off.append(plain)
                    on.append(traced)
            ratio = statistics.median(b / a for a, b in zip(off, on, strict=True))
            figures[mode] = {"off": statistics.median(off), "on": statistics.median(on), "ratio": ratio}
    return figures


def table(figures: dict[str, Any], device: str, devices: int) -> Table:
    """Return a row a mode."""
    made = Table(*("mode", "off, ms", "on, ms", "on / off, median of pairs"), title=f"Tracing, {devices} x {device}")
    for mode, row in figures.items():
        made.add_row(mode, f"{row['off'] * 1e3:.2f}", f"{row['on'] * 1e3:.2f}", f"{row['ratio']:.4f}")
    return made


@click.command()
@click.option("--turns", default=20, show_default=True, help="Pairs of runs.")
@click.option("--device", default="emulated:20ms", show_default=True)
@click.option("--devices", default=8, show_default=True)
def main(turns: int, device: str, devices: int) -> None:
    """Compare."""
    torch.set_num_threads(1)
    console().print(table(measure(device, devices, turns), device, devices))


if __name__ == "__main__":
    main()
