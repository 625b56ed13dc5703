"""`drp serve`, `drp keys` and `drp status`: the server, its keys and its status."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from drp.cli.helpers import plain_errors, print_json
from drp.cli.leader_options import SECONDS, leader_options, make_leader_options
from drp.cli.options import (
    GroupedCommand,
    NumberRange,
    common_options,
    force_option,
    json_option,
    trace_max_events_option,
    trace_option,
)
from drp.cli.output import check_file
from drp.pipelines import check_module


@click.command(cls=GroupedCommand)
@click.argument("model", default="digits")
@leader_options
@click.option(
    "-l",
    "--listen",
    help="ipc://PATH, or tcp://HOST:PORT with --keys; by default a path in the user's runtime directory.",
)
@click.option("--keys", type=click.Path(path_type=Path), help="Directory made by `drp keys`.")
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests at once, waiting ones included.",
)
@click.option("--max-clients", type=click.IntRange(1), default=128, show_default=True, help="Clients at once.")
@click.option(
    "--stall",
    type=SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds without progress after which the server is unhealthy.",
)
@click.option(
    "--drain",
    type=NumberRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that requests have to finish after SIGTERM.",
)
@trace_option
@trace_max_events_option
@force_option
@common_options
def serve(
    model: str,
    listen: str | None,
    keys: Path | None,
    max_requests: int,
    max_clients: int,
    stall: float,
    drain: float,
    trace: Path | None,
    trace_max_events: int,
    force: bool,
    **leader: Any,
) -> None:
    """Serve MODEL to clients on a socket, until SIGTERM or Ctrl-C; a second one ends it at once."""
    with plain_errors():
        import torch  # Imported here, so that --help does not import it.

        from drp.leader import Leader
        from drp.models import describe
        from drp.protocol.endpoint import check_address
        from drp.protocol.keys import Keys
        from drp.server.endpoint import check_descriptors, default_address, raise_descriptor_limit
        from drp.server.server import Server
        from drp.trace.record import record

        own = Keys.read(keys) if keys is not None else None
        address = listen or default_address()
        raise_descriptor_limit()
        check_address(address, own)  # before workers start
        check_descriptors(max_clients)
        if trace is not None:
            check_file(trace, force)
        describe(model)  # raises ValueError for an unknown name
        options = make_leader_options(leader)
        if options.remote is None:  # Workers on other machines import the model there.
            check_module(model)
        torch.set_num_threads(1)  # This process computes little, and must not use its workers' cores.
        with (
            Leader(model, options) as started,
            record(started, trace, trace_max_events) if trace is not None else nullcontext(),
        ):
            server = Server(
                started, model, address, keys=own, max_requests=max_requests, max_clients=max_clients, stall=stall
            )
            drain_times = iter([drain])
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.drain(next(drain_times, 0.0)))
            try:
                click.echo(f"serving {model} on {', '.join(started.devices)} at {server.address}")
                server.run()
            finally:
                server.close()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("clients", nargs=-1)
@click.option("-w", "--worker", "workers", multiple=True, help="Name of a worker on another machine; may be repeated.")
def keys(directory: Path, clients: tuple[str, ...], workers: tuple[str, ...]) -> None:
    """Make missing keys of a server or leader, and of CLIENTS by name, in DIRECTORY.

    A client needs only DIRECTORY/clients/NAME.key_secret and DIRECTORY/server.key, a worker only
    DIRECTORY/workers/NAME.key_secret and DIRECTORY/server.key.
    """
    from drp.protocol.keys import make

    with plain_errors():
        for path in make(directory, list(clients), list(workers)):
            click.echo(f"made {path}")


@click.command()
@click.argument("address", required=False)
@click.option("--server-key", type=click.Path(path_type=Path), help="File with the server's public key, for tcp://.")
@click.option("--key", type=click.Path(path_type=Path), help="File with the client's secret key, for tcp://.")
@click.option("--metrics", is_flag=True, help="Print metrics in the text format of Prometheus instead.")
@json_option
def status(address: str | None, server_key: Path | None, key: Path | None, metrics: bool, as_json: bool) -> None:
    """Print the status of the server at ADDRESS; the exit status is 1 if it is not healthy."""
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
