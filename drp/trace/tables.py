"""A summary as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from drp.trace.summary import Summary

MOST = 20
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
    for path in summary.paths[:MOST]:
        parts = (f"{getattr(path, part) * 1e3:.1f}" for part in PARTS)
        runs.add_row(str(path.run), f"{path.wall * 1e3:.1f}", str(path.rounds), str(path.evaluations), *parts)
    if len(summary.paths) > MOST:
        rest = summary.paths[MOST:]
        walls = sum(path.wall for path in rest) * 1e3
        runs.add_row(f"{len(rest)} more", f"{walls:.1f}", *(str(_sum(rest, p)) for p in ("rounds", "evaluations")))
    lanes = Table(
        *("worker", "device", "evaluations", "time, ms", *SHARES),
        title="How each device spent the time of the runs",
        caption="waiting: answered, until the next drafts are formed, for the slowest device above all; idle: no draft "
        "was for it",
    )
    for number, lane in enumerate(summary.workers):
        shares = (f"{getattr(lane, part) / lane.total:.1%}" if lane.total else "" for part in SHARES)
        lanes.add_row(str(number), lane.device, str(lane.evaluations), f"{lane.total * 1e3:.1f}", *shares)
    return [runs, lanes]


def _sum(rows: Sequence[object], name: str) -> int:
    return sum(getattr(row, name) for row in rows)
