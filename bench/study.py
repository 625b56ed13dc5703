"""Which policy, on how many devices? The figures and the picture of docs/study.md, with one command.

    make study

Simulated are: speed-ups on up to 64 devices, and stragglers. Emulated devices, in real processes, are beside them for
2, 4 and 8. Samples and their distances are of the real `digits` model. About ten minutes on 2 cores.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

import drp
from bench import figures as facts
from bench import plot, simulated
from bench.figures import console
from drp.leader import ExecutionOptions, Leader, LeaderOptions
from drp.leader.events import Timeline
from drp.leader.scheduling.policies import POLICIES
from drp.sampling.modes import Aggressive, Conservative, Mode, Rolling
from drp.simulate import Costs, Workload, make_devices, simulate
from drp.simulate.devices import repeated

RESULTS = Path(__file__).with_name("results")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
DEVICE, JITTER = "emulated:20ms", "emulated:20ms:jitter=10%"
LATE = ":straggler=3x@5%"
STRAGGLER_STEPS, STRAGGLER_DEVICES = 50, 8
STRAGGLING = (
    ("barrier", 8),
    ("rolling", 8),
    ("rolling", 10),
    ("hedged", 8),
    ("rolling-hedged", 8),
    ("rolling-hedged", 10),
)
EMULATED_STRAGGLING = (("barrier", 8), ("rolling", 10), ("rolling-hedged", 8))


def speedups(costs: Costs, runs: int) -> dict[str, Any]:
    """Simulate 48 steps on 1 to 64 devices under jitter; the time of one device without anything else over a run's."""
    found: dict[str, Any] = {}
    for name, policy in POLICIES.items():
        found[name] = [
            48
            * 0.02
            / simulate(repeated(make_devices(JITTER), n), policy, Workload(Aggressive(n), 48, runs), costs).median
            for n in COUNTS
        ]
    return found


def quality(costs: Costs, runs: int) -> list[dict[str, Any]]:
    """Return of each schedule the simulated time on n devices, and the real samples' distance to the sequential run."""
    labels = list(range(10))
    exact = drp.reference("digits", labels=labels, mode="sequential").samples
    modes: list[tuple[str, int, Mode]] = []
    for n in (2, 4, 8):
        modes += [("aggressive", n, Aggressive(n)), ("conservative", n, Conservative(n)), ("rolling", n, Rolling(n))]
    modes.append(("rolling", 10, Rolling(10)))
    rows = []
    for name, n, mode in modes:
        samples = drp.reference("digits", labels=labels, mode=mode).samples
        apart = (samples - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        devices = repeated(make_devices(JITTER), min(n, 8))
        policy = POLICIES["rolling" if name == "rolling" else "barrier"]
        took = simulate(devices, policy, Workload(mode, 48, runs), costs).median
        rows.append({"mode": name, "n": n, "seconds": took, "distance": float(apart.mean())})
    return rows


def stragglers(costs: Costs, runs: int) -> list[dict[str, Any]]:
    """Simulate one of 8 devices that is late, each of them in turn; return the mean seconds that this costs."""
    rows = []
    for name, n in STRAGGLING:
        load = Workload(Aggressive(n), STRAGGLER_STEPS, runs)

        def mean(which: int | None, name: str = name, load: Workload = load) -> float:
            devices = [DEVICE + (LATE if k == which else "") for k in range(STRAGGLER_DEVICES)]
            return simulate(make_devices(devices), POLICIES[name], load, costs).mean

        whole = mean(None)
        late = statistics.fmean(mean(which) for which in range(STRAGGLER_DEVICES))
        rows.append({"policy": name, "n": n, "seconds": whole, "lost": late - whole})
    return rows


def emulated_stragglers(runs: int) -> list[dict[str, Any]]:
    """Measure the same on emulated devices, the fifth being late; all in turn on the same workers."""
    devices = [DEVICE] * STRAGGLER_DEVICES
    late = [*devices[:4], DEVICE + LATE, *devices[5:]]
    took: dict[tuple[str, int, bool], list[float]] = defaultdict(list)
    options = LeaderOptions(execution=ExecutionOptions(dispatch="sync"))
    with (
        Leader(simulated.CHEAP, options, devices=devices) as whole,
        Leader(simulated.CHEAP, options, devices=late) as one_late,
    ):
        for turn, (name, n), leader in itertools.product(range(runs + 1), EMULATED_STRAGGLING, (whole, one_late)):
            leader.policy = name
            result = leader.sample(shape=simulated.SHAPE, steps=STRAGGLER_STEPS, mode="aggressive", drafts=n)
            if turn:  # the first warms up
                took[name, n, leader is one_late].append(result.seconds)
    rows = []
    for name, n in EMULATED_STRAGGLING:
        whole_runs, late_runs = took[name, n, False], took[name, n, True]
        lost = [b - a for a, b in zip(whole_runs, late_runs, strict=True)]
        error = statistics.stdev(lost) / len(lost) ** 0.5
        mean = statistics.fmean(whole_runs)
        rows.append({"policy": name, "n": n, "seconds": mean, "lost": statistics.fmean(lost), "error": error})
    return rows


def calibrate(runs: int) -> Costs:
    """Measure what the leader, the messages and waking up cost, on 8 emulated devices with a barrier."""
    marks: Timeline = []
    execution = ExecutionOptions(dispatch="sync")
    with Leader(simulated.CHEAP, devices=[DEVICE] * 8, policy="barrier", execution=execution) as leader:
        for turn in range(runs + 1):
            for mode in ("aggressive", "conservative"):
                timeline = simulated.run(leader, 48, mode, 8)
                marks += timeline if turn else []
    return Costs.measured(marks, [DEVICE] * 8)


def tables(figures: dict[str, Any]) -> list[Table]:
    """Return all figures as tables."""
    speed = Table("policy", *map(str, COUNTS), title="Simulated speed-up, 48 steps, n devices, jitter 10 %")
    for name, row in figures["speedup"].items():
        speed.add_row(name, *(f"{value:.2f}" for value in row))
    good = Table(
        "mode", "n", "simulated, ms", "distance", title="Distance of digits to the sequential run, against time"
    )
    for row in figures["quality"]:
        good.add_row(row["mode"], str(row["n"]), f"{row['seconds'] * 1e3:.1f}", f"{row['distance']:.4f}")
    found = [speed, good]
    for kind in ("simulated", "emulated"):
        title = f"One of 8 devices 3 times as slow in 5 % of its evaluations, {STRAGGLER_STEPS} steps, {kind}"
        late = Table("policy", "drafts", "mean without, ms", "lost, ms", "of the barrier's", title=title)
        rows = figures["stragglers"][kind]
        for row in rows:
            share = row["lost"] / rows[0]["lost"]
            error = f" +- {row['error'] * 1e3:.1f}" if "error" in row else ""  # standard error of the mean
            late.add_row(
                *(row["policy"], str(row["n"])),
                *(f"{row['seconds'] * 1e3:.1f}", f"{row['lost'] * 1e3:.2f}{error}", f"{share:.0%}"),
            )
        found.append(late)
    return found


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG of four plots."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    picture, ((speed, good), (agree, late)) = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for name, row in figures["speedup"].items():
        if name not in ("eager", "load-adaptive"):  # in the aggressive mode, with one run, both are the barrier
            shares = [value * len(list(Aggressive(n).rounds(48))) / 48 for n, value in zip(COUNTS, row, strict=True)]
            speed.plot(COUNTS, shares, "o-", label=name)
    speed.set(
        xlabel="devices, one draft each (simulated)",
        ylabel="share of the speed-up that rounds allow",
        title="48 steps, devices of 20 ms with jitter 10 %",
        xscale="log",
        xticks=COUNTS,
        xticklabels=COUNTS,
    )
    speed.legend()
    for mode in ("aggressive", "conservative", "rolling"):
        rows = [row for row in figures["quality"] if row["mode"] == mode]
        good.plot([r["seconds"] * 1e3 for r in rows], [r["distance"] for r in rows], "o-", label=mode)
        for row in rows:
            good.annotate(f" {row['n']}", (row["seconds"] * 1e3, row["distance"]))
    good.set(
        xlabel="time on n devices, ms (simulated)",
        ylabel="relative L2 to the sequential run",
        title="digits, 48 steps of DDIM",
        yscale="log",
    )
    good.legend()
    for n, found in figures["agreement"].items():
        engine, model = ([row[k] * 1e3 for row in found.values()] for k in ("engine", "simulator"))
        agree.plot(engine, model, "o", label=f"{n} devices")
    most = max(row["engine"] * 1e3 for found in figures["agreement"].values() for row in found.values())
    agree.plot([0, most], [0, most], "k--", linewidth=0.8)
    agree.set(xlabel="engine on emulated devices, median ms", ylabel="simulator, median ms", title="every policy")
    agree.legend()
    rows = figures["stragglers"]["simulated"]
    names = [f"{row['policy']}, {row['n']}" for row in rows]
    late.barh(names, [row["lost"] * 1e3 for row in rows], color="lightgray", label="simulated")
    measured = figures["stragglers"]["emulated"]
    places = [f"{row['policy']}, {row['n']}" for row in measured]
    errors = [row["error"] * 1e3 for row in measured]
    lost = [row["lost"] * 1e3 for row in measured]
    late.errorbar(lost, places, xerr=errors, fmt="o", color="tab:blue", label="emulated devices, standard error")
    late.set(xlabel="lost on average, ms", title=f"one of 8 devices 3x as slow at 5 %, {STRAGGLER_STEPS} steps")
    late.invert_yaxis()
    late.legend()
    picture.savefig(path, dpi=110)
    plt.close(picture)


@click.command()
@click.option("--turns", default=15, show_default=True, help="Runs of each kind on emulated devices.")
@click.option("--late-turns", default=150, show_default=True, help="The same, with a straggler.")
@click.option("--runs", default=200, show_default=True, help="Simulated runs of each kind.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS / "study.json", show_default=False)
def main(turns: int, late_turns: int, runs: int, out: Path) -> None:
    """Measure, simulate, print and draw."""
    torch.set_num_threads(1)
    costs = calibrate(turns)
    figures: dict[str, Any] = {
        "machine": facts.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "speedup": speedups(costs, runs),
        "quality": quality(costs, runs),
        "agreement": {n: simulated.measure(n, turns) for n in (2, 4, 8)},
        "stragglers": {"simulated": stragglers(costs, runs), "emulated": emulated_stragglers(late_turns)},
    }
    console().print(*tables(figures), simulated.table(figures["agreement"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")
    if plot.available():
        draw(figures, out.with_suffix(".png"))
    else:
        console().print("no picture: matplotlib is missing; pip install 'drp\\[plots]'")


if __name__ == "__main__":
    main()
