"""The options of commands that start a leader, `drp sample` and `drp serve`: those of `drp.LeaderOptions`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from drp.cli.options import NumberRange, default_devices

if TYPE_CHECKING:
    from drp.leader.devices import Devices
    from drp.leader.options import LeaderOptions
    from drp.leader.ray import RayWorkers

F = TypeVar("F", bound=Callable[..., Any])

POSITIVE = click.IntRange(1)
SECONDS = NumberRange(0, min_open=True)

_OPTIONS = (
    click.option(
        "-d",
        "--devices",
        help="A count, of GPUs if there are any, else of cores; or names: 2xcpu or cuda:0,cuda:1 or 8xemulated:20ms. "
        "By default all GPUs, else all cores, up to 4.",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster on whose machines the devices are: auto or HOST:PORT. --devices is then a count, or 8xcuda.",
    ),
    click.option("--threads", type=POSITIVE, help="Threads of each worker; by default 1, without --devices all cores."),
    click.option(
        "--drafts-per-device", type=POSITIVE, help="Drafts that a device evaluates as one batch; by default 1."
    ),
    click.option(
        "--policy",
        default="load-adaptive",
        show_default=True,
        help="When and to which worker drafts are sent: a name in drp.leader.scheduling.policies.",
    ),
    click.option(
        "--hedge",
        type=NumberRange(1, min_open=True),
        help="Send a draft to a second worker after this many times the median latency.",
    ),
    click.option(
        "--dispatch",
        type=click.Choice(["auto", "sync", "async"]),
        default="auto",
        show_default=True,
        help="Whether drafts are sent ahead of the predictions that they depend on.",
    ),
    click.option(
        "--start-timeout",
        type=SECONDS,
        default=120.0,
        show_default=True,
        help="Seconds within which workers must start.",
    ),
    click.option(
        "--draft-timeout",
        type=SECONDS,
        help="Seconds within which a worker must evaluate a draft; by default 20 times the slowest so far.",
    ),
)


def leader_options(command: F) -> F:
    """Add the options of a leader."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_leader_options(given: Mapping[str, Any]) -> LeaderOptions:
    """Return the leader's options, with default devices if none are given; raise ValueError for invalid ones."""
    from dataclasses import replace

    from drp.leader.execution import ExecutionOptions  # Imported here, so that --help does not import torch.
    from drp.leader.options import LeaderOptions
    from drp.leader.scheduling.policies import find_policy

    devices: Devices
    if given["ray"] is not None:
        devices, threads, batch = ray_devices(given["ray"], given["devices"], given["threads"]), 1, 1
    else:
        devices, threads, batch = (given["devices"], 1, 1) if given["devices"] is not None else default_devices()
    policy = find_policy(given["policy"])
    return LeaderOptions(
        devices=devices,
        threads=given["threads"] or threads,
        drafts_per_device=given["drafts_per_device"] or batch,
        policy=replace(policy, hedge=given["hedge"]) if given["hedge"] is not None else policy,
        execution=ExecutionOptions(dispatch=given["dispatch"]),
        start_timeout=given["start_timeout"],
        draft_timeout=given["draft_timeout"],
    )


def ray_devices(address: str, devices: str | None, threads: int | None) -> RayWorkers:
    """Return the workers that Ray places; `devices` is a count, or a count and a kind such as 8xcuda.

    Raises ValueError without Ray and for other `devices`, ConnectionError if there is no cluster.
    """
    from drp.leader.ray import on_ray

    named = re.fullmatch(r"(\d{1,6})(?:x(.+))?", devices or "")
    if named is None:
        raise ValueError(f"devices is {devices!r}; with --ray give a count, such as 8, or 8xcuda or 8xcpu")
    try:
        return on_ray(address, workers=int(named[1]), device=named[2], threads=threads or 1)
    except ImportError as error:
        raise ValueError(str(error)) from None
