"""`drp doctor`: examines this machine, or measures the network to workers on other machines."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from drp.cli.helpers import plain_errors, print_json
from drp.cli.options import json_option, verbose_option


@click.command()
@click.option("--ray", help="Measure the network to workers of this Ray cluster: its address, or auto.")
@click.option("--listen", help="Measure the network to workers that dial in at tcp://HOST:PORT.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="With --listen: folder made by `drp keys`; without it, no encryption.",
)
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of workers, with --ray or --listen."
)
@json_option
@verbose_option
def doctor(ray: str | None, listen: str | None, keys: Path | None, workers: int, as_json: bool) -> None:
    """Examine this machine and print what drp will use; the exit status is 1 if something prevents drp from working."""
    if ray is not None or listen is not None:
        with plain_errors():
            _network(ray, listen, keys, workers, as_json)
        return
    from drp.cli.doctor_tables import tables  # imports torch
    from drp.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
    else:
        Console(width=max(Console().width, 110)).print(*tables(report))
    for finding in report.bad:
        click.echo(f"in the way: {finding.about}: {finding.remedy}", err=True)
    if report.bad:
        raise SystemExit(1)


def _network(ray: str | None, listen: str | None, keys: Path | None, workers: int, as_json: bool) -> None:
    """Measure the network and print the result."""
    from drp.doctor_network import measure
    from drp.leader.ray import on_ray
    from drp.leader.remote import RemoteWorkers

    if ray is not None:
        if listen is not None or keys is not None:
            raise ValueError("give --ray, or --listen and --keys")
        remote: RemoteWorkers = on_ray(ray, workers=workers)
    else:
        remote = RemoteWorkers(workers, listen or "", keys, "none" if keys is None else "curve")
    report = measure(remote)
    if as_json:
        print_json({"report": report, "link": report.link})
        return
    table = Table(
        "a draft", "a round beyond its evaluations", title=f"{workers} worker(s): {', '.join(report.workers)}"
    )
    for nbytes, seconds in report.rounds.items():
        table.add_row(f"{nbytes // 1024} KiB", f"{seconds * 1e3:.2f} ms")
    Console(width=max(Console().width, 110)).print(table)
    click.echo("what that costs with evaluations of 100 ms:")
    click.echo(
        f"drp simulate -d {workers}xemulated:100ms --link {report.link} --latent 256KiB --message 0us --wake 0us"
    )
