"""What does losing a worker cost? `python -m bench.loss`: one is killed in the middle of a run, or none, in turn.

Emulated devices, the real protocol. Printed: how long the loss took to be seen, and the time that the run lost by it,
against the same run without, medians of pairs. A replacement starts in the background half a second later.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time

import click
from rich.console import Console
from rich.progress import track
from torch import Tensor

from drp import Leader
from drp.leader.events import Timeline
from drp.leader.scheduling.policies import LoadAdaptive

STEPS = 48


@click.command()
@click.option("--devices", default=4, show_default=True)
@click.option("--time", "device_time", default="20ms", show_default=True, help="Of an evaluation.")
@click.option("--pairs", default=7, show_default=True)
@click.option("--hedge", type=float, help="Send drafts that take this many times the median latency twice.")
def main(devices: int, device_time: str, pairs: int, hedge: float | None) -> None:
    """Measure."""
    whole, hurt, seen = [], [], []
    with Leader(
        "digits", devices=f"{devices}xemulated:{device_time}:values=cheap", policy=LoadAdaptive(hedge=hedge)
    ) as leader:
        sample(leader, None)
        for turn in track(range(pairs), console=Console(stderr=True)):
            whole.append(sample(leader, None)[0])
            seconds, noticed = sample(leader, turn % devices)
            hurt.append(seconds)
            seen.append(noticed)
            deadline = time.monotonic() + 60
            while [worker.state for worker in leader.workers] != ["ready"] * devices and time.monotonic() < deadline:
                time.sleep(0.1)
            sample(leader, None)  # the new worker's first
    lost = [b - a for a, b in zip(whole, hurt, strict=True)]
    table = {
        "run without a loss": whole,
        "run with one worker killed in its middle": hurt,
        "time lost": lost,
        "from SIGKILL to its being seen": seen,
    }
    for name, values in table.items():
        print(f"{name}: median {statistics.median(values) * 1e3:.1f} ms, most {max(values) * 1e3:.1f} ms")


def sample(leader: Leader, victim: int | None) -> tuple[float, float]:
    """Run once, a worker being killed half-way; return the seconds it took, and until the leader had seen it."""
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.perf_counter())
        os.kill(leader.workers[victim or 0].pid or 0, signal.SIGKILL)

    def half_way(k: int, x: Tensor) -> None:
        if k == STEPS // 2 and victim is not None:
            threading.Timer(0.003, kill).start()  # in the midst of an evaluation

    leader.timeline = timeline = Timeline()
    result = leader.sample(labels=[1], steps=STEPS, mode="aggressive", callback=half_way)
    if victim is None:
        return result.seconds, 0.0
    assert result.incidents, "the run was over before"
    lost = next(mark.ns for mark in timeline if mark.kind == "lost") / 1e9
    return result.seconds, lost - killed[0]


if __name__ == "__main__":
    main()
