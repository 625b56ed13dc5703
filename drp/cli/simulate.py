"""The command line of the simulator: `drp simulate`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from drp.cli.helpers import parse_offsets, plain_errors, print_json
from drp.cli.options import Number, common_options, force_option, json_option, trace_option
from drp.cli.output import check_trace
from drp.sampling.mode_selection import MODE_NAMES

ABOVE_ZERO = click.IntRange(1)
NOT_NEGATIVE = Number(0)


@click.command()
@click.option(
    "-d", "--devices", default="8xemulated:20ms", show_default=True, help="As `drp sample --devices` has them."
)
@click.option(
    "--distribution",
    type=click.Choice(["normal", "lognormal", "exponential"]),
    default="normal",
    show_default=True,
    help="Of jitter.",
)
@click.option(
    "--from", "source", type=click.Path(path_type=Path, exists=True), help="Trace: costs, and devices' times."
)
@click.option("--message", default="50us", show_default=True, help="Without a trace: the leader's time a message,")
@click.option("--row", default="10us", show_default=True, help="a row of its arithmetic,")
@click.option("--wake", default="100us", show_default=True, help="and for a process to wake up.")
@click.option("--link", help="Of workers on other machines: latency and the leader's bandwidth, as 200us@1GB/s.")
@click.option("--latent", default="64KiB", show_default=True, help="With --link: bytes of a draft.")
@click.option("--encryption", help="With --link: bytes a second that a core encrypts, as 730MB/s; none by default.")
@click.option(
    "--dispatch",
    type=click.Choice(["auto", "sync", "async"]),
    default="auto",
    show_default=True,
    help="Of the runs; auto: asynchronous unless the policy hedges. With --from: of the runs in the trace.",
)
@click.option("-m", "--mode", type=click.Choice(MODE_NAMES), default="window", show_default=True)
@click.option("--drafts", type=ABOVE_ZERO, help="Drafts a round; by default one a device.")
@click.option("--stride", type=Number(1), help="Of mode window.")
@click.option("--offsets", help="Of mode window: a name, or numbers.")
@click.option(
    "-p", "--policy", default="barrier", show_default=True, help="Names, or all; see drp.leader.scheduling.policies."
)
@click.option("-n", "--steps", type=ABOVE_ZERO, default=48, show_default=True, help="Steps of each run.")
@click.option("-r", "--runs", type=ABOVE_ZERO, default=200, show_default=True, help="Runs.")
@click.option(
    "--rate",
    type=NOT_NEGATIVE,
    default=0.0,
    help="Runs that arrive a second; by default each when the one before has ended.",
)
@click.option("--users", type=ABOVE_ZERO, default=1, show_default=True, help="Runs at the same time, without --rate.")
@click.option("--mtbf", type=NOT_NEGATIVE, default=0.0, help="Mean seconds between a device's failures; 0 for none.")
@click.option(
    "--restart", type=NOT_NEGATIVE, default=10.0, show_default=True, help="Seconds until a failed device is back."
)
@click.option("--price", type=NOT_NEGATIVE, default=0.0, help="Of a device for an hour.")
@click.option("--tolerance", type=NOT_NEGATIVE, default=0.0025, show_default=True, help="Of mode adaptive.")
@click.option(
    "--staleness",
    type=NOT_NEGATIVE,
    default=5e-5,
    show_default=True,
    help="For mode adaptive: residual of a draft one step ahead.",
)
@click.option("--best", is_flag=True, help="Try 1, 2, 4, ... devices, and say which number has the least latency.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all draws.")
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
    """Say what runs would take on up to 1,024 devices: latency, throughput, utilisation, cost; by policy."""
    with plain_errors():
        from dataclasses import replace

        from drp.leader.devices import parse_bytes, parse_time
        from drp.leader.events import Timeline
        from drp.leader.scheduling.policies import POLICIES, find_policy
        from drp.sampling.drafts import DAMPED
        from drp.sampling.mode_selection import make_mode
        from drp.simulate import Costs, Link, Load, make_devices
        from drp.simulate import simulate as run
        from drp.simulate.devices import measured, repeated
        from drp.trace.events import read, write

        if trace is not None:
            check_trace(trace, force)
        if link is None and encryption is not None:
            raise ValueError(f"encryption is {encryption!r}, and there is no link; give --link, such as 200us@1GB/s")
        network = Link.parse(link, encryption, parse_bytes(latent)) if link is not None else None
        if network is not None and dispatch == "async":
            raise ValueError("workers on other machines are sent drafts synchronously; give --dispatch sync")
        given = make_devices(devices, distribution)
        if source is None:
            times = parse_time(message), parse_time(row), parse_time(wake)
            costs = {each: Costs.given(*times, each) for each in ("sync", "async")}
        else:
            events, names, _ = read(source)
            measured_costs = Costs.measured(events, names, "async" if dispatch == "auto" else dispatch)
            costs = dict.fromkeys(("sync", "async"), measured_costs)
            if not all(name.startswith("emulated:") for name in names):
                given = measured(given, events)
        given = tuple(replace(device, mtbf=mtbf, restart=restart) for device in given)
        counts = [n for n in (2**i for i in range(11)) if n < len(given)] + [len(given)] if best else [len(given)]
        chosen = list(POLICIES) if policy == "all" else policy.split(",")
        table = Table(
            *("policy", "devices", "run, ms: median", "mean", "latency, ms: p50", "p95", "runs/s", "computing"),
            *(("cost a run",) if price else ()),
            title=f"{runs} simulated runs of {steps} steps, {mode}",
        )
        found: dict[tuple[str, int], float] = {}
        rows: list[dict[str, object]] = []
        for name in chosen:
            for count in counts:
                made = make_mode(mode, drafts or count, tolerance, DAMPED, stride, parse_offsets(offsets))
                load = Load(made, steps, runs, rate, users)
                timeline = Timeline()
                found_policy = find_policy(name)
                if dispatch == "async" and found_policy.hedge is not None:
                    raise ValueError(f"policy {name!r} hedges, which needs synchronous dispatch; give --dispatch auto")
                sync = dispatch == "sync" or found_policy.hedge is not None or network is not None
                way = "sync" if sync else "async"
                outcome = run(
                    repeated(given, count), found_policy, load, costs[way], seed, staleness, timeline, network
                )
                found[name, count] = outcome.latency(50)
                rows.append(
                    {
                        "policy": name,
                        "devices": count,
                        "dispatch": way,
                        "median_seconds": outcome.median,
                        "mean_seconds": outcome.mean,
                        "latency_p50_seconds": outcome.latency(50),
                        "latency_p95_seconds": outcome.latency(95),
                        "runs_per_second": outcome.throughput,
                        "utilisation": outcome.utilisation,
                        **({"cost_per_run": outcome.cost(price)} if price else {}),
                    }
                )
                table.add_row(
                    *(name, str(count), f"{outcome.median * 1e3:.1f}", f"{outcome.mean * 1e3:.1f}"),
                    *(f"{outcome.latency(q) * 1e3:.1f}" for q in (50, 95)),
                    *(f"{outcome.throughput:.3g}", f"{outcome.utilisation:.1%}"),
                    *((f"{outcome.cost(price):.3g}",) if price else ()),
                )
        if trace is not None:  # of what was simulated last
            write(trace, timeline, [f"simulated {number}" for number in range(counts[-1])])
        (name, count), least = min(found.items(), key=lambda item: item[1])
        if as_json:
            print_json({"rows": rows} | ({"best": {"policy": name, "devices": count}} if best else {}))
            return
        Console(width=max(Console().width, 110)).print(table)
        if best:
            click.echo(f"least latency: {count} device(s), {name}, {least * 1e3:.1f} ms in the median")
