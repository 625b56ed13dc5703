"""`drp simulate`: the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from drp.cli.helpers import parse_offsets, plain_errors, print_json
from drp.cli.options import NumberRange, common_options, force_option, json_option, trace_option
from drp.cli.output import check_file
from drp.sampling.mode_selection import DEFAULT_TOLERANCE, MODE_NAMES

if TYPE_CHECKING:
    from drp.simulate import Costs, Link, Outcome, SimulatedDevice

ABOVE_ZERO = click.IntRange(1)
NOT_NEGATIVE = NumberRange(0)


@click.command()
@click.option("-d", "--devices", default="8xemulated:20ms", show_default=True, help="Devices, as in `drp sample`.")
@click.option(
    "--distribution",
    type=click.Choice(["normal", "lognormal", "exponential"]),
    default="normal",
    show_default=True,
    help="Distribution of the jitter.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, exists=True),
    help="Trace from which to take the costs and the devices' times.",
)
@click.option("--message", default="50us", show_default=True, help="Without --from: time of the leader per message.")
@click.option(
    "--row", default="10us", show_default=True, help="Without --from: time of the leader per row of its arithmetic."
)
@click.option("--wake", default="100us", show_default=True, help="Without --from: time for a process to wake up.")
@click.option("--link", help="Link to workers on other machines: latency and bandwidth, such as 200us@1GB/s.")
@click.option("--latent", default="64KiB", show_default=True, help="With --link: size of a draft.")
@click.option("--encryption", help="With --link: encryption rate per core, such as 730MB/s; none by default.")
@click.option(
    "--dispatch",
    type=click.Choice(["auto", "sync", "async"]),
    default="auto",
    show_default=True,
    help="Dispatch of the runs, with --from also of those in the trace; auto: async unless the policy hedges.",
)
@click.option("-m", "--mode", type=click.Choice(MODE_NAMES), default="window", show_default=True)
@click.option("--drafts", type=ABOVE_ZERO, help="Drafts per round; by default one per device.")
@click.option("--stride", type=NumberRange(1), help="Steps by which mode window advances.")
@click.option("--offsets", help="Steps ahead of the drafts in mode window: a name, or numbers.")
@click.option(
    "-p",
    "--policy",
    default="load-adaptive",
    show_default=True,
    help="Policies by name, or all; see drp.leader.scheduling.policies.",
)
@click.option("-n", "--steps", type=ABOVE_ZERO, default=48, show_default=True, help="Steps of each run.")
@click.option("-r", "--runs", type=ABOVE_ZERO, default=200, show_default=True, help="Number of runs.")
@click.option(
    "--rate",
    type=NOT_NEGATIVE,
    default=0.0,
    help="Arrivals per second; by default each run starts when the previous one has ended.",
)
@click.option("--users", type=ABOVE_ZERO, default=1, show_default=True, help="Without --rate: runs at the same time.")
@click.option("--mtbf", type=NOT_NEGATIVE, default=0.0, help="Mean seconds between a device's failures; 0 for none.")
@click.option(
    "--restart",
    type=NOT_NEGATIVE,
    default=10.0,
    show_default=True,
    help="Seconds until a failed device is available again.",
)
@click.option("--price", type=NOT_NEGATIVE, default=0.0, help="Price of a device per hour.")
@click.option(
    "--tolerance", type=NOT_NEGATIVE, default=DEFAULT_TOLERANCE, show_default=True, help="Tolerance of mode adaptive."
)
@click.option(
    "--staleness",
    type=NOT_NEGATIVE,
    default=5e-5,
    show_default=True,
    help="Residual of a draft one step ahead, for mode adaptive.",
)
@click.option("--best", is_flag=True, help="Try 1, 2, 4, ... devices and print which number has the least latency.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random numbers.")
@trace_option
@force_option
@json_option
@common_options
def simulate(
    devices: str,
    distribution: str,
    source: Path | None,
    message: str,
    row: str,
    wake: str,
    link: str | None,
    latent: str,
    encryption: str | None,
    dispatch: str,
    mode: str,
    drafts: int | None,
    stride: float | None,
    offsets: str | None,
    policy: str,
    steps: int,
    runs: int,
    rate: float,
    users: int,
    mtbf: float,
    restart: float,
    price: float,
    tolerance: float,
    staleness: float,
    best: bool,
    seed: int,
    trace: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Simulate runs on up to 1,024 devices: latency, throughput, utilisation and cost by policy."""
    with plain_errors():
        from dataclasses import replace

        from drp.leader.events import Timeline
        from drp.leader.scheduling.policies import POLICIES, find_policy
        from drp.sampling.mode_selection import make_mode
        from drp.simulate import Workload, make_devices
        from drp.simulate import simulate as run
        from drp.simulate.devices import repeated
        from drp.trace.events import write

        if trace is not None:
            check_file(trace, force)
        network = _network(link, latent, encryption, dispatch)
        given, costs = _costs(make_devices(devices, distribution), source, (message, row, wake), dispatch)
        given = tuple(replace(device, mtbf=mtbf, restart=restart) for device in given)
        counts = [n for n in (2**i for i in range(11)) if n < len(given)] + [len(given)] if best else [len(given)]
        rows: list[dict[str, Any]] = []
        for name in POLICIES if policy == "all" else policy.split(","):
            chosen = find_policy(name)
            if dispatch == "async" and chosen.hedge is not None:
                raise ValueError(f"policy {name!r} hedges, which needs synchronous dispatch; give --dispatch auto")
            way = "sync" if dispatch == "sync" or chosen.hedge is not None or network is not None else "async"
            for count in counts:
                made = make_mode(mode, drafts or count, tolerance, "damped", stride, parse_offsets(offsets))
                load, timeline = Workload(made, steps, runs, rate, users), Timeline()
                outcome = run(repeated(given, count), chosen, load, costs[way], seed, staleness, timeline, network)
                cost = {"cost_per_run": outcome.cost(price)} if price else {}
                means = {"policy": name, "mode": chosen.schedule(made).name, "devices": count, "dispatch": way}
                rows.append({**means, **_figures(outcome), **cost})
        if trace is not None:  # of the last simulation
            write(trace, timeline, [f"simulated {number}" for number in range(counts[-1])])
        fastest = min(rows, key=lambda row: row["latency_p50_seconds"])
        if as_json:
            print_json(
                {"rows": rows} | ({"best": {key: fastest[key] for key in ("policy", "devices")}} if best else {})
            )
            return
        title = f"{runs} simulated runs of {steps} steps"
        Console(width=max(Console().width, 120)).print(_table(rows, title))
        if best:
            least = f"{fastest['policy']}, {fastest['latency_p50_seconds'] * 1e3:.1f} ms in the median"
            click.echo(f"least latency: {fastest['devices']} device(s), {least}")


def _network(link: str | None, latent: str, encryption: str | None, dispatch: str) -> Link | None:
    """Return the link to workers on other machines, None without --link; raise ValueError for invalid options."""
    from drp.leader.devices import parse_bytes
    from drp.simulate import Link

    if link is None:
        if encryption is not None:
            raise ValueError(f"encryption is {encryption!r}, and there is no link; give --link, such as 200us@1GB/s")
        return None
    found = Link.parse(link, encryption, parse_bytes(latent))
    if dispatch == "async":
        raise ValueError("workers on other machines are sent drafts synchronously; give --dispatch sync")
    return found


def _costs(
    devices: tuple[SimulatedDevice, ...], source: Path | None, times: tuple[str, str, str], dispatch: str
) -> tuple[tuple[SimulatedDevice, ...], dict[str, Costs]]:
    """Return the devices with their measured times, and the costs by dispatch: of a trace, or of given times."""
    from drp.leader.devices import parse_time
    from drp.simulate import Costs
    from drp.simulate.devices import measured
    from drp.trace.events import read

    if source is None:
        message, row, wake = map(parse_time, times)
        return devices, {each: Costs.constant(message, row, wake, each) for each in ("sync", "async")}
    events, names, _ = read(source)
    costs = Costs.measured(events, names, "async" if dispatch == "auto" else dispatch)
    if not all(name.startswith("emulated:") for name in names):
        devices = measured(devices, events)
    return devices, dict.fromkeys(("sync", "async"), costs)


def _figures(outcome: Outcome) -> dict[str, float]:
    return {
        "median_seconds": outcome.median,
        "mean_seconds": outcome.mean,
        "latency_p50_seconds": outcome.latency(50),
        "latency_p95_seconds": outcome.latency(95),
        "runs_per_second": outcome.throughput,
        "utilisation": outcome.utilisation,
    }


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    priced = ("cost a run",) if "cost_per_run" in rows[0] else ()
    head = (
        "policy",
        "mode",
        "devices",
        "run, ms: median",
        "mean",
        "latency, ms: p50",
        "p95",
        "runs/s",
        "computing",
        *priced,
    )
    table = Table(*head, title=title)
    times = ("median_seconds", "mean_seconds", "latency_p50_seconds", "latency_p95_seconds")
    for row in rows:
        table.add_row(
            *(row["policy"], row["mode"], str(row["devices"]), *(f"{row[name] * 1e3:.1f}" for name in times)),
            *(f"{row['runs_per_second']:.3g}", f"{row['utilisation']:.1%}"),
            *((f"{row['cost_per_run']:.3g}",) if priced else ()),
        )
    return table
