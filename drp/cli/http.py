"""`drp http`: the HTTP gateway."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from drp.cli.helpers import plain_errors
from drp.cli.options import (
    GroupedCommand,
    NumberRange,
    common_options,
    force_option,
    pipeline_devices,
    trace_max_events_option,
    trace_option,
)
from drp.cli.output import check_file
from drp.http.jobs import Backend
from drp.pipelines import KINDS
from drp.sampling.mode_selection import MODE_NAMES


@click.command(cls=GroupedCommand)
@click.option("-c", "--connect", help="The server's address, as `drp serve` prints it; by default the user's own.")
@click.option("--server-key", type=click.Path(path_type=Path), help="File with the server's public key, for tcp://.")
@click.option("--key", type=click.Path(path_type=Path), help="File with the client's secret key, for tcp://.")
@click.option(
    "--diffusers",
    metavar="PATH",
    help=f"Serve a diffusers pipeline instead of a server's model: {KINDS}.",
)
@click.option("-d", "--devices", help="Devices of the pipeline, as in `drp sample`.")
@click.option(
    "-m", "--mode", type=click.Choice(MODE_NAMES), default="window", show_default=True, help="Mode of the pipeline."
)
@click.option("--drafts", type=click.IntRange(1), help="Drafts per round of the pipeline; by default one per device.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at. There is no authentication."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0 for a free one.",
)
@click.option("--allow-host", multiple=True, help="Further Host header to accept; '*' for any.")
@click.option(
    "--max-work",
    type=NumberRange(1),
    default=1e9,
    show_default=True,
    help="Limit of images x width x height x steps per request.",
)
@click.option(
    "--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests to the pipeline that may wait."
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Connections at once; further requests are answered with 503.",
)
@trace_option
@trace_max_events_option
@force_option
@common_options
def http(
    connect: str | None,
    server_key: Path | None,
    key: Path | None,
    diffusers: str | None,
    devices: str | None,
    mode: str,
    drafts: int | None,
    host: str,
    port: int,
    allow_host: tuple[str, ...],
    max_work: float,
    queue: int,
    max_connections: int,
    trace: Path | None,
    trace_max_events: int,
    force: bool,
) -> None:
    """Serve images over HTTP: OpenAI's images endpoint, /health, /metrics and a page. Needs draft-refine[serve]."""
    with plain_errors():
        try:
            import uvicorn

            from drp.http.app import make_app
        except ImportError as error:
            raise ValueError(f"{error}; pip install 'draft-refine[serve]'") from None
        backend: Backend
        if diffusers is not None:
            if trace is not None:
                check_file(trace, force)
            places, batch = pipeline_devices(devices)
            traced: dict[str, Any] = {} if trace is None else {"trace": trace, "trace_max_events": trace_max_events}
            options = {"devices": places, "mode": mode, "drafts": drafts, "drafts_per_device": batch, **traced}
            backend = _pipeline_backend(diffusers, options, max_work, queue)
        else:
            if trace is not None:
                raise ValueError("--trace needs --diffusers; a server has its own leader: drp serve --trace FILE")
            backend = _socket_backend(connect, server_key, key, max_work)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once it has shut down
        try:
            with contextlib.suppress(KeyboardInterrupt), socket.create_server((host, port), backlog=128) as listening:
                click.echo(f"serving {backend.model} at http://{host}:{listening.getsockname()[1]}")
                app = make_app(backend, [*own_names(host), *allow_host])
                config = uvicorn.Config(
                    app, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=max_connections
                )
                uvicorn.Server(config).run([listening])
        finally:
            backend.close()


def own_names(host: str) -> list[str]:
    """Return the Host headers of a server at this address: its own name, or all names of this machine."""
    found = {host, "localhost", "127.0.0.1", "[::1]"}
    if host in ("", "0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
        import psutil  # Imported here, so that unsupported systems get a clear error first.

        found |= {socket.gethostname(), socket.getfqdn()}
        addresses = [each.address for interface in psutil.net_if_addrs().values() for each in interface]
        found |= {f"[{address.partition('%')[0]}]" if ":" in address else address for address in addresses}
    return sorted(name for name in found if name)


def _socket_backend(address: str | None, server_key: Path | None, key: Path | None, max_work: float) -> Backend:
    from drp.client import Client
    from drp.http.socket_backend import SocketBackend
    from drp.server.endpoint import default_address, raise_descriptor_limit

    raise_descriptor_limit()
    address = address or default_address()
    connecting = partial(Client, address, server_key=server_key, key=key, name="drp http", arrays="numpy")
    return SocketBackend(lambda timeout: connecting(timeout=timeout), max_work)


def _pipeline_backend(name: str, parallelize_options: dict[str, Any], max_work: float, max_queue: int) -> Backend:
    try:
        from drp.http.pipeline import load
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'draft-refine[diffusers,serve]'") from None
    return load(name, parallelize_options, max_work, max_queue)
