"""The doctor's measurement of the network between a leader and its workers on other machines."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from dataclasses import dataclass

import torch

from drp.leader.leader import Leader
from drp.leader.remote import RemoteWorkers
from drp.sampling.run import Task

MODEL = "drp.workers.emulated:load_sleep"
"""Its evaluations take 20 ms: processes that have slept, as between the drafts of a run, wake up and answer later than
those that answer at once."""
SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of a draft in the rounds that are measured."""
TURNS = 15
"""Rounds of each size."""


@dataclass(frozen=True)
class NetworkReport:
    """The time of a round of drafts, one per worker, in addition to its evaluations.

    workers: the names of the devices.
    rounds: the median time in seconds, by the bytes of a draft.
    latency: the latency of a message one way in seconds, including the wake-up of the receiving process.
    bandwidth: bytes per second each way of all workers together, including encryption and copies.
    """

    workers: tuple[str, ...]
    rounds: dict[int, float]
    latency: float
    bandwidth: float

    @property
    def link(self) -> str:
        """The link, as `drp simulate --link` takes it."""
        return f"{self.latency * 1e6:.0f}us@{self.bandwidth / 1e6:.0f}MB/s"


def measure(remote: RemoteWorkers) -> NetworkReport:
    """Start a leader with these workers and send drafts of several sizes; raise WorkerError if one does not start."""
    with Leader(MODEL, devices=remote) as leader:
        rounds = {nbytes: _time_lost(leader, nbytes) for nbytes in SIZES}
        workers = leader.devices
    small, large = SIZES[0], SIZES[-1]
    each = max(1e-12, (rounds[large] - rounds[small]) / (large - small))
    latency = max(0.0, rounds[small] - small * each) / 2
    return NetworkReport(workers, rounds, latency, 2 * len(workers) / each)


def _time_lost(leader: Leader, nbytes: int) -> float:
    """Return the median time of a round beyond its workers' mean evaluation, in seconds."""
    count, like = len(leader.devices), torch.zeros(1, nbytes // 4)
    tasks = [Task(number, 0.0, number) for number in range(count)]
    lost = []
    with closing(leader.open_session({"x": like}, {"x": like}, count, {})) as session:
        session.evaluate(tasks)  # The first one binds the memory.
        for _ in range(TURNS):
            evaluated, began = session.device_seconds, time.perf_counter()
            session.evaluate(tasks)
            lost.append(time.perf_counter() - began - (session.device_seconds - evaluated) / count)
    return statistics.median(lost)
