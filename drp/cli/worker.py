"""`drp worker`: a worker for a leader on another machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from drp.cli.helpers import plain_errors
from drp.cli.options import Number, app_dir_option, verbose_option

RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Variables by which torchrun and Slurm number the processes that they start on a machine."""


@click.command()
@click.argument("address")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="File of the worker's secret key, made by `drp keys`; the leader's public one, server.key, lies beside it or "
    "a folder above.",
)
@click.option("--server-key", type=click.Path(path_type=Path), help="File of the leader's public key, if elsewhere.")
@click.option(
    "--transport-security",
    type=click.Choice(["curve", "none"]),
    default="curve",
    show_default=True,
    help="none: neither encryption nor keys, for a trusted network.",
)
@click.option(
    "-d",
    "--device",
    help="cpu:0, cuda:1 or emulated:20ms; by default the GPU, or else the core, of the number that torchrun or Slurm "
    "has given this process.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option(
    "--wait",
    type=Number(0, min_open=True),
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
    """Be a worker of the leader that listens at ADDRESS, tcp://HOST:PORT, until that ends or the connection is lost.

    The model is imported here by the name that the leader gives, with the weights that are here; they must be the
    leader's. The exit status is 0 once the leader has ended this worker, 1 if it does not use it, and 3 if it is lost.
    """
    with plain_errors():
        if not re.fullmatch(r"tcp://[^:/]+:\d{1,5}", address):
            raise ValueError(f"address is {address!r}; give tcp://HOST:PORT, at which the leader listens")
        if (key is None) == (transport_security == "curve"):
            raise ValueError(
                "give --key, the file of this worker's secret key, or --transport-security none without it"
            )
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
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
