"""What does a round lose on other machines' workers, by carrier? `python -m bench.carriers`, with Ray on this machine.

A Ray cluster of a head and two nodes, here all on one machine; emulated devices; the same aggressive runs for all
carriers, one after the other in several turns, each result compared with the reference. A round's loss is its time
beyond its slowest evaluation.
The last line is the simulator's, for the link that `drp doctor --ray` measures to the same cluster.
The results are added to bench/results/carriers.json.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench.figures import console, machine
from bench.rounds import RunTime, split, summary
from bench.transports.actors import Actors
from bench.transports.base import Transport, Work
from bench.transports.graph import Graph
from bench.transports.ours import Ours
from bench.transports.remote import OnRay, OverTcp
from drp.doctor_network import measure as measure_network
from drp.leader.ray import on_ray
from drp.leader.scheduling.policies import Barrier
from drp.sampling.modes import Aggressive
from drp.simulate import Link, Workload, make_devices, simulate

RESULTS = Path(__file__).with_name("results") / "carriers.json"
NODES = 2
NAMES = {Ours: "drp on one machine", Actors: "Ray actor calls"}
CARRIERS: dict[str, type[Transport]] = {
    "local": Ours,
    "tcp": OverTcp,
    "curve": OnRay,
    "graph": Graph,
    "calls": Actors,
}


@contextmanager
def cluster(cpus: int) -> Iterator[None]:
    """Start a head and two nodes with so many cores each, and connect to them."""
    ray, utils = importlib.import_module("ray"), importlib.import_module("ray.cluster_utils")
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            made.add_node(num_cpus=cpus)
        ray.init(address=made.address, log_to_driver=False, configure_logging=False)
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def measure(work: Work, kinds: Sequence[type[Transport]], turns: int, runs: int) -> dict[str, dict[str, float]]:
    """Return the figures of each carrier, measured in turn; each turn's first run warms up.

    Only one carrier's workers live at a time: the idle actors of a compiled graph poll, which delays other carriers.
    """
    times: dict[str, list[RunTime]] = {NAMES.get(kind, kind.name): [] for kind in kinds}
    expected = work.reference()
    for _ in range(turns):
        for found, kind in zip(times.values(), kinds, strict=True):
            with closing(kind(work)) as carrier:
                found += _times(carrier, runs, expected)
    return {name: summary(found, work.count) for name, found in times.items()}


def _times(carrier: Transport, runs: int, expected: Tensor) -> list[RunTime]:
    times = []
    for run in range(runs + 1):
        if not torch.equal(carrier.sample(), expected):
            raise RuntimeError(f"{NAMES.get(type(carrier), carrier.name)} computes other samples than the reference")
        if run:
            times.append(split(carrier.timeline))
    return times


def simulated(work: Work, nbytes: int, link: str) -> dict[str, float]:
    """Return what the simulator says that a round loses on workers over a link."""
    load, devices = Workload(Aggressive(work.count), work.steps, 1), make_devices(f"{work.count}x{work.device}")
    network = Link.parse(link, None, nbytes)
    slow, fast = (simulate(devices, Barrier(), load, link=each).median for each in (network, None))
    lost = (slow - fast) / (1 + math.ceil((work.steps - 1) / work.count))
    return {"lost_p50": lost, "lost_p95": lost}


def table(found: dict[str, dict[str, dict[str, float]]], work: Work) -> Table:
    """Return the loss of a round by carrier and size."""
    title = f"Lost a round of {work.count} drafts, {work.count} x {work.device}, ms: p50 (p95)"
    shown = Table("", *found, title=title)
    for name in next(iter(found.values())):
        rows = [figures[name] for figures in found.values()]
        shown.add_row(name, *(f"{row['lost_p50'] * 1e3:.1f} ({row['lost_p95'] * 1e3:.1f})" for row in rows))
    return shown


@click.command()
@click.option("-d", "--devices", default=8, show_default=True, help="Emulated devices of each carrier.")
@click.option("--time", "device_time", default="20ms", show_default=True, help="Of an evaluation.")
@click.option("--sizes", default="64,256", show_default=True, help="Of a draft, in KiB.")
@click.option("--turns", default=3, show_default=True, help="Times that each carrier's workers are started.")
@click.option("--runs", default=3, show_default=True, help="Runs of each carrier in a turn, after one to warm up.")
@click.option("--steps", default=49, show_default=True)
@click.option("--carriers", default=",".join(CARRIERS), show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    devices: int, device_time: str, sizes: str, turns: int, runs: int, steps: int, carriers: str, out: Path
) -> None:
    """Measure."""
    torch.set_num_threads(1)
    kinds = [CARRIERS[name] for name in carriers.split(",")]
    facts, found = machine(), {}
    with cluster(math.ceil(3 * devices / NODES)):
        link = measure_network(on_ray(workers=devices, device="cpu")).link
        for size in map(int, sizes.split(",")):
            shape = (size * 1024 // 4 // 64**2, 64, 64)
            work = Work(f"emulated:{device_time}", devices, steps=steps, shape=shape)
            found[f"{size} KiB"] = measure(work, kinds, turns, runs)
            found[f"{size} KiB"][f"simulated: {link}"] = simulated(work, size * 1024, link)
    console().print(table(found, work))
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": facts,
        "devices": f"{devices} x {work.device}",
        "turns": turns,
        "runs": runs,
        "link": link,
        "sizes": found,
    }
    records = json.loads(out.read_text()) if out.exists() else []
    out.write_text(json.dumps([*records, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
