"""Devices: what a user may call them, and the processor cores behind each."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 256
"""Workers of one leader."""


@dataclass(frozen=True)
class Device:
    """One worker's place: a name, and the cores it is pinned to."""

    name: str
    cores: tuple[int, ...]


def parse_devices(devices: int | str | Sequence[str], threads: int) -> tuple[Device, ...]:
    """Return a device for each worker.

    `devices` is a count, a name, several names, or names with commas between. A name is `cpu:I`, the I-th of the cores
    that this process may use, or `cpu`, the next in turn. A worker with several threads has the cores after it too.
    More workers than cores share them.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}; a worker needs 1 or more")
    names = _names(devices)
    if not 1 <= len(names) <= MOST:
        raise ValueError(f"{len(names)} devices; a run needs 1 to {MOST}")
    cores = sorted(os.sched_getaffinity(0))
    placed = []
    for turn, name in enumerate(names):
        found = re.fullmatch(r"cpu(?::(\d{1,4}))?", name)
        if not found:
            raise ValueError(f"device {name!r} does not exist; drp runs on {_known(cores)}")
        first = turn * threads % len(cores) if found[1] is None else int(found[1])
        if first >= len(cores):
            raise ValueError(f"device {name!r} does not exist; this process may use {_known(cores)}")
        own = tuple(cores[(first + i) % len(cores)] for i in range(min(threads, len(cores))))
        placed.append(Device(f"cpu:{first}", own))
    return tuple(placed)


def _names(devices: int | str | Sequence[str]) -> list[str]:
    if isinstance(devices, str):
        devices = int(devices) if re.fullmatch(r"-?\d{1,6}", devices) else [d.strip() for d in devices.split(",")]
    if isinstance(devices, bool) or not isinstance(devices, (int, Sequence)):
        raise ValueError(f"devices is {devices!r}; give a count, or names such as 'cpu:0'")
    if isinstance(devices, int):
        if not 1 <= devices <= MOST:
            raise ValueError(f"devices is {devices}; a run needs 1 to {MOST}")
        return ["cpu"] * devices
    for name in devices:
        if not isinstance(name, str):
            raise ValueError(f"devices holds {name!r}; give a count, or names such as 'cpu:0'")
    return list(devices)


def _known(cores: Sequence[int]) -> str:
    return "cpu:0" if len(cores) == 1 else f"cpu:0 to cpu:{len(cores) - 1}"
