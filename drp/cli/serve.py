"""The command line of the server: `drp serve`, `drp keys`, `drp status`."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path

import click

from drp.cli.helpers import plain_errors, print_json
from drp.cli.options import (
    DeviceDefaults,
    Number,
    common_options,
    default_devices,
    force_option,
    json_option,
    trace_most_option,
    trace_option,
)
from drp.cli.output import check_trace

SECONDS = Number(0, min_open=True)


@click.command()
@click.argument("model", default="digits")
@click.option("-d", "--devices", help="As those of `drp sample`.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each worker, as those of `drp sample`.")
@click.option("-l", "--listen", help="ipc://PATH, or tcp://HOST:PORT with --keys; by default a path of the user's own.")
@click.option("--keys", type=click.Path(path_type=Path), help="Directory that `drp keys` has made.")
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests at once, waiting ones included.",
)
@click.option(
    "--stall", type=SECONDS, default=30.0, show_default=True, help="Seconds without progress that are not healthy."
)
@click.option(
    "--drain",
    type=Number(0),
    default=30.0,
    show_default=True,
    help="Seconds that requests have to finish after SIGTERM.",
)
@click.option(
    "--start-timeout", type=SECONDS, default=120.0, show_default=True, help="Seconds that workers have to start."
)
@click.option("--draft-timeout", type=SECONDS, help="Seconds that a worker has for a draft; by default what is usual.")
@click.option(
    "--hedge",
    type=Number(1, min_open=True),
    help="Give drafts that take this many times the usual to idle workers too.",
)
@click.option("--max-clients", type=click.IntRange(1), default=128, show_default=True, help="Clients at once.")
@trace_option
@trace_most_option
@force_option
@common_options
def serve(
    model: str,
    devices: str | None,
    threads: int | None,
    listen: str | None,
    keys: Path | None,
    max_requests: int,
    max_clients: int,
    stall: float,
    drain: float,
    start_timeout: float,
    draft_timeout: float | None,
    hedge: float | None,
    trace: Path | None,
    trace_most: int,
    force: bool,
) -> None:
    """Serve MODEL to clients on a socket, until SIGTERM or Ctrl-C; a second one ends it at once."""
    with plain_errors():
        import torch  # only now: --help need not wait for it

        from drp.leader import Leader
        from drp.protocol.keys import Keys
        from drp.server.endpoint import (
            check_address,
            check_descriptors,
            default_address,
            raise_descriptor_limit,
        )
        from drp.server.server import Server
        from drp.trace.record import record

        own = Keys.read(keys) if keys is not None else None
        address = listen or default_address()
        raise_descriptor_limit()
        check_address(address, own)  # before workers start
        check_descriptors(max_clients)
        if trace is not None:
            check_trace(trace, force)
        places = default_devices() if devices is None else DeviceDefaults(devices, 1, 1)
        torch.set_num_threads(1)  # What this process computes is small, and its workers' cores are theirs.
        with (
            Leader(
                model,
                devices=places.devices,
                threads=threads or places.threads,
                drafts_per_device=places.drafts_per_device,
                start_timeout=start_timeout,
                draft_timeout=draft_timeout,
                hedge=hedge,
            ) as leader,
            record(leader, trace, trace_most) if trace is not None else nullcontext(),
        ):
            server = Server(
                leader, model, address, keys=own, max_requests=max_requests, max_clients=max_clients, stall=stall
            )
            patience = iter([drain])
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.drain(next(patience, 0.0)))
            try:
                click.echo(f"serving {model} on {', '.join(leader.devices)} at {server.address}")
                server.run()
            finally:
                server.close()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("clients", nargs=-1)
def keys(directory: Path, clients: tuple[str, ...]) -> None:
    """Make the keys of a server, and of CLIENTS by name, in DIRECTORY, where there are none yet.

    A client needs DIRECTORY/clients/NAME.key_secret and DIRECTORY/server.key, and nothing else of it.
    """
    from drp.protocol.keys import make

    with plain_errors():
        for path in make(directory, list(clients)):
            click.echo(f"made {path}")


@click.command()
@click.argument("address", required=False)
@click.option("--server-key", type=click.Path(path_type=Path), help="File with the server's public key, for tcp://.")
@click.option("--key", type=click.Path(path_type=Path), help="File with the client's secret key, for tcp://.")
@click.option("--metrics", is_flag=True, help="Print the metrics instead, for Prometheus.")
@json_option
def status(address: str | None, server_key: Path | None, key: Path | None, metrics: bool, as_json: bool) -> None:
    """Print how the server at ADDRESS is; exit with status 1 if it is not healthy."""
    with plain_errors():
        if metrics and as_json:
            raise ValueError("--metrics prints Prometheus' text format; leave out --json")
        from drp.client import Client
        from drp.server.endpoint import default_address

        with Client(address or default_address(), server_key=server_key, key=key, arrays="numpy") as client:
            if metrics:
                click.echo(client.metrics(), nl=False)
                return
            now = client.status()
        if as_json:
            print_json(now)
        else:
            for name, value in vars(now).items():
                click.echo(f"{name}: {value}")
        if not now.healthy:
            raise click.ClickException("not healthy")
