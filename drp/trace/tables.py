"""A summary as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from drp.trace.summary import Summary

MAX_LISTED_RUNS = 20
"""Maximum number of runs listed individually."""
PARTS = ("compute", "transfer", "arithmetic", "sending", "queue", "end")
SHARES = ("compute", "transfer", "waiting", "leader", "idle")


def tables(summary: Summary) -> list[Table]:
    """Return the tables of the runs' critical paths and of the devices' times."""
    runs = Table(
        *("run", "wall, ms", "rounds", "evaluations", *PARTS),
        title="What each run had to wait for, ms",
        caption="arithmetic, sending and end are the leader's; the parts add up to the wall time",
    )
    for path in summary.paths[:MAX_LISTED_RUNS]:
        parts = (f"{getattr(path, part) * 1e3:.1f}" for part in PARTS)
        runs.add_row(str(path.run), f"{path.wall * 1e3:.1f}", str(path.rounds), str(path.evaluations), *parts)
    if len(summary.paths) > MAX_LISTED_RUNS:
        rest = summary.paths[MAX_LISTED_RUNS:]
        walls = sum(path.wall for path in rest) * 1e3
        runs.add_row(f"{len(rest)} more", f"{walls:.1f}", *(str(_sum(rest, p)) for p in ("rounds", "evaluations")))
    workers = Table(
        *("worker", "device", "evaluations", "time, ms", *SHARES),
        title="How each device spent the time of the runs",
        caption="waiting: from its prediction until those that its next draft depends on are complete, mostly for the "
        "slowest device; idle: none of the last drafts was for it",
    )
    for number, worker in enumerate(summary.workers):
        shares = (f"{getattr(worker, part) / worker.total:.1%}" if worker.total else "" for part in SHARES)
        workers.add_row(str(number), worker.device, str(worker.evaluations), f"{worker.total * 1e3:.1f}", *shares)
    return [runs, workers]


def _sum(rows: Sequence[object], name: str) -> int:
    return sum(getattr(row, name) for row in rows)
