"""What a simulation consists of and results in: runs, workers, and the outcome."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from drp.simulate.devices import SimulatedDevice
from drp.simulate.schedule import Schedule, ScheduledDraft

LATENCY_HISTORY = 32
"""Number of recent evaluations whose times are kept, for the median."""


@dataclass
class SimulatedRun:
    """A simulated run, from its arrival to its end. Times are in seconds."""

    number: int
    arrived: float
    schedule: Schedule
    steps: int
    began: float = 0.0
    ended: float = 0.0
    evaluations: int = 0
    waiting: deque[ScheduledDraft] = field(default_factory=deque)
    outstanding: set[ScheduledDraft] = field(default_factory=set)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_HISTORY))
    needs_refine: int | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def latency(self) -> float:
        return self.ended - self.arrived

    @property
    def median_latency(self) -> float | None:
        """The median time of recent evaluations in seconds; None while there are fewer than 4."""
        return statistics.median(self.recent) if len(self.recent) >= 4 else None


@dataclass
class SimulatedWorker:
    """A simulated worker: the drafts that it has, and until when it is busy with them.

    `generation` increases when the worker dies, and is negative while its death is scheduled.
    """

    number: int
    device: SimulatedDevice
    drafts: deque[tuple[SimulatedRun, ScheduledDraft]] = field(default_factory=deque)
    since: float = 0.0
    free_at: float = 0.0
    fails_at: float = float("inf")
    ready: bool = True
    generation: int = 0
    computed: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation. Times are in seconds.

    runs: the runs in the order of their ends.
    devices: the number of devices.
    duration: from the first arrival to the last end.
    computed: the devices' time in evaluations, including lost and unnecessary ones.
    hedged: the number of drafts sent to a second worker.
    lost: the number of workers lost.
    """

    runs: tuple[SimulatedRun, ...]
    devices: int
    duration: float
    computed: float
    hedged: int
    lost: int

    @property
    def throughput(self) -> float:
        return len(self.runs) / self.duration

    @property
    def utilisation(self) -> float:
        """The share of the devices' time that was spent computing."""
        return self.computed / (self.devices * self.duration)

    def latency(self, percentile: float) -> float:
        """Return a percentile of the time from arrival to end."""
        times = sorted(run.latency for run in self.runs)
        return times[min(len(times) - 1, int(len(times) * percentile / 100))]

    @property
    def median(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def mean(self) -> float:
        return statistics.fmean(run.seconds for run in self.runs)

    def cost(self, price: float) -> float:
        """Return the cost per run if each device costs `price` per hour, busy or idle."""
        return price * self.devices * self.duration / 3600 / len(self.runs)
