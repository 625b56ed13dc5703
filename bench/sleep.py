"""How late do sleeps end, alone and eight at once? It decides how emulated devices keep their time.

Several processes, pinned to the cores in turn, sleep until the same deadlines; each may spin the last microseconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import statistics
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from rich.table import Table

from bench.figures import console, percentile

PR_SET_TIMERSLACK = 29
ROUNDS = 100
PERIOD = 0.021
WAYS = {"plain": (False, 0.0), "slack 1 ns": (True, 0.0), "spin 100 us": (True, 1e-4), "spin 300 us": (True, 3e-4)}


def sleeper(number: int, slack: bool, spin: float, start: Barrier, out: Queue[tuple[list[float], float]]) -> None:
    """Report how late each deadline was met, and the processor seconds of it all."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    if slack:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    start.wait(30)
    used, began, late = time.process_time(), time.perf_counter(), []
    for k in range(1, ROUNDS + 1):
        deadline = began + k * PERIOD
        while (left := deadline - time.perf_counter()) > 0:
            if left > spin:
                time.sleep(left - spin)
        late.append(time.perf_counter() - deadline)
    out.put((late, time.process_time() - used))


def measure(slack: bool, spin: float, count: int) -> tuple[list[list[float]], float]:
    """Return how late each of `count` processes was, and the processor seconds of one sleep."""
    spawn = multiprocessing.get_context("spawn")
    start, out = spawn.Barrier(count), spawn.Queue()
    processes = [spawn.Process(target=sleeper, args=(i, slack, spin, start, out)) for i in range(count)]
    for process in processes:
        process.start()
    reports = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return [late for late, _ in reports], statistics.mean(used for _, used in reports) / ROUNDS


def main() -> None:
    """Print a table, microseconds."""
    table = Table("", "1: p50", "p95", "8: p50", "p95", "slowest of 8: p50", "p95", "processor time, 8")
    for name, (slack, spin) in WAYS.items():
        (alone,), _ = measure(slack, spin, 1)
        eight, used = measure(slack, spin, 8)
        rows = [alone, [t for late in eight for t in late], [max(at) for at in zip(*eight, strict=True)]]
        figures = [f"{percentile(row, q) * 1e6:.0f}" for row in rows for q in (50, 95)]
        table.add_row(name, *figures, f"{used * 1e6:.0f}")
    console().print(table)


if __name__ == "__main__":
    main()
