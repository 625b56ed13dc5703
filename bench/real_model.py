"""What is it worth on real cores? `digits`, one image: plain loops in this process, and worker processes, in turn.

Workers are started anew several times: by where its memory comes to lie a process is some 5 % faster or slower than
another for as long as it lives, and one worker is compared with two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from bench.figures import console, percentile
from bench.speedup import pinned
from drp import ExecutionOptions, Leader, models
from drp.leader.job import make_job
from drp.leader.request import Request
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference

STARTS, TURNS = 4, 3
PATIENCE = 40.0
"""Seconds after which no more turns begin: where others use the cores too, the loop with 2 threads takes very long."""
DEVICES = "2xcpu"
REQUEST = Request(labels=[3], steps=48)


def measure(starts: int = STARTS, turns: int = TURNS) -> dict[str, Any]:
    """Return p50 and p95 of the ways, and the ratios that matter, each the median over the turns."""
    seconds: dict[str, list[float]] = {}
    began = time.perf_counter()
    for start in range(starts):
        if start and time.perf_counter() - began > PATIENCE:
            break
        for name, took in _measure_once(turns, began + PATIENCE).items():
            seconds.setdefault(name, []).extend(took)

    def ratio(slow: str, fast: str) -> float:
        return percentile([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)], 50)

    def ratios(more: str) -> dict[str, float]:
        one, two = f"1 worker{more}", f"2 workers, aggressive{more}"
        return {
            "two_over_one_worker": ratio(one, two),
            "two_over_one_worker_of_theory": ratio(one, two) / theory,
            "two_over_plain_2_threads": ratio("plain loop, 2 threads", two),
            "one_worker_over_plain_1_thread": ratio(one, "plain loop, 1 thread"),
        }

    theory = 48 / 25
    return {
        "turns": len(seconds["1 worker"]),
        "ways": {name: {"p50": percentile(v, 50), "p95": percentile(v, 95)} for name, v in seconds.items()},
        "theory": theory,
        "dispatches": {dispatch: ratios(more) for dispatch, more in (("sync", ""), ("async", ", ahead"))},
    }


def _measure_once(turns: int, deadline: float) -> dict[str, list[float]]:
    """Return the seconds of all ways in turn, on workers that are started for this."""
    denoiser = models.load("digits")
    job = make_job(REQUEST, denoiser.spec, 1)

    def plain(threads: int) -> float:
        torch.set_num_threads(threads)
        try:
            return run_reference(denoiser.predict, job.solver, Sequential(), job.start, job.cond).seconds
        finally:
            torch.set_num_threads(1)

    def plain_pinned() -> float:
        with pinned():
            return plain(1)

    sync, ahead = ExecutionOptions(dispatch="sync"), ExecutionOptions(dispatch="async")
    with (
        Leader("digits", devices=DEVICES, execution=sync) as first,
        Leader("digits", devices=DEVICES, execution=ahead) as second,
    ):

        def led(leader: Leader, mode: str, drafts: int) -> float:
            return leader.sample(labels=[3], steps=48, mode=mode, drafts=drafts).seconds

        ways: dict[str, Callable[[], float]] = {
            "plain loop, 1 thread": plain_pinned,
            "plain loop, 2 threads": lambda: plain(2),
            "1 worker": lambda: led(first, "sequential", 1),
            "2 workers, aggressive": lambda: led(first, "aggressive", 2),
            "1 worker, ahead": lambda: led(second, "sequential", 1),
            "2 workers, aggressive, ahead": lambda: led(second, "aggressive", 2),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns + 1):
            if turn > 1 and time.perf_counter() > deadline:
                break
            for name, way in ways.items():
                took = way()
                if turn:  # the first warms up
                    seconds[name].append(took)
                time.sleep(0.02)
    return seconds


def table(figures: dict[str, Any]) -> Table:
    """Return the table."""
    shown = Table(
        *("", "ms: p50", "p95"),
        title="digits, one image, 48 steps, real cores",
        caption=" ".join(
            f"Ordered by the {dispatch}: 2 workers against 1 {found['two_over_one_worker']:.2f} times as fast, "
            f"{found['two_over_one_worker_of_theory']:.3f} of theory ({figures['theory']:.2f}); against the plain loop "
            f"with 2 threads {found['two_over_plain_2_threads']:.2f}; 1 worker takes "
            f"{found['one_worker_over_plain_1_thread']:.3f} of the plain loop's time with 1 thread on the same core."
            for dispatch, found in figures["dispatches"].items()
        ),
    )
    for name, row in figures["ways"].items():
        shown.add_row(name, f"{row['p50'] * 1e3:.1f}", f"{row['p95'] * 1e3:.1f}")
    return shown


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    console().print(table(measure()))


if __name__ == "__main__":
    main()
