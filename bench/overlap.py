"""What is overlap worth? Rounds with refining under the workers' time, and with refining before the next drafts.

    python -m bench.overlap

Both in turn on one leader with emulated devices: large latents, and a callback that makes a preview of each state.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.figures import console, percentile
from bench.rounds import RunTime, split
from drp.leader import Leader
from drp.leader.events import TraceEvent

DEVICE, DEVICES = "emulated:20ms:values=cheap", 8
SHAPE, STEPS, TURNS = (4, 128, 128), 48, 8


def preview(step: int, state: Tensor) -> None:
    """Make a small picture of the state, as a user interface would."""
    F.interpolate(state[:, :3], size=(64, 64), mode="bilinear").add(1).mul(127.5).clamp(0, 255).byte().numpy()


def refining(timeline: list[TraceEvent]) -> tuple[float, float]:
    """Return the seconds of refining a round, and the share of it before the round's first answer (medians)."""
    seconds, hidden = [], []
    sent = 0
    for i, mark in enumerate(timeline):
        if mark.kind == "sent":
            sent = mark.ns
        elif mark.kind == "refined":
            answers = (later.ns for later in timeline[i:] if later.kind == "answer")
            seconds.append((mark.ns - sent) / 1e9)
            hidden.append(float(mark.ns <= next(answers, 0)))
    return percentile(seconds, 50), sum(hidden) / len(hidden)


def measure(turns: int = TURNS) -> dict[str, Any]:
    """Return efficiency and lost time a round with overlap and without."""
    runs: dict[bool, list[RunTime]] = {True: [], False: []}
    refined: list[tuple[float, float]] = []
    with Leader("drp.workers.emulated:load", devices=[DEVICE] * DEVICES) as leader:
        for turn in range(turns + 1):
            for overlap in runs:
                timeline: list[TraceEvent] = []
                leader.overlap, leader.timeline = overlap, timeline
                leader.sample(shape=SHAPE, steps=STEPS, mode="aggressive", callback=preview)
                if turn:  # the first warms up
                    runs[overlap].append(split(timeline))
                    if overlap:
                        refined.append(refining(timeline))
    figures: dict[str, Any] = {"device": f"{DEVICES} x {DEVICE}", "shape": SHAPE, "steps": STEPS}
    for overlap, times in runs.items():
        figures["overlap" if overlap else "no overlap"] = {
            "efficiency_p50": percentile([run.efficiency for run in times], 50),
            "lost_p50": percentile([r.lost for run in times for r in run.rounds if r.drafts == DEVICES], 50),
        }
    figures["refine_p50"] = percentile([seconds for seconds, _ in refined], 50)
    figures["refined_before_the_first_answer"] = percentile([share for _, share in refined], 50)
    return figures


def table(figures: dict[str, Any]) -> Table:
    """Return a row with overlap and one without."""
    found = Table(
        *("", "efficiency", "lost a round, us"),
        title=f"Refining and previews of {list(figures['shape'])} latents, {figures['device']}",
        caption=f"refining takes {figures['refine_p50'] * 1e6:.0f} us a round; with overlap, "
        f"{figures['refined_before_the_first_answer']:.0%} of it ends before the first worker answers",
    )
    for name in ("overlap", "no overlap"):
        row = figures[name]
        found.add_row(name, f"{row['efficiency_p50']:.3f}", f"{row['lost_p50'] * 1e6:.0f}")
    return found


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    console().print(table(measure()))


if __name__ == "__main__":
    main()
