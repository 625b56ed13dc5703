"""What do two runs cost together? Conservative runs, whose lone evaluations leave workers idle for another run.

    python -m bench.interleaved

Alone and two together in turn, on one leader with emulated devices. With as many devices as drafts, even the best
order has to leave gaps: 29 evaluations one after the other for two runs of 48 steps at n = 4 (`best_order`, an
exhaustive search), where one run alone takes 20. A device more, and the lone evaluation of one run fits beside the
other's four drafts: 21.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from rich.table import Table

from bench.figures import console, percentile
from drp.leader import Leader

DEVICE, DRAFTS, STEPS, TURNS = "emulated:20ms:values=cheap", 4, 48, 8
ASKED: dict[str, Any] = {"shape": (1, 28, 28), "steps": STEPS, "mode": "conservative", "drafts": DRAFTS}


def best_order(devices: int, drafts: int = DRAFTS, steps: int = STEPS) -> int:
    """Return the fewest evaluations in a row in which two conservative runs can end, on this many devices."""
    blocks, rest = divmod(steps, drafts + 1)
    stages = [1, drafts] * blocks + [1, rest - 1][: min(rest, 2)]

    def after(stage: int, left: int, done: int) -> tuple[int, int]:
        if left > done:
            return stage, left - done
        return stage + 1, stages[stage + 1] if stage + 1 < len(stages) else 0

    @functools.cache
    def fewest(stage: int, left: int, other: int, other_left: int) -> int:
        if not left and not other_left:
            return 0
        options = []
        for done in range(min(left, devices) + 1):
            too = min(other_left, devices - done)
            if done + too:
                nexts = (
                    (after(stage, left, done) if left else (stage, 0)),
                    (after(other, other_left, too) if other_left else (other, 0)),
                )
                options.append(1 + fewest(*nexts[0], *nexts[1]))
        return min(options)

    return fewest(0, stages[0], 0, stages[0])


def measure(turns: int = TURNS) -> list[dict[str, Any]]:
    """Return, for as many devices as drafts and for one more, the seconds of one run and of two together."""
    found = []
    for devices in (DRAFTS, DRAFTS + 1):
        alone, together = [], []
        with Leader("drp.workers.emulated:load", devices=[DEVICE] * devices) as leader:
            for turn in range(turns + 1):
                began = time.perf_counter()
                rounds = leader.sample(**ASKED).rounds
                one = time.perf_counter()
                for pending in [leader.submit(**ASKED, seed=seed) for seed in range(2)]:
                    pending.result(60)
                two = time.perf_counter()
                if turn:  # the first warms up
                    alone.append(one - began)
                    together.append(two - one)
        ratios = [b / a for a, b in zip(alone, together, strict=True)]
        found.append(
            {
                "devices": devices,
                "alone_p50": percentile(alone, 50),
                "together_p50": percentile(together, 50),
                "ratio_p50": percentile(ratios, 50),
                "best_ratio": best_order(devices) / rounds,
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a row for each number of devices."""
    found = Table(
        *("devices", "one run, ms", "two together, ms", "ratio", "ratio of the best order"),
        title=f"Two conservative runs at once, n = {DRAFTS}, {STEPS} steps, {DEVICE} devices",
    )
    for row in rows:
        found.add_row(
            str(row["devices"]),
            *(f"{row[key] * 1e3:.0f}" for key in ("alone_p50", "together_p50")),
            *(f"{row[key]:.2f}" for key in ("ratio_p50", "best_ratio")),
        )
    return found


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    console().print(table(measure()))


if __name__ == "__main__":
    main()
