"""`drp worker`: a worker for a leader on another machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from drp.cli.helpers import plain_errors
from drp.cli.options import NumberRange, app_dir_option, verbose_option
from drp.frozen_imports import frozen_imports

RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Environment variables with the local rank of a process, set by torchrun and Slurm."""


@click.command()
@click.argument("address")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="File with the worker's secret key, made by `drp keys`. The leader's public key, server.key, is looked for "
    "beside it and in the folder above.",
)
@click.option(
    "--server-key", type=click.Path(path_type=Path), help="File with the leader's public key, if it is elsewhere."
)
@click.option(
    "--transport-security",
    type=click.Choice(["curve", "none"]),
    default="curve",
    show_default=True,
    help="none: no encryption and no keys, for a trusted network.",
)
@click.option(
    "-d",
    "--device",
    help="cpu:0, cuda:1 or emulated:20ms; by default the GPU, else the core, with the local rank that torchrun or "
    "Slurm has set.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option(
    "--wait",
    type=NumberRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds within which the leader must answer.",
)
@app_dir_option
@verbose_option
def worker(
    address: str,
    key: Path | None,
    server_key: Path | None,
    transport_security: str,
    device: str | None,
    threads: int,
    wait: float,
) -> None:
    """Run a worker for the leader at ADDRESS, tcp://HOST:PORT, until the leader ends or the connection is lost.

    The model is imported on this machine by the name that the leader sends. Its weights must equal the leader's. The
    exit status is 0 if the leader ended this worker, 1 if the leader rejected it, and 3 if the connection was lost.
    """
    with plain_errors():
        if not re.fullmatch(r"tcp://[^:/]+:\d{1,5}", address):
            raise ValueError(f"address is {address!r}; give tcp://HOST:PORT, at which the leader listens")
        if (key is None) == (transport_security == "curve"):
            raise ValueError(
                "give --key, the file of this worker's secret key, or --transport-security none without it"
            )
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
        with frozen_imports():
            from drp.leader.devices import parse_devices
            from drp.leader.gpus import has_gpus
            from drp.protocol.dial import WorkerKeys
            from drp.workers.dialed import DialConfig, main

        rank = next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)
        name = device or (f"cuda:{rank}" if has_gpus() else f"cpu:{rank % len(os.sched_getaffinity(0))}")
        (place,) = parse_devices([name], threads)
        os.sched_setaffinity(0, place.cores)
        keys = WorkerKeys.read(key, server_key) if key is not None else None
        shown = name if place.emulated is not None else place.name
        main(DialConfig(address, keys, shown, place.gpu or "", threads, wait))
