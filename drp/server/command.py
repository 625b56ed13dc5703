"""The command line of the server: `drp serve`, `drp keys`, `drp status`."""

from __future__ import annotations

import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import click

from drp.plain import plain_errors, trace_most_option, trace_option


@click.command()
@click.argument("model", default="digits")
@click.option("-d", "--devices", default="1", show_default=True, help="As those of `drp sample`.")
@click.option("--threads", default=1, show_default=True, help="Threads of each worker.")
@click.option("-l", "--listen", help="ipc://PATH, or tcp://HOST:PORT with --keys; by default a path of the user's own.")
@click.option("--keys", type=click.Path(path_type=Path), help="Directory that `drp keys` has made.")
@click.option("--most", default=64, show_default=True, help="Requests at once, waiting ones included.")
@click.option("--stall", default=30.0, show_default=True, help="Seconds without progress that are not healthy.")
@click.option("--drain", default=30.0, show_default=True, help="Seconds that requests have to finish after SIGTERM.")
@click.option("--start-timeout", default=120.0, show_default=True, help="Seconds that workers have to start.")
@click.option("--draft-timeout", type=float, help="Seconds that a worker has for a draft; by default what is usual.")
@click.option("--hedge", type=float, help="Give drafts that take this many times the usual to idle workers too.")
@click.option("--awake", is_flag=True, help="Keep all cores from sleeping while there are requests; docs/round.md.")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens.")
@trace_option
@trace_most_option
def serve(
    model: str,
    devices: str,
    threads: int,
    listen: str | None,
    keys: Path | None,
    most: int,
    stall: float,
    drain: float,
    start_timeout: float,
    draft_timeout: float | None,
    hedge: float | None,
    awake: bool,
    verbose: bool,
    trace: Path | None,
    trace_most: int,
) -> None:
    """Serve MODEL to clients on a socket, until SIGTERM or Ctrl-C; a second one ends it at once."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s")
    with plain_errors():
        import torch  # only now: --help need not wait for it

        from drp.leader import Leader
        from drp.server.endpoint import check_address, default_address
        from drp.server.keys import Keys
        from drp.server.server import Server
        from drp.trace.record import check, record

        own = Keys.read(keys) if keys is not None else None
        address = listen or default_address()
        check_address(address, own)  # before workers start
        if trace is not None:
            check(trace)
        torch.set_num_threads(1)  # What this process computes is small, and its workers' cores are theirs.
        with (
            Leader(
                model,
                devices=devices,
                threads=threads,
                start_timeout=start_timeout,
                draft_timeout=draft_timeout,
                hedge=hedge,
                awake=awake,
            ) as leader,
            record(leader, trace, trace_most) if trace is not None else nullcontext(),
        ):
            server = Server(leader, model, address, keys=own, most=most, stall=stall)
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
    from drp.server.keys import make

    with plain_errors():
        for path in make(directory, list(clients)):
            click.echo(f"made {path}")


@click.command()
@click.argument("address", required=False)
@click.option("--server-key", type=click.Path(path_type=Path), help="File with the server's public key, for tcp://.")
@click.option("--key", type=click.Path(path_type=Path), help="File with the client's secret key, for tcp://.")
@click.option("--metrics", is_flag=True, help="Print the metrics instead, for Prometheus.")
def status(address: str | None, server_key: Path | None, key: Path | None, metrics: bool) -> None:
    """Print how the server at ADDRESS is; exit with status 1 if it is not healthy."""
    with plain_errors():
        from drp.client import Client
        from drp.server.endpoint import default_address

        with Client(address or default_address(), server_key=server_key, key=key) as client:
            if metrics:
                click.echo(client.metrics(), nl=False)
                return
            now = client.status()
        for name, value in vars(now).items():
            click.echo(f"{name}: {value}")
        if not now.healthy:
            raise click.ClickException("not healthy")
