"""Does the simulator agree with the engine? Every policy on 2, 4 and 8 emulated devices, with and without jitter.

    python -m bench.simulated

All are run in turn on the same workers, so that what else the machine does falls on all alike. The simulator is told
what the leader, the messages and waking up cost on this machine, by the trace of runs with a barrier, in the aggressive
and in the conservative mode, without jitter. Everything else it predicts. The draws of the devices' times are the same.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from typing import Any

import click
import torch
from rich.table import Table

from bench.figures import console
from drp.leader import ExecutionOptions, Leader, LeaderOptions
from drp.leader.events import Timeline
from drp.leader.scheduling.policies import POLICIES
from drp.sampling.modes import Aggressive
from drp.simulate import Costs, Workload, make_devices, simulate

CHEAP = "drp.workers.emulated:load"
SHAPE = (4, 64, 64)
JITTER = {"none": "emulated:20ms", "10 %": "emulated:20ms:jitter=10%"}


def measure(n: int, turns: int, steps: int = 48, dispatch: str = "sync") -> dict[str, Any]:
    """Return the medians of the engine's runs and of the simulator's by jitter and policy, in seconds."""
    policies = {name: policy for name, policy in POLICIES.items() if dispatch == "sync" or policy.hedge is None}
    options = LeaderOptions(policy="barrier", execution=ExecutionOptions(dispatch=dispatch))
    marks: Timeline = []
    walls: dict[tuple[str, str], list[float]] = defaultdict(list)
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    with (
        Leader(CHEAP, options, devices=[JITTER["none"]] * n) as steady,
        Leader(CHEAP, options, devices=[JITTER["10 %"]] * n) as varying,
    ):
        leaders = (("none", steady), ("10 %", varying))
        for turn, (jitter, leader), name in itertools.product(range(turns + 1), leaders, policies):
            leader.policy = name
            timeline = run(leader, steps, "aggressive", n)
            if turn:  # the first warms up
                walls[jitter, name].append((timeline[-1].ns - timeline[0].ns) / 1e9)
                numbers[jitter, name].append(timeline[0].run)
            if turn and (jitter, name) == ("none", "barrier"):
                marks += timeline + run(leader, steps, "conservative", n)
    costs = Costs.measured(marks, [JITTER["none"]] * n, dispatch)
    figures: dict[str, Any] = {}
    for (jitter, name), engine in walls.items():
        simulated = [  # run by run: with the draws that the devices had
            simulate(
                make_devices(f"{n}x{JITTER[jitter]}"),
                POLICIES[name],
                Workload(Aggressive(n), steps, 1, first=k),
                costs,
                k,
            ).median
            for k in numbers[jitter, name]
        ]
        figures[f"{jitter}, {name}"] = {
            "engine": statistics.median(engine),
            "simulator": statistics.median(simulated),
        }
    return figures


def run(leader: Leader, steps: int, mode: str, n: int) -> Timeline:
    """Return a run's marks."""
    leader.timeline = timeline = Timeline()
    leader.sample(shape=SHAPE, steps=steps, mode=mode, drafts=n)
    leader.timeline = None
    return [mark for mark in timeline if mark.run == timeline[0].run]


def table(found: dict[int, dict[str, Any]]) -> Table:
    """Return a row for each number of devices, jitter and policy."""
    made = Table(
        *("devices", "jitter, policy", "engine, ms", "simulator, ms", "apart"),
        title="Median run time of 48 steps, emulated devices of 20 ms, one draft each",
    )
    for n, figures in found.items():
        for name, row in figures.items():
            apart = row["simulator"] / row["engine"] - 1
            made.add_row(
                str(n), name, f"{row['engine'] * 1e3:.1f}", f"{row['simulator'] * 1e3:.1f}", f"{apart * 100:+.1f} %"
            )
    return made


@click.command()
@click.option("--turns", default=15, show_default=True, help="Runs of each kind.")
@click.option("--devices", default="2,4,8", show_default=True, help="How many, each in turn.")
@click.option("--dispatch", type=click.Choice(["sync", "async"]), default="sync", show_default=True)
def main(turns: int, devices: str, dispatch: str) -> None:
    """Compare."""
    torch.set_num_threads(1)
    console().print(table({n: measure(n, turns, dispatch=dispatch) for n in map(int, devices.split(","))}))


if __name__ == "__main__":
    main()
