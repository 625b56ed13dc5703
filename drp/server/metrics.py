"""The server's metrics, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from drp.leader.leader import WorkerStatus
from drp.protocol.client_messages import Status
from drp.sampling.result import Result

EDGES: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histograms' buckets, in seconds."""


@dataclass
class Histogram:
    """A histogram of durations."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(EDGES, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        found, so_far = [], 0
        for edge, count in zip([*map(str, EDGES), "+Inf"], self.counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{le="{edge}"}} {so_far}')
        return [*found, f"{name}_sum {self.total!r}", f"{name}_count {so_far}"]


@dataclass
class Counts:
    """The server's counters, which only grow."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    lost_clients: int = 0
    bad_messages: int = 0
    unacknowledged: int = 0
    steps: int = 0
    rounds: int = 0
    evaluations: int = 0
    device_seconds: float = 0.0
    request_seconds: Histogram = field(default_factory=Histogram)
    waited_seconds: Histogram = field(default_factory=Histogram)

    def add(self, result: Result, taken: float, waited: float) -> None:
        """Count a finished run. `taken` are the seconds from Submit to its end, `waited` those before it started."""
        self.finished += 1
        self.steps += result.steps
        self.rounds += result.rounds
        self.evaluations += result.evaluations
        self.device_seconds += result.device_seconds
        self.request_seconds.add(taken)
        self.waited_seconds.add(waited)


def server_gauges(
    now: Status, workers: Sequence[WorkerStatus], dropped: int, unacknowledged: int
) -> dict[str, tuple[str, float]]:
    """Return the metrics of the server's current state: name -> (description, value).

    Args:
        now: the server's status.
        workers: the status of the leader's workers.
        dropped: the number of messages that the leader has dropped.
        unacknowledged: the number of results in shared memory that clients have not read.
    """
    return {
        "requests": ("Current requests, including waiting ones.", now.requests),
        "requests_limit": ("Maximum number of concurrent requests.", now.max_requests),
        "clients": ("Current sessions.", now.clients),
        "workers": ("Workers of the leader.", len(workers)),
        "workers_ready": ("Workers that accept drafts.", sum(worker.state == "ready" for worker in workers)),
        "workers_lost_total": ("Workers lost, and replaced or given up.", sum(worker.losses for worker in workers)),
        "dropped_messages_total": ("Messages to the leader that were malformed or from unknown senders.", dropped),
        "untaken_results": ("Results in shared memory that clients have not read.", unacknowledged),
        "healthy": ("1 if requests progress or there are none.", int(now.healthy)),
        "draining": ("1 if the server refuses requests because it is about to end.", int(now.state != "serving")),
        "since_progress_seconds": ("Seconds since the last progress; 0 without requests.", now.since_progress),
        "uptime_seconds": ("Seconds since the server started.", now.uptime),
    }


def prometheus(counts: Counts, gauges: Mapping[str, tuple[str, float]]) -> str:
    """Return the metrics as text. `gauges` are additional metrics: name -> (description, value)."""
    lines: list[str] = []

    def metric(name: str, kind: str, what: str, samples: list[str]) -> None:
        lines.extend([f"# HELP drp_{name} {what}", f"# TYPE drp_{name} {kind}", *samples])

    outcomes = [("finished", counts.finished), ("cancelled", counts.cancelled), ("failed", counts.failed)]
    outcomes.append(("refused", counts.refused))
    metric(
        "requests_total",
        "counter",
        "Requests that are over, by how.",
        [f'drp_requests_total{{outcome="{outcome}"}} {count}' for outcome, count in outcomes],
    )
    for name, what, value in (
        ("lost_clients_total", "Clients whose connection broke or who did not read.", counts.lost_clients),
        ("bad_messages_total", "Messages that broke the protocol.", counts.bad_messages),
        (
            "untaken_results_total",
            "Results in shared memory given back because no client took them.",
            counts.unacknowledged,
        ),
        ("steps_total", "Steps of finished runs.", counts.steps),
        ("rounds_total", "Evaluations of finished runs that had to follow one another.", counts.rounds),
        ("evaluations_total", "Evaluations of the denoiser in finished runs.", counts.evaluations),
        ("device_seconds_total", "Seconds in the denoiser, of all workers, in finished runs.", counts.device_seconds),
    ):
        metric(name, "counter", what, [f"drp_{name} {value!r}"])
    for name, what, histogram in (
        ("request_seconds", "From Submit to the end of requests that finished.", counts.request_seconds),
        ("waited_seconds", "From Submit to the beginning of runs that finished.", counts.waited_seconds),
    ):
        metric(name, "histogram", what, histogram.lines(f"drp_{name}"))
    for name, (what, value) in gauges.items():
        metric(name, "counter" if name.endswith("_total") else "gauge", what, [f"drp_{name} {value!r}"])
    return "\n".join(lines) + "\n"
