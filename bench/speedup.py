"""How much of the theoretical speed-up is left, and where does the rest go? Each mode on 1, 2, 4, ... emulated devices.

Theory counts rounds, the first evaluation included. Nominal theory takes them all to be as long as the device is said
to take; the theory that efficiency is measured against takes each to be as long as its slowest worker's device really
took.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench.figures import console, percentile
from bench.rounds import RunTime, split, summary
from bench.transports.base import Work
from drp import ExecutionOptions, Leader
from drp.leader.devices import parse_emulated
from drp.leader.events import Timeline
from drp.protocol.messages import Draft
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference
from drp.workers.emulated import EmulatedDevice, cheap

CHEAP = "drp.workers.emulated:load"
TURNS = 5
DISPATCHES = ("sync", "async")
"""Of `ExecutionOptions`: whether the leader hears of a prediction before it sends what is made of it."""


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    mode: str
    n: int


def settings(devices: int) -> list[Setting]:
    """Return sequential, and both modes at 1, 2, 4, ... drafts up to the number of devices."""
    counts = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n < devices} | {devices})
    return [Setting("sequential", 1), *(Setting(mode, n) for mode in ("aggressive", "conservative") for n in counts)]


def measure(device: str, devices: int, dispatch: str = "sync", turns: int = TURNS) -> dict[str, Any]:
    """Return the figures of the plain loop and of every setting, all run in turn on the same workers."""
    work = Work(device, devices)
    began = time.perf_counter()
    runs: dict[Setting, list[RunTime]] = {setting: [] for setting in settings(devices)}
    plain, around, rounds = [], [], {}
    with Leader(CHEAP, devices=[device] * devices, execution=ExecutionOptions(dispatch=dispatch)) as leader:
        started = time.perf_counter() - began
        for turn in range(turns + 1):
            plain.append(run_plain(work))
            for setting in runs:
                timeline: Timeline = []
                leader.timeline = timeline
                before = time.perf_counter()
                result = leader.sample(shape=work.shape, steps=work.steps, mode=setting.mode, drafts=setting.n)
                around.append(time.perf_counter() - before - result.seconds)
                if turn:  # the first warms up
                    runs[setting].append(split(timeline))
                rounds[setting] = result.rounds
    walls, device_seconds = zip(*plain[1:], strict=True)
    base = {"wall_p50": percentile(walls, 50), "wall_p95": percentile(walls, 95)}
    base["device_p50"] = percentile(device_seconds, 50)
    one_worker = [run.wall / wall for run, wall in zip(runs[Setting("sequential", 1)], walls, strict=True)]
    rows = []
    for setting, times in runs.items():
        figures = summary(times, setting.n)
        rows.append(
            {
                "mode": setting.mode,
                "n": setting.n,
                "rounds": rounds[setting],
                "theory_nominal": work.steps / rounds[setting],
                "theory": base["device_p50"] / figures["device_p50"],
                "speedup": base["wall_p50"] / figures["wall_p50"],
                **figures,
            }
        )
    return {
        "device": device,
        "dispatch": dispatch,
        "steps": work.steps,
        "shape": work.shape,
        "plain": base,
        "rows": rows,
        "one_worker_over_plain": percentile(one_worker, 50),
        "start_workers": started,
        "start_run_p50": percentile(around, 50),
    }


def run_plain(work: Work) -> tuple[float, float]:
    """Run the plain loop in this process, on the first worker's core, with the same emulated device in it.

    Return its wall time and its device's time.
    """
    job = work.job()
    emulated = EmulatedDevice(parse_emulated(work.device, 0))
    device: list[float] = []

    def denoiser(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        predictions = []
        draft = Draft(0, 0, 0.0, 0, 0)
        began, _, ended, _ = emulated.run(draft, x.nbytes, lambda: predictions.append(cheap(x, t, cond)))
        device.append(ended - began)
        return predictions[0]

    with pinned():
        result = run_reference(denoiser, job.solver, Sequential(), job.start, job.cond)
    return result.seconds, sum(device)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread on the first core meanwhile."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the speed-ups, and where the time goes."""
    device, plain = f"{figures['device']} devices, ordered by the {figures['dispatch']}", figures["plain"]
    title = (
        f"{figures['steps']} steps on {device}; the plain loop takes {plain['wall_p50'] * 1e3:.1f} ms, "
        f"one worker {figures['one_worker_over_plain']:.4f} of that"
    )
    names = ("", "n", "rounds", "ms: p50", "p95", "nominal theory", "theory", "speed-up", "efficiency")
    speed = Table(*names, title=title)
    parts = Table(
        *("", "n", "lost: p50", "p95", "arithmetic", "sending", "wire, wake-up", "waiting for the slowest"),
        title=f"Lost in a round of n drafts, us, {device}",
        caption="lost: beyond the slowest worker's device time. Waiting: how much longer than the mean that was; "
        f"theory counts it as device time. Apart: starting {figures['rows'][-1]['n']} workers "
        f"{figures['start_workers']:.1f} s, starting and ending a run {figures['start_run_p50'] * 1e3:.1f} ms",
    )
    for row in figures["rows"]:
        speed.add_row(
            *(row["mode"], str(row["n"]), str(row["rounds"])),
            *(f"{row[k] * 1e3:.1f}" for k in ("wall_p50", "wall_p95")),
            *(f"{row[k]:.2f}" for k in ("theory_nominal", "theory", "speedup")),
            f"{row['efficiency_p50']:.3f}",
        )
        keys = ("lost_p50", "lost_p95", "arithmetic_p50", "sending_p50", "wire_p50", "waiting_p50")
        parts.add_row(row["mode"], str(row["n"]), *(f"{row[key] * 1e6:.0f}" for key in keys))
    return [speed, parts]


def main() -> None:
    """Measure eight emulated devices of 20 ms, then of 5 ms, the rounds ordered by the host, then by the device."""
    torch.set_num_threads(1)
    for device, dispatch in itertools.product(("emulated:20ms", "emulated:5ms"), DISPATCHES):
        console().print(*tables(measure(device, 8, dispatch)))


if __name__ == "__main__":
    main()
