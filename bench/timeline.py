"""The picture of the front page: when each device evaluated which step, sequentially and drafted, and the samples.

python -m bench.timeline [--devices 2] [--out docs/timeline.png]

Both runs are real: `digits`, 48 DDIM steps, the same seed, traced. Each is the median of some runs on warm workers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import drp
from drp.sampling.result import Result
from drp.trace.evaluations import TracedEvaluation, evaluations
from drp.trace.record import record

LABELS = tuple(range(10))
RUNS = 3
STEPS = 48


def median_run(devices: str, mode: str, trace: Path) -> tuple[Result, list[TracedEvaluation]]:
    """Return the run of median duration, and its evaluations."""
    found = []
    with drp.Leader("digits", devices=devices) as leader:
        for _ in range(RUNS + 1):
            with record(leader, trace) as timeline:
                result = leader.sample(labels=LABELS, steps=STEPS, mode=mode, seed=0)
            found.append((result, evaluations(list(timeline))))
    return sorted(found[1:], key=lambda run: run[0].seconds)[RUNS // 2]


def draw_run(axes: Axes, title: str, run: tuple[Result, list[TracedEvaluation]], until: float) -> None:
    """Draw a bar for each evaluation, a lane for each device, coloured by its round."""
    result, found = run
    zero = min(e.began for e in found)
    rounds = {id(formed): turn for turn, formed in enumerate({id(e.scheduled): e.scheduled for e in found}.values())}
    colours = matplotlib.colormaps["tab20"]
    for e in found:
        left, width = (e.began - zero) / 1e6, (e.predicted - e.began) / 1e6
        axes.barh(e.worker, width, left=left, height=0.72, color=colours(rounds[id(e.scheduled)] % 20), linewidth=0)
        if width > until / 60:
            axes.text(left + width / 2, e.worker, str(e.step), ha="center", va="center", fontsize=5.5)
    workers = range(len(result.devices))
    axes.set_yticks(workers, [f"device {worker}" for worker in workers])
    axes.set_xlim(0, until * 1.01)
    axes.set_ylim(len(workers) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, labelsize=8)


def draw_samples(axes: Axes, result: Result) -> None:
    """Draw the samples in two rows."""
    rows = result.samples.squeeze(1).clamp(-1, 1).view(2, 5, 28, 28).permute(0, 2, 1, 3).reshape(56, 140)
    axes.imshow(rows, cmap="gray", interpolation="nearest")
    axes.set_axis_off()


def main(devices: int, out: Path, trace: Path) -> None:
    """Run, and write the picture."""
    runs = [median_run("1", "sequential", trace), median_run(str(devices), "aggressive", trace)]
    exact, drafted = (result for result, _ in runs)
    until = exact.seconds * 1e3
    distance = float((drafted.samples - exact.samples).norm() / exact.samples.norm())
    titles: Sequence[str] = (
        f"Sequential: {exact.steps} evaluations, one after the other: {until:.0f} ms",
        f"Drafted, n = {drafted.drafts}: {drafted.rounds} rounds: {drafted.seconds * 1e3:.0f} ms, "
        f"{exact.seconds / drafted.seconds:.2f} times as fast; relative distance of the samples {distance:.4f}",
    )
    figure = plt.figure(figsize=(11, 3.1), dpi=160, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(3.4, 1))[0]
    lanes = left.subplots(2, 1, height_ratios=(1, max(1.4, devices * 0.75)))
    pictures = right.subplots(2, 1)
    for axes, picture, title, run in zip(lanes, pictures, titles, runs, strict=True):
        draw_run(axes, title, run, until)
        draw_samples(picture, run[0])
    lanes[1].set_xlabel("ms since the first evaluation; a number is the step that was evaluated", fontsize=8)
    figure.savefig(out)
    print(*titles, f"wrote {out}", sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/timeline.png"))
    parser.add_argument("--trace", type=Path, default=Path("build/timeline.json"), help="The drafted run's trace.")
    given = parser.parse_args()
    given.trace.parent.mkdir(parents=True, exist_ok=True)
    main(given.devices, given.out, given.trace)
