"""What does the server add to a request? The same runs by a leader here and through `drp serve`, in turn.

    python -m bench.client_overhead

What a request takes beyond its run, by the run's own clock: for `leader.sample`, and for `client.sample` of a server
process with the same emulated devices. The difference is the server's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.figures import console, machine, percentile
from drp.client import Client
from drp.leader import Leader

MODEL, DEVICE, DEVICES = "drp.workers.emulated:load", "emulated:20ms:values=cheap", 4
STEPS, TURNS = 16, 25

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "[1, 28, 28], inline": ((1, 28, 28), {}),
    "[1, 28, 28], with progress and previews": ((1, 28, 28), {"progress": True, "previews": 1, "timeline": True}),
    "[4, 128, 128], in shared memory": ((4, 128, 128), {}),
    "[3, 1024, 1024], in shared memory": ((3, 1024, 1024), {}),
}


def measure(turns: int = TURNS) -> dict[str, Any]:
    """Return, by case, the seconds beyond the run: without the server, with it, and what it adds."""
    figures: dict[str, Any] = {"device": f"{DEVICES} x {DEVICE}", "steps": STEPS, "turns": turns, "cases": {}}
    with _server() as address, Leader(MODEL, devices=[DEVICE] * DEVICES) as leader, Client(address) as client:
        for name, (shape, ways) in CASES.items():
            figures["cases"][name] = _case(leader, client, shape, ways, turns)
    return figures


@contextmanager
def _server() -> Iterator[str]:
    """Run `drp serve` during a block; yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/server/socket"
        command = [str(Path(sys.executable).with_name("drp")), "serve", MODEL, "-l", address]
        command += ["-d", f"{DEVICES}x{DEVICE}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603  # of our own
            try:
                assert server.stdout is not None
                server.stdout.readline()  # It listens.
                yield address
            finally:
                server.terminate()
                server.wait(60)


def _case(leader: Leader, client: Client, shape: tuple[int, ...], ways: dict[str, Any], turns: int) -> dict[str, Any]:
    own, served = [], []
    for turn in range(turns + 1):
        began = time.perf_counter()
        expected = leader.sample(shape=shape, steps=STEPS, seed=turn)
        middle = time.perf_counter()
        run = client.submit(shape=shape, steps=STEPS, seed=turn, **ways)
        for _ in run.progress():
            continue
        result = run.result(60)
        ended = time.perf_counter()
        if not torch.equal(result.samples, expected.samples):
            raise RuntimeError("the server's samples are not the leader's")
        if turn:  # the first warms up
            own.append(middle - began - expected.seconds)
            served.append(ended - middle - result.seconds)
    added = [beyond - without for without, beyond in zip(own, served, strict=True)]
    rows = {"leader": own, "server": served, "added": added}
    return {name: {"p50": percentile(times, 50), "p95": percentile(times, 95)} for name, times in rows.items()}


def table(figures: dict[str, Any]) -> Table:
    """Return the table."""
    title = f"Beyond a run of {figures['steps']} steps on {figures['device']}, ms ({figures['turns']} turns)"
    shown = Table(title=title)
    for column in ("samples", "leader: p50", "p95", "server: p50", "p95", "the server adds: p50", "p95"):
        shown.add_column(column, justify="left" if column == "samples" else "right")
    for name, case in figures["cases"].items():
        cells = [f"{case[row][q] * 1e3:.2f}" for row in ("leader", "server", "added") for q in ("p50", "p95")]
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    console().print_json(data=machine())
    console().print(table(measure()))


if __name__ == "__main__":
    main()
